"""How a stage starts: its parameters read and checked, its errors shown as messages rather than tracebacks."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import typer

from pipelines import inputs, lifeline, paths
from pipelines.params import Params, dataset_name, load_params
from ris_core.config import preset_overrides
from ris_core.data.refer.reader import DatasetName
from ris_core.errors import ConfigError, RISError
from ris_core.models.registry import system_class


def params(stage: str, item: str | None = None) -> Params:
    """Give the checked parameters of this repository, of which only what DVC watches for a stage can be read.

    `item` is the system or the CLIP that it is about. Says on stderr what the chosen preset overrides. Raises ConfigError
    for a file that cannot be used, and where DVC runs the stage after the file was changed under it.
    """
    loaded = load_params(paths.PARAMS)
    for line in preset_overrides(paths.PARAMS):
        print(f"preset '{loaded.preset}' sets {line}", file=sys.stderr)
    watched = paths.watched(inputs.name(stage, item))
    if os.environ.get("DVC_STAGE") and _read(watched) != inputs.values(loaded, stage, item):
        raise ConfigError(
            f"{paths.PARAMS} was changed since the stage resolve wrote {watched}, which is what DVC watches: run "
            "`dvc repro` (or `make repro`) again"
        )
    return inputs.only_watched(loaded, stage, item)


def _read(watched: Path) -> object:
    """Read what `resolve` wrote; nothing, where that is missing or cut."""
    try:
        return json.loads(watched.read_text())
    except (OSError, ValueError):
        return None


def check_names(dataset: str, system: str | None = None) -> DatasetName:
    """Give the dataset of that name. Raises DataError or ConfigError, with the known ones, if it or the system is unknown."""
    name = dataset_name(dataset)
    if system is not None:
        system_class(system)
    return name


def _end(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


def run(main: Callable[..., None]) -> None:
    """Run a stage's `main` as a command line. An expected error ends it with exit code 1 and its message alone.

    SIGTERM ends it as Ctrl-C does, with all that it started; so does the end of a DVC that runs it.
    """
    signal.signal(signal.SIGTERM, _end)
    if os.environ.get("DVC_STAGE"):
        lifeline.hold()
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    try:
        app()
    except RISError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
