"""Stage `preprocess`: records -> shards, one Ray Data task per shard.

python -m pipelines.preprocess --dataset shapes
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from pipelines import inputs, parts, paths
from pipelines.stage import check_names, params, run
from ris_core import room
from ris_core.data.records import count_records, count_references, read_records
from ris_core.data.shards import MANIFEST, PreprocessParams, ShardOptions, expected_bytes, write_manifest, write_shard
from ris_core.errors import DataError, list_problems
from ris_core.options import Plain


def main(dataset: Annotated[str, typer.Option(help="a prepared dataset")]) -> None:
    """Decode and letterbox every image once and write memory-mappable Arrow shards."""
    check_names(dataset)
    chosen = params("preprocess").preprocess
    manifest = build(paths.records(dataset), paths.raw(dataset), paths.shards(dataset), dataset, chosen)
    typer.echo(f"{paths.shards(dataset)}: {manifest['images']} images in {len(manifest['shards'])} shards")


def build(records: Path, image_root: Path, out: Path, dataset: str, chosen: PreprocessParams) -> Plain:
    """Write all shards of a dataset and put them at `out`; returns the manifest.

    Raises DataError when more images are bad than `max_bad_images` allows.
    """
    count, options = count_records(records), chosen.shards()
    code = inputs.digest_of(inputs.code_of("preprocess"))
    with parts.collected(out, options, chosen.images_per_shard, code) as work:
        check_room(work, expected_bytes(count, count_references(records), options) + records.stat().st_size)
        tasks = shard_tasks(records, count, image_root, work, options, chosen.images_per_shard)
        entries = parts.run_tasks(tasks, write_one, names=photos_of)
        quarantined = [f"{bad['file_name']}: {bad['reason']}" for entry in entries for bad in entry["quarantined"]]
        if quarantined:
            print(list_problems(f"{dataset}: images left out", quarantined), file=sys.stderr)
        if len(quarantined) > chosen.max_bad_images * count:
            remedy = "Mend or fetch these files again, or raise preprocess.max_bad_images (a share of all images)."
            raise DataError(list_problems(f"{dataset}: too many bad images", quarantined, remedy))
        manifest = write_manifest(work, dataset, options, entries)
        parts.keep_only(work, [MANIFEST, *(entry["file"] for entry in entries)])
    return manifest


def check_room(work: Path, needed: int) -> None:
    """Tell what shards will take on disk; raise ConfigError where that is not free. Those that are there are counted."""
    left = needed - sum(file.stat().st_size for file in work.iterdir())
    print(
        f"shards: about {room.size(needed)}, and as much again in DVC's cache unless it can link (docs/real-data.md, Disk); "
        f"{room.size(room.free(work))} are free",
        file=sys.stderr,
    )
    room.check(work.parent, left, "preprocess", "make room, or set preprocess.storage: jpeg, an eighth of pixels")


def shard_tasks(
    records: Path, count: int, image_root: Path, out: Path, options: ShardOptions, images_per_shard: int
) -> list[Plain]:
    """List what `write_one` needs for each shard of `count` records."""
    return [
        {
            "path": str((out / f"part-{i:05d}.arrow").absolute()),
            "inputs": {"records": str(records.absolute()), "photos": str(image_root.absolute())},
            "rows": [start, min(start + images_per_shard, count)],
            "options": asdict(options),
        }
        for i, start in enumerate(range(0, count, images_per_shard))
    ]


def photos_of(task: Plain, name: str) -> list[str] | None:
    """List the photos that a task's records name, as far as they are there."""
    if name != "photos":
        return None
    root = Path(task["inputs"]["photos"])
    names = [record.file_name for record in read_records(task["inputs"]["records"], *task["rows"])]
    return [each for each in names if (root / each).is_file()]


def write_one(row: parts.Row) -> parts.Row:
    """Do one task: write the shard that it describes, reading no more than its own records."""
    task = json.loads(row["task"])
    inputs = task["inputs"]
    records = read_records(inputs["records"], *task["rows"])
    entry = write_shard(Path(task["path"]), records, Path(inputs["photos"]), ShardOptions(**task["options"]))
    return {"done": json.dumps(entry)}


if __name__ == "__main__":
    run(main)
