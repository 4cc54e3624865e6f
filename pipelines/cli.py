"""`ris <verb>`: every stage, and predicting with a trained model.

A verb's module is imported when the verb is called, so that `ris --help` answers at once and no other module of this
package has to import anything late.
"""

from __future__ import annotations

import importlib
import sys
from importlib.util import find_spec

import typer
from typer.core import TyperCommand, TyperGroup

from ris_core.errors import RISError

VERBS = {  # what the first line of its `main` says
    "predict": "Mark the object an expression names: writes a picture, prints the score and the mask's size.",
    "serve": "Serve models over HTTP, with a page to try them; a token of clients is read from RIS_TOKEN.",
    "predict-batch": "Answer many expressions about many images with all of a machine or cluster; goes on where it was stopped.",
    "registry": "Show the versions of the registry, and move an alias by hand: each move is kept with who and why.",
    "reproduce": "Print the commands that make a registered version again; with --run, run them and verify what they make.",
    "import-checkpoint": "Make a model folder of an official CRIS checkpoint.",
    "export-checkpoint": "Write a CRIS model as the official code's checkpoints are written.",
    "fetch": "Fetch annotations, photos and weights of CLIP: resumed, checked, and put where stages look for them.",
    "resolve": "Write the values that every stage reads, merged from params.yaml, its preset and the defaults.",
    "synthesize": "Write a synthetic dataset in exactly the official RefCOCO files.",
    "prepare": "Read a dataset, check everything about it, and write records and the audit report.",
    "preprocess": "Decode and letterbox every image once and write memory-mappable Arrow shards.",
    "propose": "Make the proposals of every image of the evaluated splits, once for all systems.",
    "pretrain-clip": "Train a small CLIP on captioned scenes, or load and check the weights that its section names.",
    "initialise": "Write the model that training starts from; trains the first stage of a system that has one.",
    "train": "Train one system on one dataset; writes the best model and the learning curves.",
    "evaluate": "Score a trained model: every expression once, named protocols, baselines, confidence intervals.",
    "score": "Score somebody's predicted masks under every protocol; with --against, test two of them against each other.",
    "tabulate": "Print the scores of several evaluations as one table: models and what they were trained on, against datasets.",
    "register": "Log the model with its scores and lineage to MLflow and move the alias if it surely beats the champion.",
    "compare": "Test all systems against each other over the same expressions, and show what was hard for them.",
    "report": "Write the report page from what train, evaluate and compare left under results/.",
    "submit": "Run a command on the cluster at RAY_ADDRESS, and bring back what it makes.",
}
OURS = ("pipelines", "ris_core")
# What a verb cannot do without, beside the library's own dependencies; all others need what stages do.
LIBRARIES = {
    **dict.fromkeys(("predict", "score", "tabulate", "import-checkpoint", "export-checkpoint"), ()),
    **dict.fromkeys(("registry", "reproduce"), ("mlflow",)),
    "serve": ("fastapi", "uvicorn"),
    "fetch": ("requests",),
}
STAGES = ("ray", "mlflow")


class Verbs(TyperGroup):
    """The verbs, known by their names alone until one is called."""

    def list_commands(self, ctx: typer.Context) -> list[str]:  # type: ignore[override]  # its own class is private
        """List the verbs that can work here; who calls another is told what to install."""
        return [verb for verb in VERBS if all(find_spec(name) for name in LIBRARIES.get(verb, STAGES))]

    def get_command(self, ctx: typer.Context, cmd_name: str) -> TyperCommand | None:  # type: ignore[override]
        return TyperCommand(cmd_name, help=VERBS[cmd_name]) if cmd_name in VERBS else None

    def resolve_command(  # type: ignore[override]
        self, ctx: typer.Context, args: list[str]
    ) -> tuple[str | None, TyperCommand | None, list[str]]:
        """Give the real command."""
        name, known, rest = super().resolve_command(ctx, args)
        return name, None if known is None or name is None else _real(name), rest


def _real(verb: str) -> TyperCommand:
    module = importlib.import_module(f"pipelines.{verb.replace('-', '_')}")
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(verb)(module.main)
    command = typer.main.get_command(app)
    assert isinstance(command, TyperCommand)
    return command


commands = typer.Typer(
    cls=Verbs,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Referring image segmentation, from data to mask.",
)


@commands.callback()
def verbs() -> None:
    """Segment what expressions refer to, from data to mask."""


def app() -> None:
    """Run the console script: expected errors are shown as their message, with exit code 1."""
    try:
        commands()
    except RISError as error:
        told = str(error)
    except ModuleNotFoundError as error:  # a verb's module imports some libraries only when it needs them
        library = (error.name or "").split(".")[0]
        if library in ("", *OURS):
            raise
        told = f"ris {sys.argv[1]} needs {library}, which is not installed here: pip install 'ris[pipelines]'"
    else:
        return
    print(f"error: {told}", file=sys.stderr)
    raise SystemExit(1)


if __name__ == "__main__":
    app()
