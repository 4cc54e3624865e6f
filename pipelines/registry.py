"""`ris registry`: the versions of the MLflow registry, for people: what there is, moving an alias by hand, and going back."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from pipelines import tracking, versions
from ris_core.errors import ClusterError, ConfigError

CHAMPION = "champion"


class Action(StrEnum):
    """What can be done."""

    LIST = "list"
    SHOW = "show"
    PROMOTE = "promote"
    ROLLBACK = "rollback"


def main(
    action: Annotated[
        Action, typer.Argument(help="list: all versions; show: one model or version; promote, rollback: move an alias")
    ],
    model: Annotated[
        str | None, typer.Argument(help="NAME, NAME/NUMBER or NAME@ALIAS; with `list`, a name narrows it")
    ] = None,
    alias: Annotated[str, typer.Option(help="which alias is moved")] = CHAMPION,
    why: Annotated[str | None, typer.Option(help="the reason, kept with the move; needed to move an alias")] = None,
) -> None:
    """Show the versions of the registry, and move an alias by hand: each move is kept with who and why."""
    client = tracking.connect()
    if action is Action.LIST:
        show_all(client, model)
        return
    if model is None:
        raise ConfigError(f"ris registry {action.value} needs a model: NAME, NAME/NUMBER or NAME@ALIAS")
    if action is Action.SHOW:
        show(client, model)
        return
    if not why or not why.strip():
        raise ConfigError(
            f"give the reason, which is kept with the move: ris registry {action.value} {model} --why '...'"
        )
    name = versions.name_of(model)
    versions.moves(client, name)  # which says if there is none
    with versions.alone(client, name):
        move = promote(client, model, alias, why) if action is Action.PROMOTE else rollback(client, name, alias, why)
    typer.echo(told(name, move))


def promote(client: versions.MlflowClient, model: str, alias: str, why: str) -> versions.Move:
    """Let an alias stand for a version. Raises ClusterError if there is none, or it has the alias already."""
    version = versions.find(client, model)
    standing = versions.holder(client, version.name, alias)
    if standing is not None and standing.version == version.version:
        raise ClusterError(f"{version.name}/{version.version} is {alias} already")
    return versions.move(client, version.name, alias, str(version.version), "promote", why)


def rollback(client: versions.MlflowClient, name: str, alias: str, why: str) -> versions.Move:
    """Let an alias stand for the version it stood for before; done again, for the one before that.

    Raises ClusterError if there is none, or it was deleted.
    """
    standing = versions.holder(client, name, alias)
    earlier = versions.before(versions.moves(client, name), alias, None if standing is None else str(standing.version))
    if earlier is None:
        raise ClusterError(f"no version of {name} was {alias} before; `ris registry promote {name}/NUMBER` chooses one")
    if versions.version_of(client, name, earlier) is None:
        raise ClusterError(
            f"version {earlier} of {name}, which was {alias} before, was deleted; `ris registry promote {name}/NUMBER` "
            "chooses another"
        )
    return versions.move(client, name, alias, earlier, "rollback", why)


def told(name: str, move: versions.Move) -> str:
    """Give a move as one line."""
    before = f"version {move.before}" if move.before else "nowhere"
    return f"{move.at}  {name}@{move.alias}: {before} -> version {move.version}, {move.how} by {move.by}: {move.why}"


def show_all(client: versions.MlflowClient, name: str | None) -> None:
    """Print a table of all versions, of one model if named. Raises ClusterError if there are none."""
    names = [name] if name else sorted(model.name for model in client.search_registered_models())
    table = Table("model", "version", "aliases", "score [95 %]", "protocol", "split", "registered", box=None)
    for each in names:
        for version in reversed(versions.known(client, each)):
            tags = version.tags
            score = tags.get(f"{tags.get('split')}/{tags.get('metric')}", tags.get("score", ""))
            aliases = ", ".join(client.get_model_version(each, version.version).aliases)
            made = versions.when(version.creation_timestamp)
            row = (f"{tags.get('metric', '')} {score}".strip(), tags.get("protocol", ""), tags.get("split", ""), made)
            table.add_row(each, str(version.version), aliases, *row)
    if not table.row_count:
        raise ClusterError(f"{tracking.uri()} has no versions" + (f" of {name}" if name else ""))
    # Where it is not for eyes it is for programs: nothing is cut to a width then.
    console = Console()
    Console(width=None if console.is_terminal else 200).print(table)


def show(client: versions.MlflowClient, model: str) -> None:
    """Print a version's card and tags, or of a model the moves of its aliases."""
    if "@" not in model and "/" not in model.removeprefix("models:/").rstrip("/"):
        name = versions.name_of(model)
        made = versions.moves(client, name)
        show_all(client, name)
        for each in made:
            typer.echo(told(name, each))
        return
    version = versions.find(client, model)
    aliases = ", ".join(client.get_model_version(version.name, version.version).aliases)
    typer.echo(f"{version.name}/{version.version}{f'  ({aliases})' if aliases else ''}  run {version.run_id}\n")
    for key, value in sorted(version.tags.items()):
        typer.echo(f"{key}: {value}")
    typer.echo(f"\n{version.description or 'It has no card.'}")


if __name__ == "__main__":
    from pipelines.stage import run

    run(main)
