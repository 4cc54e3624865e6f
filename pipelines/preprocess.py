"""Stage `preprocess`: records -> shards, one Ray Data task per shard.

python -m pipelines.preprocess --dataset shapes
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from pipelines import cluster, paths
from pipelines.stage import run

if TYPE_CHECKING:
    from ris_core.config import PreprocessParams
    from ris_core.data.letterbox import Mode
    from ris_core.data.shards import ShardOptions


def main(dataset: Annotated[str, typer.Option(help="a prepared dataset")]) -> None:
    """Decode and letterbox every image once and write memory-mappable Arrow shards."""
    from pipelines.stage import check_names, params

    check_names(dataset)
    manifest = build(paths.records(dataset), paths.raw(dataset), paths.shards(dataset), dataset, params().preprocess)
    typer.echo(f"{paths.shards(dataset)}: {manifest['images']} images in {len(manifest['shards'])} shards")


def build(records_path: Path, image_root: Path, out: Path, dataset: str, params: PreprocessParams) -> dict[str, Any]:
    """Write all shards of a dataset and put them at `out`; returns the manifest.

    Shards are collected in `<out>.partial-<options>`, so that a run that was stopped goes on with the shards it had
    finished (DVC empties `out` itself before each run). Raises DataError when more images are bad than
    `max_bad_images` allows.
    """
    from ris_core.config import digest
    from ris_core.data.records import count_records
    from ris_core.data.shards import MANIFEST, ShardOptions, write_manifest
    from ris_core.errors import DataError, list_problems

    count = count_records(records_path)
    options = ShardOptions(params.image_size, params.storage, cast("Mode", params.resample), params.text)
    work = out.with_name(f"{out.name}.partial-{digest([options, params.images_per_shard])}")
    work.mkdir(parents=True, exist_ok=True)
    entries = run_tasks(shard_tasks(records_path, count, image_root, work, options, params.images_per_shard))
    quarantined = [f"{bad['file_name']}: {bad['reason']}" for entry in entries for bad in entry["quarantined"]]
    if quarantined:
        print(list_problems(f"{dataset}: images left out", quarantined), file=sys.stderr)
    if len(quarantined) > params.max_bad_images * count:
        remedy = "Mend or fetch these files again, or raise preprocess.max_bad_images (a share of all images)."
        raise DataError(list_problems(f"{dataset}: too many bad images", quarantined, remedy))
    manifest = write_manifest(work, dataset, options, entries)
    ours = {MANIFEST, *(entry["file"] for entry in entries)}
    for stale in [path for path in work.iterdir() if path.name not in ours]:
        stale.unlink()  # of a run that was stopped, on other records
    shutil.rmtree(out, ignore_errors=True)
    os.replace(work, out)
    return manifest


def shard_tasks(
    records: Path, count: int, image_root: Path, out: Path, options: ShardOptions, images_per_shard: int
) -> list[dict[str, str]]:
    """What `write_one` needs for each shard of `count` records, as rows {"task": JSON text}.

    JSON, because Ray Data would turn nested values into Arrow columns, whose types differ from block to block.
    """
    return [
        {
            "task": json.dumps(
                {
                    "path": str((out / f"part-{i:05d}.arrow").absolute()),
                    "records": str(records.absolute()),
                    "rows": [start, min(start + images_per_shard, count)],
                    "image_root": str(image_root.absolute()),
                    "options": vars(options),
                }
            )
        }
        for i, start in enumerate(range(0, count, images_per_shard))
    ]


def write_one(row: dict[str, str]) -> dict[str, str]:
    """One task: write the shard that the JSON text `row["task"]` describes, reading no more than its own records."""
    from ris_core.data.records import read_records
    from ris_core.data.shards import ShardOptions, write_shard

    task = json.loads(row["task"])
    records = read_records(task["records"], *task["rows"])
    entry = write_shard(Path(task["path"]), records, Path(task["image_root"]), ShardOptions(**task["options"]))
    return {"entry": json.dumps(entry)}


def run_tasks(
    tasks: list[dict[str, str]], write: Callable[[dict[str, str]], dict[str, str]] = write_one
) -> list[dict[str, Any]]:
    """`write` over all tasks by Ray Data: each task writes its own file and returns its manifest entry."""
    with cluster.connected():
        rows = cluster.data().from_items(tasks, override_num_blocks=len(tasks))
        return [json.loads(row["entry"]) for row in rows.map(write).take_all()]


if __name__ == "__main__":
    run(main)
