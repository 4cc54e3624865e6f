"""Stage `propose`: masks that may be meant, for systems that choose among proposals; one Ray Data task per part.

python -m pipelines.propose --dataset shapes
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from pipelines import inputs, parts, paths
from pipelines.params import Params
from pipelines.stage import check_names, params, run
from ris_core import files
from ris_core.data.dataset import ShardStore
from ris_core.data.images import load_image
from ris_core.data.proposal_store import MANIFEST, part_counts, write_manifest, write_part
from ris_core.device import best_device
from ris_core.models.proposals import proposal_options, proposer
from ris_core.options import Plain, deciding

IMAGES_PER_PART = 64  # some seconds of work each, so that workers stay evenly busy and little is lost with one


def main(dataset: Annotated[str, typer.Option(help="a preprocessed dataset")]) -> None:
    """Make the proposals of every image of the evaluated splits, once for all systems."""
    check_names(dataset)
    chosen = params("propose")
    manifest, counts = build(dataset, chosen)
    found = summary(manifest, counts, chosen.proposals.max_count)
    files.write_json(paths.proposal_scores(dataset), found)
    tell_capped(found, chosen.proposals.generator, chosen.proposals.max_count)
    typer.echo(f"{paths.proposals(dataset)}: {manifest['proposals']} proposals of {manifest['images']} images")


def build(dataset: str, chosen: Params) -> tuple[Plain, dict[str, list[int]]]:
    """Make all proposals of a dataset and put them at their place; the manifest, and the counts per image by split.

    Raises DataError for an unknown split, and what `proposer` raises.
    """
    store = ShardStore(paths.shards(dataset))
    options, wanted = chosen.proposals.options(), chosen.proposals.splits
    if inputs.values(chosen, "propose")["proposals"] is None:
        print(f"none of {', '.join(chosen.systems)} chooses among proposals: none are made", file=sys.stderr)
        wanted = []
    elif wanted is None:
        wanted = [split for split in store.manifest["splits"] if split != "train"]
    if wanted:
        proposer(options)  # what is missing is told here, not by a worker
    images = {split: store.images_of(split).tolist() for split in wanted}
    shards = files.file_sha256(paths.shards(dataset) / "manifest.json")
    code = inputs.digest_of(inputs.code_of("propose"))
    with parts.collected(paths.proposals(dataset), options, wanted, shards, IMAGES_PER_PART, code) as work:
        every = sorted({i for some in images.values() for i in some})
        use_gpu = chosen.cluster.use_gpu if options.generator == "sam" else "no"
        done = parts.run_tasks(
            tasks(dataset, every, deciding(options), work), write_one, use_gpu, names=partial(photos_of, store)
        )
        names = sorted(part["name"] for part in done)
        made: dict[int, int] = {}
        for name in names:
            made |= part_counts(work / name)
        ours = {row: store.row(row)["image_id"] for some in images.values() for row in some}
        counts = {split: [made[ours[row]] for row in some] for split, some in images.items()}
        manifest = {
            "dataset": dataset,
            "splits": wanted,
            "options": deciding(options),
            "data_digest": shards,
            "images": len(made),
            "proposals": sum(made.values()),
            "parts": names,
        }
        write_manifest(work, manifest)
        parts.keep_only(work, [MANIFEST, *names])
    return manifest, counts


def tasks(dataset: str, images: list[int], options: Plain, out: Path) -> list[Plain]:
    """List what `write_one` needs for each part."""
    inputs = {"shards": paths.shards(dataset), "photos": paths.raw(dataset)}
    if options["sam_weights"] is not None:
        inputs["sam_weights"] = Path(options["sam_weights"])
    common = {"inputs": {name: str(place.absolute()) for name, place in inputs.items()}, "options": options}
    return [
        {
            **common,
            "path": str((out / f"part-{number:05d}.parquet").absolute()),
            "images": images[start : start + IMAGES_PER_PART],
        }
        for number, start in enumerate(range(0, len(images), IMAGES_PER_PART))
    ]


def photos_of(store: ShardStore, task: Plain, name: str) -> list[str] | None:
    """List the photos that a task looks at."""
    return [store.row(image)["file_name"] for image in task["images"]] if name == "photos" else None


def write_one(row: parts.Row) -> parts.Row:
    """Do one task: write the part that it describes, unless it is there already."""
    task = json.loads(row["task"])
    path = Path(task["path"])
    if not path.exists():  # the folder's name stands for everything that decides a part's content
        inputs, options = task["inputs"], task["options"]
        store, photos = ShardStore(inputs["shards"]), Path(inputs["photos"])
        options["sam_weights"] = inputs.get("sam_weights")
        propose = proposer(proposal_options(options), best_device())
        rows = [store.row(image) for image in task["images"]]
        write_part(path, [(each["image_id"], propose(load_image(photos / each["file_name"]))) for each in rows])
    return {"done": json.dumps({"name": path.name})}


def tell_capped(found: Plain, generator: str, most: int) -> None:
    """Warn where images have as many proposals as they may: there, smaller ones are left out."""
    capped = {
        split: part["images_capped"] for split, part in found.items() if split != "generator" if part["images_capped"]
    }
    if capped:
        told = ", ".join(f"{count} of {found[split]['images']} images of {split}" for split, count in capped.items())
        print(
            f"WARNING: {told} have as many proposals as proposals.{generator}.max_count allows ({most}): the smallest are left "
            "out. Raise it if small objects matter; encoding takes time in proportion",
            file=sys.stderr,
        )


def summary(manifest: Plain, counts: dict[str, list[int]], most: int) -> Plain:
    """Count the proposals by split; how good they are is scored with the system that chooses among them.

    most: how many an image may have.
    """
    return {
        "generator": manifest["options"]["generator"],
        **{
            split: {
                "images": len(some),
                "proposals_per_image": round(sum(some) / max(1, len(some)), 2),
                "images_without": some.count(0),
                "images_capped": some.count(most),
            }
            for split, some in counts.items()
        },
    }


if __name__ == "__main__":
    run(main)
