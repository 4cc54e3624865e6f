"""`ris export-checkpoint`: a CRIS model folder becomes a file that the official code loads."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Annotated

import torch
import typer

from pipelines import official, places
from pipelines.predict import model_folder
from ris_core.errors import ConfigError
from ris_core.files import replaced_file


def main(
    model: Annotated[str, typer.Argument(help="a folder of CRIS, or models:/name@alias or runs:/id/name")],
    out: Annotated[Path, typer.Option(help="the file to write, best_model.pth say")],
) -> None:
    """Write a CRIS model as the official code's checkpoints are written."""
    if problem := places.problem_of_new(out):
        raise ConfigError(f"--out {out} {problem}")
    cris, info = official.read_folder(model_folder(model))
    content = official.checkpoint_of(cris.official_state_dict(), info)
    buffer = io.BytesIO()
    torch.save(content, buffer)  # to a file it would tell nothing of a disk that is full
    with places.written(out), replaced_file(out) as temporary:
        temporary.write_bytes(buffer.getbuffer())
    typer.echo(
        f"{out}: {len(content['state_dict'])} tensors for the official test.py (no optimiser: no training goes on)"
    )
    told = ", ".join(f"{name}: {value}" for name, value in official.recipe(cris, info).items())
    typer.echo(f"its config there, section TRAIN: {told}")


if __name__ == "__main__":
    from pipelines.stage import run

    run(main)
