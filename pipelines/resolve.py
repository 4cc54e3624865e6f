"""Stage `resolve`: the values that decide each stage's result, merged from params.yaml, its preset and the defaults in code.

python -m pipelines.resolve

A small file for each stage (and system, or CLIP), so that DVC reruns a stage when a value that it reads has changed,
wherever that was written, and only then.
"""

from __future__ import annotations

import typer

from pipelines import inputs, paths
from pipelines.params import load_params
from pipelines.stage import run
from ris_core import files


def main() -> None:
    """Write the values that every stage reads, merged from params.yaml, its preset and the defaults."""
    params = load_params(paths.PARAMS)
    with files.replaced_folder(paths.WATCHED) as folder:
        for stage, item in inputs.names(params):
            files.write_json(folder / paths.watched(inputs.name(stage, item)).name, inputs.values(params, stage, item))
    typer.echo(f"{paths.WATCHED}: {len(list(paths.WATCHED.iterdir()))} files")


if __name__ == "__main__":
    run(main)
