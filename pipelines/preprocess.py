"""Stage `preprocess`: records -> shards, one Ray Data task per shard.

python -m pipelines.preprocess --dataset shapes
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from pipelines import cluster, paths
from pipelines.stage import run

if TYPE_CHECKING:
    from ris_core.config import PreprocessParams
    from ris_core.data.letterbox import Mode


def main(dataset: Annotated[str, typer.Option(help="a prepared dataset")]) -> None:
    """Decode and letterbox every image once and write memory-mappable Arrow shards."""
    from pipelines.stage import params

    manifest = build(paths.records(dataset), paths.raw(dataset), paths.shards(dataset), dataset, params().preprocess)
    typer.echo(f"{paths.shards(dataset)}: {manifest['images']} images in {len(manifest['shards'])} shards")


def build(records_path: Path, image_root: Path, out: Path, dataset: str, params: PreprocessParams) -> dict[str, Any]:
    """Write all shards of a dataset and put them at `out`; returns the manifest.

    Shards are collected in `<out>.partial-<options>`, so that a run that was stopped goes on with the shards it had
    finished (DVC empties `out` itself before each run). Raises DataError when more images are bad than
    `max_bad_images` allows.
    """
    from ris_core.config import digest
    from ris_core.data.records import read_records
    from ris_core.data.shards import ShardOptions, write_manifest
    from ris_core.errors import DataError, list_problems

    records = read_records(records_path)
    options = ShardOptions(params.image_size, params.storage, cast("Mode", params.resample), params.text)
    work = out.with_name(f"{out.name}.partial-{digest([options, params.images_per_shard])}")
    work.mkdir(parents=True, exist_ok=True)
    size = params.images_per_shard
    tasks = [
        {
            "path": str((work / f"part-{i:05d}.arrow").absolute()),
            "records": str(records_path.absolute()),
            "rows": [start, min(start + size, len(records))],
            "image_root": str(image_root.absolute()),
            "options": vars(options),
        }
        for i, start in enumerate(range(0, len(records), size))
    ]
    entries = run_tasks(tasks)
    quarantined = [f"{bad['file_name']}: {bad['reason']}" for entry in entries for bad in entry["quarantined"]]
    if quarantined:
        print(list_problems(f"{dataset}: images left out", quarantined), file=sys.stderr)
    if len(quarantined) > params.max_bad_images * len(records):
        remedy = "Mend or fetch these files again, or raise preprocess.max_bad_images (a share of all images)."
        raise DataError(list_problems(f"{dataset}: too many bad images", quarantined, remedy))
    manifest = write_manifest(work, dataset, options, entries)
    shutil.rmtree(out, ignore_errors=True)
    os.replace(work, out)
    return manifest


def run_tasks(tasks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`write_one` over all tasks by Ray Data: each task writes its own file and returns its manifest entry."""
    with cluster.connected():
        import ray.data

        ray.data.DataContext.get_current().enable_progress_bars = sys.stderr.isatty()
        # Entries travel as JSON texts: their nested quarantine lists would get a different Arrow type in each block.
        rows = ray.data.from_items([{"task": task} for task in _as_json(tasks)], override_num_blocks=len(tasks))
        import json

        return [json.loads(row["entry"]) for row in rows.map(write_one).take_all()]


def _as_json(tasks: list[dict[str, Any]]) -> list[str]:
    import json

    return [json.dumps(task) for task in tasks]


def write_one(row: dict[str, str]) -> dict[str, str]:
    """One Ray task: write the shard that the JSON text `row["task"]` describes."""
    import json

    from ris_core.data.records import read_records
    from ris_core.data.shards import ShardOptions, write_shard

    task = json.loads(row["task"])
    first, last = task["rows"]
    records = read_records(Path(task["records"]))[first:last]
    entry = write_shard(Path(task["path"]), records, Path(task["image_root"]), ShardOptions(**task["options"]))
    return {"entry": json.dumps(entry)}


if __name__ == "__main__":
    run(main)
