"""Stage `synthesize`: write an embedded dataset in the official REFER files.

python -m pipelines.synthesize --dataset shapes
"""

from __future__ import annotations

import os
from typing import Annotated

import typer

from pipelines import paths
from pipelines.stage import params, run
from ris_core.data.shapes.synthetic import write_dataset


def main(dataset: Annotated[str, typer.Option(help="shapes, shapes+, shapesg or shapes*")]) -> None:
    """Write a synthetic dataset in exactly the official RefCOCO files."""
    spec = params("synthesize").synthesize
    counts = write_dataset(paths.raw(dataset), dataset, spec, workers=os.cpu_count() or 1)
    typer.echo(f"{paths.raw(dataset)}: {counts}")


if __name__ == "__main__":
    run(main)
