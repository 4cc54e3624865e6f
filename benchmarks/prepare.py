"""What official files cost to read and join: CPU, wall and peak memory of `prepare` by their size, without photos.

python -m benchmarks.prepare [--times 1 2 4] [--workers 2] [--record]

The files are made: RefCOCO's numbers of images, annotations, referents and sentences, polygons of its usual length.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import pickle
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.measure import Report, alone, peak_memory
from benchmarks.samples import HEIGHT, WIDTH, WORDS
from ris_core.data.records import write_records
from ris_core.data.refer.audit import prepare

DATASET = "refcoco_unc"
IMAGES, ANNOTATIONS, REFERENTS, SENTENCES = 19_994, 196_771, 50_000, 142_210
POINTS = 25  # of a polygon
GOAL_MIB = 1500


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=float, nargs="+", default=[1, 2], help="RefCOCO's size so many times over")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count(), help="processes that make masks (default: all cores)"
    )
    parser.add_argument("--record", action="store_true", help="keep the result in benchmarks/records")
    args = parser.parse_args()
    report = Report("prepare", {"workers": args.workers, "dataset": DATASET})
    first: Found | None = None
    for times in args.times:
        with tempfile.TemporaryDirectory() as name:
            alone(write_files, Path(name), times)
            found = alone(measure, Path(name), args.workers)
        report_size(report, times, found, first or found)
        first = first or found
    report.finish(args.record)


def write_files(root: Path, times: float) -> None:
    """Write `instances.json` and `refs(unc).p` as REFER has them."""
    random = np.random.default_rng(0)
    folder = root / "refcoco"
    folder.mkdir()
    images = round(IMAGES * times)
    annotations = [annotation(random, number, number % images) for number in range(round(ANNOTATIONS * times))]
    listed = [
        {"id": number, "file_name": f"COCO_train2014_{number:012d}.jpg", "height": HEIGHT, "width": WIDTH}
        for number in range(images)
    ]
    tables = {"images": listed, "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]}
    (folder / "instances.json").write_text(json.dumps(tables))
    each = SENTENCES / REFERENTS
    refs, sentence = [], 0
    for number in range(round(REFERENTS * times)):
        upto = round((number + 1) * each)
        split = ("train", "train", "train", "train", "val", "testA", "testB")[(number % images) % 7]
        refs.append(referent(random, number, number % images, split, range(sentence, upto)))
        sentence = upto
    (folder / "refs(unc).p").write_bytes(pickle.dumps(refs, protocol=0))


def annotation(random: np.random.Generator, number: int, image: int) -> dict[str, Any]:
    """An entry of `annotations` with one polygon."""
    angle = np.linspace(0, 2 * math.pi, POINTS, endpoint=False)
    radius = random.uniform(20, 100) * random.uniform(0.8, 1.2, POINTS)
    x = np.clip(random.uniform(100, WIDTH - 100) + radius * np.cos(angle), 0, WIDTH).round(2)
    y = np.clip(random.uniform(100, HEIGHT - 100) + radius * np.sin(angle), 0, HEIGHT).round(2)
    box = [float(x.min()), float(y.min()), float(np.ptp(x)), float(np.ptp(y))]
    outline = np.stack([x, y], 1).ravel().tolist()
    named = {"id": number, "image_id": image, "category_id": 1, "iscrowd": 0, "area": box[2] * box[3]}
    return {**named, "bbox": box, "segmentation": [outline]}


def referent(random: np.random.Generator, number: int, image: int, split: str, sentences: range) -> dict[str, Any]:
    """An entry of the refs: of the annotation with its own number, which is of the same image."""
    said = []
    for place in sentences:
        text = " ".join(random.choice(WORDS, 4))
        said.append({"sent_id": place, "sent": text, "raw": f"{text}.", "tokens": text.split()})
    file = f"COCO_train2014_{image:012d}_{number}.jpg"
    named = {"ref_id": number, "ann_id": number, "image_id": image, "category_id": 1, "split": split, "file_name": file}
    return {**named, "sentences": said, "sent_ids": list(sentences)}


@dataclass(frozen=True)
class Found:
    """Of a run of prepare, its processes for masks among it: CPU and wall seconds, peak in MiB of the process that drives."""

    images: int
    megabytes: float  # of the two files
    cpu: float
    wall: float
    peak: float
    imported: float


def measure(root: Path, workers: int) -> Found:
    """Read, join, audit and write."""
    imported, began = peak_memory(), time.perf_counter()
    records, _ = prepare(root, DATASET, on_bad="error", strict=False, exclude={}, check_images=False, workers=workers)
    write_records(root / "records.parquet", records, DATASET)
    times = psutil.Process().cpu_times()
    size = sum(file.stat().st_size for file in (root / "refcoco").iterdir()) / 1e6
    return Found(len(records), size, sum(times[:4]), time.perf_counter() - began, peak_memory(), imported)


def report_size(report: Report, times: float, found: Found, first: Found) -> None:
    """Beside the smallest."""
    report.add(f"RefCOCO's size {times:g} x: images", found.images, "images")
    report.add("  instances.json and refs(unc).p", found.megabytes, "MB")
    report.add("  CPU", found.cpu, "s", found.cpu / first.cpu, "the first")
    report.add("  wall", found.wall, "s", found.cpu / found.wall, "of a core busy")
    report.add("  peak memory", found.peak, "MiB", found.peak / GOAL_MIB, f"the goal of {GOAL_MIB} MiB")
    report.add("  of it an image", 1024 * (found.peak - found.imported) / found.images, "KiB")


if __name__ == "__main__":
    main()
