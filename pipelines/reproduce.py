"""`ris reproduce`: make a registered version again, from what it tells of itself, and compare what comes out.

The code is checked out at its commit, parameters are laid beside it, and DVC runs the stages into a folder of their own, with a
tracking store and a storage of their own. Then the digests of data, CLIP, configuration, code and weights have to be the same.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from pipelines import paths, versions
from ris_core.errors import ClusterError, ConfigError, DataError
from ris_core.files import write_text
from ris_core.models.registry import ModelInfo, read_description
from ris_core.options import Plain

DIRTY = "-dirty"
VERIFIED = ("data_digest", "clip_digest", "config_digest", "weights_sha256", "score")
OWN = ("MLFLOW_TRACKING_URI", "RIS_STORAGE")  # set for this project, and not for what is made again


@dataclass(frozen=True)
class Origin:
    """What a version tells of how it was made."""

    model: str
    system: str
    dataset: str
    tags: Plain
    params: str | None  # the text of params.yaml

    @property
    def commit(self) -> str:
        return str(self.tags["git_commit"]).removesuffix(DIRTY)


def main(
    model: Annotated[str, typer.Argument(help="models:/NAME@ALIAS or models:/NAME/NUMBER")],
    execute: Annotated[bool, typer.Option("--run", help="run the commands, and compare what they make")] = False,
    to: Annotated[Path | None, typer.Option(help="the folder to work in; it must not exist")] = None,
) -> None:
    """Print the commands that make a registered version again; with --run, run them and verify what they make."""
    origin = read(model)
    place = to or Path("reproduced") / f"{origin.model}-{origin.commit[:12]}"
    steps = commands(origin, place)
    for line in (*notes(origin), *(shlex.join(step) for step in steps)):
        typer.echo(line)
    for key in VERIFIED:
        typer.echo(f"# then {key} should be {origin.tags[key]}")
    if not execute:
        return
    check_runnable(origin, place)
    perform(origin, place, steps)
    differing = compared(origin, place)
    if differing:
        raise DataError(f"{place} has another {', '.join(differing)} than {model}")
    typer.echo(f"{place}: the same data, CLIP, configuration, weights and score as {model}")


def read(model: str) -> Origin:
    """Read what a version tells of itself. Raises ClusterError if it was registered without that."""
    folder = versions.fetch(model, versions.EVALUATION)
    try:
        told = json.loads((folder / versions.LINEAGE).read_text(encoding="utf-8"))
        params = folder / paths.PARAMS.name
        text = params.read_text(encoding="utf-8") if params.exists() else None
        return Origin(told["model"], told["system"], told["dataset"], told["tags"], text)
    except (OSError, ValueError, KeyError) as error:
        raise ClusterError(f"{model} does not tell how it was made ({type(error).__name__}: {error})") from error


def commands(origin: Origin, place: Path) -> list[list[str]]:
    """List the commands, in order; parameters are laid into the folder between the second and the third."""
    source = str(paths.PARAMS.parent.absolute())
    dvc = [sys.executable, "-m", "dvc", "--cd", str(place), "repro"]
    return [
        ["git", "clone", "--quiet", "--no-checkout", source, str(place)],
        ["git", "-C", str(place), "checkout", "--quiet", "--detach", origin.commit],
        [*_threads(origin), *dvc, f"evaluate@{origin.system}-{origin.dataset}"],
    ]


def _threads(origin: Origin) -> list[str]:
    """Let stages have as many threads as they had, which decide the order in which sums are added up."""
    return ["env", f"OMP_NUM_THREADS={origin.tags['threads']}"] if "threads" in origin.tags else []


def notes(origin: Origin) -> list[str]:
    """Say what the commands do not: where parameters come from, and what may differ."""
    found = [f"# {origin.model}: {origin.system} on {origin.dataset}"]
    if origin.params is not None:
        found.append("# its params.yaml, kept with the version, is laid into the folder before DVC is run")
    if not origin.dataset.startswith("shapes"):
        found.append(f"# the data is yours to link: data/raw/{origin.dataset} as in this project")
    if str(origin.tags["git_commit"]).endswith(DIRTY):
        found.append("# it was made with changes that were not committed: these commands make what the commit says")
    found.append(
        "# weights are the same to the bit on such a machine, with as many workers; elsewhere sums are other sums"
    )
    return found


def check_runnable(origin: Origin, place: Path) -> None:
    """Raise ConfigError unless the commit is known here and exact, and the folder is free."""
    problems = []
    if str(origin.tags["git_commit"]).endswith(DIRTY) or origin.commit == "unknown":
        problems.append(f"its code is not known exactly: it was made at '{origin.tags['git_commit']}'")
    elif subprocess.run(["git", "cat-file", "-e", f"{origin.commit}^{{commit}}"], capture_output=True).returncode:
        problems.append(f"this repository does not have the commit {origin.commit}: fetch it")
    if place.exists():
        problems.append(f"{place} exists: give another folder with --to")
    if problems:
        raise ConfigError(f"{origin.model} cannot be made again here: {'; '.join(problems)}")


def perform(origin: Origin, place: Path, steps: Sequence[Sequence[str]]) -> None:
    """Run the commands. Raises ClusterError for the first that fails; what it said was shown."""
    environment = {key: value for key, value in os.environ.items() if key not in OWN}
    environment["PYTHONPATH"] = str(place.absolute())  # its own code, not that which is installed
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", "")])
    for step in steps:
        if step is steps[-1]:
            lay(origin, place)
        if subprocess.run(step, env=environment, check=False).returncode:
            raise ClusterError(f"`{shlex.join(step)}` failed, for the reason above")


def lay(origin: Origin, place: Path) -> None:
    """Lay parameters and, of real data, a link to it into the folder."""
    if origin.params is not None:
        write_text(place / paths.PARAMS, origin.params)
    raw = paths.raw(origin.dataset)
    if not origin.dataset.startswith("shapes") and raw.exists():
        (place / raw).parent.mkdir(parents=True, exist_ok=True)
        (place / raw).symlink_to(raw.resolve())


def compared(origin: Origin, place: Path) -> list[str]:
    """Print each digest beside that of the version; the names of those that differ."""
    described = read_description(place / paths.model(origin.system, origin.dataset))
    info: ModelInfo = described.info
    metrics = json.loads((place / paths.evaluation(origin.system, origin.dataset) / "metrics.json").read_text())
    score = metrics[origin.tags["protocol"]][origin.tags["split"]][origin.tags["metric"]]
    made = {
        "data_digest": info.data_digest,
        "clip_digest": info.clip_digest,
        "config_digest": info.config_digest,
        "weights_sha256": described.weights_sha256,
        "score": f"{score:.5f}",
    }
    for key in VERIFIED:
        same = "the same" if made[key] == origin.tags[key] else f"not {origin.tags[key]}"
        typer.echo(f"{key}: {made[key]}  {same}")
    return [key for key in VERIFIED if made[key] != origin.tags[key]]


if __name__ == "__main__":
    from pipelines.stage import run

    run(main)
