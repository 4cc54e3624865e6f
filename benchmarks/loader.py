"""What a training batch costs a CPU, beside a copy of its bytes or the decoding of its JPEGs, and what more threads bring.

python -m benchmarks.loader [--images 256] [--size 416] [--threads 2] [--record]
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.measure import Report, Timing, alone, best_of
from benchmarks.samples import SPLIT, write_images
from ris_core.data import masks
from ris_core.data.dataset import BatchPlan, ShardStore, TrainingBatches
from ris_core.data.letterbox import letterbox_mask
from ris_core.data.shards import ShardOptions, write_manifest, write_shard
from ris_core.data.text import tokenize

GOALS = {"pixels": 0.5, "jpeg": 2.2}  # ms of CPU an image, at 416 pixels
BATCH, WORD_LEN, STRIDE = 8, 17, 4
SHARD_IMAGES = 128
ROUNDS = 3
EPOCHS = 4


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=256, help="different photos (default 256)")
    parser.add_argument("--size", type=int, default=416, help="side of the letterbox (default 416)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="most loader threads (default: all cores)")
    parser.add_argument("--record", action="store_true", help="keep the result in benchmarks/records")
    args = parser.parse_args()
    report = Report("loader", {"images": args.images, "size": args.size, "batch": BATCH})
    with tempfile.TemporaryDirectory() as name:
        for storage, goal in GOALS.items():
            folder = Path(name) / storage
            alone(write, folder, args.images, ShardOptions(args.size, storage))
            one = alone(in_one_process, folder)
            report_one(report, storage, goal, one)
            counts = range(1, args.threads + 1)
            report_several(report, {count: alone(with_threads, folder, count) for count in counts})
    report.finish(args.record)


def write(folder: Path, images: int, options: ShardOptions) -> None:
    """A store of several shards."""
    photos = folder / "photos"
    photos.mkdir(parents=True)
    records = write_images(photos, images)
    entries = [
        write_shard(folder / f"part-{first:05d}.arrow", records[first : first + SHARD_IMAGES], photos, options)
        for first in range(0, images, SHARD_IMAGES)
    ]
    write_manifest(folder, "benchmark", options, entries)


def batches_of(store: ShardStore) -> TrainingBatches:
    """A batch is as CRIS has it: an expression of each image."""
    return TrainingBatches(store, SPLIT, BatchPlan(BATCH, 1, 0), tokens_of, STRIDE)


def tokens_of(texts: Any) -> torch.Tensor:
    """CLIP's byte pairs."""
    return torch.from_numpy(tokenize(texts, WORD_LEN))


@dataclass(frozen=True)
class One:
    """CPU seconds of an epoch of `images` in one process, of its floors, and of what shards spare it."""

    images: int
    timings: dict[str, Timing]


def in_one_process(folder: Path) -> One:
    """An epoch of batches; its bytes copied, or its JPEGs decoded; its targets made of the exact masks, as they once were."""
    torch.set_num_threads(1)
    store = ShardStore(folder)
    batches = batches_of(store)
    images = len(batches) * BATCH
    refs = batches.epoch(0).groups[:images, 0].tolist()
    places = [int(store.ref_image[ref]) for ref in refs]

    def floor() -> None:
        room = np.empty((BATCH, store.image_size, store.image_size, 3), np.uint8)
        for number, place in enumerate(places):
            room[number % BATCH] = store.pixels(place)

    def targets() -> None:
        for ref, place in zip(refs, places, strict=True):
            row = store._row(place)
            ann_id = row["refs"][store.ref_position[ref]]["ann_id"]
            counts = next(item["counts"] for item in row["instances"] if item["ann_id"] == ann_id)
            mask = masks.decode(counts, row["height"], row["width"])
            letterbox_mask(mask, store.image_size, STRIDE, store.resample)

    functions: dict[str, Callable[[], object]] = {
        "epoch": lambda: [batch["image"].shape for batch in batches.loader(0)],
        "floor": floor,
        "targets": targets,
        "tokens": partial(tokens_of, ["the second man in the red shirt on the left"] * images),
    }
    return One(images, best_of(functions, ROUNDS))


def report_one(report: Report, storage: str, goal: float, found: One) -> None:
    """Milliseconds an image."""
    ms = {name: 1000 * timing.cpu / found.images for name, timing in found.timings.items()}
    what = "a copy of the pixels" if storage == "pixels" else "decoding and a copy of the pixels"
    unit = "ms CPU/image"
    report.add(f"{storage} shards: a training item", ms["epoch"], unit, ms["epoch"] / goal, f"the goal of {goal} ms")
    report.add(f"  floor: {what}", ms["floor"], unit, ms["floor"] / ms["epoch"], "that")
    report.add("  of it tokens", ms["tokens"], unit, ms["tokens"] / ms["epoch"], "that")
    report.add("  spared: targets of the exact masks", ms["targets"], unit, ms["targets"] / ms["epoch"], "that")


@dataclass(frozen=True)
class Several:
    """Of several epochs with threads that make batches ahead: images a second, and CPU of the process an image."""

    rate: float
    cpu_ms: float


def with_threads(folder: Path, threads: int) -> Several:
    """Batches that are received as the training loop receives them, and dropped."""
    torch.set_num_threads(1)
    batches = batches_of(ShardStore(folder))
    for _ in batches.loader(0):  # what is read and imported once
        pass
    images, wall, cpu = 0, 0.0, 0.0
    for epoch in range(EPOCHS):
        began, spent = time.perf_counter(), time.process_time()
        images += sum(len(batch["image"]) for batch in batches.loader(epoch, threads=threads))
        wall += time.perf_counter() - began
        cpu += time.process_time() - spent
    return Several(images / wall, 1000 * cpu / images)


def report_several(report: Report, found: dict[int, Several]) -> None:
    """Images a second by number of threads."""
    for threads, each in found.items():
        ratio = each.rate / (threads * found[1].rate)
        report.add(f"  by loader threads: {threads}", each.rate, "images/s wall", ratio, f"{threads} x one")
        report.add("    CPU of all of them", each.cpu_ms, "ms/image")


if __name__ == "__main__":
    main()
