"""How a stage starts: its parameters read and checked, its errors shown as messages rather than tracebacks."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import typer

from pipelines import paths

if TYPE_CHECKING:
    from ris_core.config import Params
    from ris_core.data.refer import DatasetName


def params() -> Params:
    """The checked parameters of this repository; says on stderr what the chosen preset overrides."""
    from ris_core.config import load_params, preset_overrides

    loaded = load_params(paths.PARAMS)
    for line in preset_overrides(paths.PARAMS):
        print(f"preset '{loaded.preset}' sets {line}", file=sys.stderr)
    return loaded


def check_names(dataset: str, system: str | None = None) -> DatasetName:
    """The dataset of that name. Raises DataError or ConfigError, with the known ones, if it or the system is unknown."""
    from ris_core.data.refer import DatasetName

    name = DatasetName.parse(dataset)
    if system is not None:
        from ris_core.models.systems import system_class

        system_class(system)
    return name


def run(main: Callable[..., Any]) -> None:
    """Run a stage's `main` as a command line. An expected error ends it with exit code 1 and its message alone."""
    from ris_core.errors import RISError

    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    try:
        app()
    except RISError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
