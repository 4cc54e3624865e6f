"""Stage `propose`: masks that may be meant, for systems that choose among proposals; one Ray Data task per shard.

python -m pipelines.propose --dataset shapes
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipelines import cluster, files, fingerprint, paths
from pipelines.stage import run

if TYPE_CHECKING:
    from ris_core.config import Params

IMAGES_PER_PART = 64  # some seconds of work each, so that workers stay evenly busy and little is lost with one


def main(dataset: Annotated[str, typer.Option(help="a preprocessed dataset")]) -> None:
    """Make the proposals of every image of the evaluated splits, once for all systems."""
    from pipelines.stage import check_names, params

    check_names(dataset)
    chosen = params()
    manifest, counts = build(dataset, chosen)
    files.write_json(paths.proposal_scores(dataset), summary(manifest, counts))
    typer.echo(f"{paths.proposals(dataset)}: {manifest['proposals']} proposals of {manifest['images']} images")


def build(dataset: str, params: Params) -> tuple[dict[str, Any], dict[str, list[int]]]:
    """Make all proposals of a dataset and put them at their place; the manifest, and the counts per image by split.

    Parts are collected beside it under a name that says how they are made and of which shards, so that a run that was
    stopped goes on with the parts it had finished. Raises DataError for an unknown split, and what `proposer` raises.
    """
    from ris_core.config import digest
    from ris_core.data.dataset import ShardStore
    from ris_core.data.proposal_store import MANIFEST, part_counts, write_manifest
    from ris_core.models.systems import trains

    store = ShardStore(paths.shards(dataset))
    options = asdict(params.proposals)
    wanted = options.pop("splits")
    if all(trains(system) for system in params.systems):
        print(f"none of {', '.join(params.systems)} chooses among proposals: none are made", file=sys.stderr)
        wanted = []
    elif wanted is None:
        wanted = [split for split in store.manifest["splits"] if split != "train"]
    images = {split: store.images_of(split).tolist() for split in wanted}
    out = paths.proposals(dataset)
    shards = fingerprint.file_digest(paths.shards(dataset) / "manifest.json")
    inputs = [options, wanted, shards, IMAGES_PER_PART, fingerprint.code_version()]
    work = out.with_name(f"{out.name}.partial-{digest(inputs)}")
    work.mkdir(parents=True, exist_ok=True)
    names = run_tasks(tasks(dataset, sorted({i for some in images.values() for i in some}), options, work), params)
    made: dict[int, int] = {}
    for name in names:
        made |= part_counts(work / name)
    ours = {row: store.row(row)["image_id"] for some in images.values() for row in some}
    counts = {split: [made[ours[row]] for row in some] for split, some in images.items()}
    manifest = {
        "dataset": dataset,
        "splits": wanted,
        "options": options,
        "data_digest": shards,
        "images": len(made),
        "proposals": sum(made.values()),
        "parts": names,
    }
    write_manifest(work, manifest)
    for stale in [path for path in work.iterdir() if path.name not in {MANIFEST, *names}]:
        stale.unlink()  # half a part, of a run that was stopped
    shutil.rmtree(out, ignore_errors=True)
    os.replace(work, out)
    return manifest, counts


def tasks(dataset: str, images: list[int], options: dict[str, Any], out: Path) -> list[dict[str, str]]:
    """What `write_one` needs for each part, as rows {"task": JSON text}; see `preprocess.shard_tasks`."""
    common = {
        "shards": str(paths.shards(dataset).absolute()),
        "photos": str(paths.raw(dataset).absolute()),
        "options": options,
    }
    starts = range(0, len(images), IMAGES_PER_PART)
    return [
        {
            "task": json.dumps(
                {
                    **common,
                    "path": str((out / f"part-{number:05d}.parquet").absolute()),
                    "images": images[start : start + IMAGES_PER_PART],
                }
            )
        }
        for number, start in enumerate(starts)
    ]


def write_one(row: dict[str, str]) -> dict[str, str]:
    """One task: write the part that the JSON text `row["task"]` describes, unless it is there already."""
    import torch

    from ris_core.data.dataset import ShardStore
    from ris_core.data.proposal_store import write_part
    from ris_core.data.shards import load_image
    from ris_core.models.proposals import proposal_options, proposer

    task = json.loads(row["task"])
    path = Path(task["path"])
    if not path.exists():  # the folder's name stands for everything that decides a part's content
        store, options = ShardStore(task["shards"]), proposal_options(task["options"])
        propose = proposer(options, "cuda" if torch.cuda.is_available() else "cpu")
        rows, photos = [store.row(image) for image in task["images"]], Path(task["photos"])
        write_part(path, [(each["image_id"], propose(load_image(photos / each["file_name"]))) for each in rows])
    return {"name": path.name}


def run_tasks(wanted: list[dict[str, str]], params: Params) -> list[str]:
    """`write_one` over all tasks by Ray Data; the parts' names, sorted. SAM takes a GPU for each task where there is one."""
    from ris_core.models.proposals import proposer

    if not wanted:
        return []
    proposer(params.proposals)  # what is missing is told here, not by a worker
    with cluster.connected():
        use_gpu = params.proposals.generator == "sam" and cluster.has_gpu(params.cluster.use_gpu)
        rows = cluster.data().from_items(wanted, override_num_blocks=len(wanted))
        return sorted(row["name"] for row in rows.map(write_one, num_gpus=1 if use_gpu else None).take_all())


def summary(manifest: dict[str, Any], counts: dict[str, list[int]]) -> dict[str, Any]:
    """How many proposals there are, by split; how good they are is scored with the system that chooses among them."""
    return {
        "generator": manifest["options"]["generator"],
        **{
            split: {
                "images": len(some),
                "proposals_per_image": round(sum(some) / max(1, len(some)), 2),
                "images_without": some.count(0),
            }
            for split, some in counts.items()
        },
    }


if __name__ == "__main__":
    run(main)
