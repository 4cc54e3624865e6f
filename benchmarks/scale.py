"""Does memory stay flat as data grows? The embedded data once, 10 and 100 times over, down the whole road.

python -m benchmarks.scale [--times 1 10 100] [--steps 200] [--workers 2] [--record]

The pictures are not made a hundred times: their records are repeated under new ids, and all copies of a picture name the same
photo file. Every copy is decoded, letterboxed and written anew. Exits with 1 if a process needs more memory for more data
than its index of that data.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from benchmarks.measure import Report, alone, best_of
from benchmarks.memory import status, watched
from benchmarks.models import case
from benchmarks.samples import SPLIT, write_images
from pipelines import cluster
from pipelines.evaluate import Scorer, job_queries, pieces
from pipelines.paths import PARAMS
from pipelines.preprocess import build
from pipelines.transport import Place
from ris_core.config import load_params
from ris_core.data.dataset import BatchPlan, ShardStore, TrainingBatches
from ris_core.data.records import ROW_GROUP_IMAGES, write_records
from ris_core.data.refer.audit import prepare
from ris_core.data.shapes.synthetic import write_dataset
from ris_core.data.shards import PreprocessParams, ShardOptions, write_manifest, write_shard
from ris_core.models.clip import load_clip, save_clip
from ris_core.models.registry import ModelInfo, export_model
from ris_core.storage import Storage
from ris_core.training.checkpoint import Checkpoints
from ris_core.training.run import make_trainer
from ris_core.training.runtime import LocalRuntime

DATASET = "shapes"
RAW, RECORDS, SHARDS, CLIP, MODEL = "raw", "records.parquet", "shards", "clip", "model"
STORAGE = "jpeg"  # as pixels, the largest would take 14 GB
VALIDATED = 40  # images
PHOTOS, SIZES = 64, (416, 560)  # as large as the published models want them
LOADED = 50  # batches that are made without a training step
PIECES = 8  # of the evaluation
MIB = 2**20

Figures = dict[str, float]
T = TypeVar("T")

# The peaks that are held against those of the smallest scale, and what each may have more, in bytes: for its index of more
# data, and for what the allocator keeps. All else must be flat.
SLACK = 64 * MIB  # also for the 4096 rows and 128 shards that a store keeps at hand
INDEX = {"refs": 8, "shards": 1_000}  # columns, and a shard's entry in the manifest
PEAKS: dict[str, dict[str, int]] = {
    "preprocess_worker": {},
    "preprocess_driver": {"shards": 32_000},  # a task and its result
    "train": {**INDEX, "refs": 64},  # the plan of an epoch, while it is made
    "evaluate": {**INDEX, "expressions": 500},  # all that is asked
}


@dataclass(frozen=True)
class Metric:
    """A line of the report."""

    name: str
    what: str
    unit: str


METRICS = (
    Metric("images", "images", "images"),
    Metric("refs", "referents", "referents"),
    Metric("shards", "shards", "files"),
    Metric("disk", "shards on disk", "MB"),
    Metric("preprocess_s", "preprocess, wall", "s"),
    Metric("preprocess_ms", "preprocess, workers with their start", "ms CPU/image"),
    Metric("preprocess_worker", "preprocess, a worker's peak", "MiB"),
    Metric("preprocess_driver", "preprocess, the driver's peak", "MiB"),
    Metric("preprocess_store", "preprocess, object store's peak", "MiB"),
    Metric("verify_rate", "checksums verified", "MB/s"),
    Metric("open_cold_s", "opened, nothing cached", "s"),
    Metric("open_read", "  read from disk for that", "kB/shard"),
    Metric("open_s", "opened again", "s"),
    Metric("index", "index", "bytes/referent"),
    Metric("open_memory", "memory by opening", "bytes/image"),
    Metric("plan_s", "plan of an epoch", "CPU s"),
    Metric("loader_ms", "batches alone", "ms CPU/sample"),
    Metric("step_ms", "training, all of it", "ms CPU/step"),
    Metric("train", "training, the process' peak", "MiB"),
    Metric("queries_s", "evaluation, what is asked", "CPU s"),
    Metric("queries_memory", "  memory for that", "bytes/expression"),
    Metric("score_ms", "evaluation, pieces of it", "ms CPU/expression"),
    Metric("evaluate", "evaluation, an actor's peak", "MiB"),
)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, nargs="+", default=[1, 10, 100], help="how often the data is repeated")
    parser.add_argument("--steps", type=int, default=200, help="of training at each scale (default 200)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="of Ray Data (default: all cores)")
    parser.add_argument("--record", action="store_true", help="keep the result in benchmarks/records")
    args = parser.parse_args()
    report = Report("scale", {"steps": args.steps, "workers": args.workers, "storage": STORAGE})
    found: dict[int, Figures] = {}
    with tempfile.TemporaryDirectory(prefix="ris-scale-") as name:
        base = Path(name) / "base"
        alone(make_base, base)
        photos = alone(photo_rows, Path(name) / "photos")
        for times in args.times:
            found[times] = measure(base, Path(name) / str(times), times, args.steps, args.workers)
            print(f"{times} x: measured", file=sys.stderr)
    report_all(report, found)
    for (size, storage), (row, loaded) in photos.items():
        report.add(f"a row with a photo, {size} pixels as {storage}", row / 1000, "kB")
        report.add("  its share of a batch", loaded, "ms CPU/sample")
    report.finish(args.record)
    problems = not_flat(found)
    print("\n".join(problems) or "memory is flat")
    sys.exit(1 if problems else 0)


def make_base(base: Path) -> None:
    """The embedded data as the default has it, its records, and a model."""
    params = load_params(PARAMS)
    write_dataset(base / RAW, DATASET, params.synthesize, workers=os.cpu_count() or 1, progress=False)
    records, _ = prepare(base / RAW, DATASET, on_bad="error", strict=False, exclude={}, check_images=False, workers=1)
    write_records(base / RECORDS, records, DATASET)
    make_model(base)


def make_model(base: Path) -> None:
    """The small CRIS with random weights."""
    chosen = case("small")
    save_clip(load_clip(chosen.architecture), base / CLIP, chosen.architecture, {})
    info = ModelInfo(chosen.image_size, word_len=chosen.train.word_len)
    export_model(base / MODEL, chosen.system, chosen.build("cpu").state_dict(), chosen.config, base / CLIP, info)


def photo_rows(folder: Path) -> dict[tuple[int, str], tuple[float, float]]:
    """For published image sizes and both storages: bytes of a row, and milliseconds to make a sample of it, on one thread."""
    torch.set_num_threads(1)
    folder.mkdir()
    records = write_images(folder, PHOTOS)
    found = {}
    for size, storage in itertools.product(SIZES, ("pixels", "jpeg")):
        place, options = folder / f"{size}-{storage}", ShardOptions(size, storage)
        entry = write_shard(place / "part-00000.arrow", records, folder, options)
        write_manifest(place, "photos", options, [entry])
        store = ShardStore(place)
        batches = TrainingBatches(store, SPLIT, BatchPlan(8, 1, 0), lambda texts: torch.zeros(len(texts)))
        loaded = best_of({"epoch": partial(epoch, batches)}, 3)["epoch"].cpu
        bytes_of = sum(file.stat().st_size for file in place.glob("*.arrow"))
        found[size, storage] = (bytes_of / PHOTOS, 1000 * loaded / (8 * len(batches)))
    return found


def epoch(batches: TrainingBatches) -> None:
    """Make all batches of an epoch."""
    for _ in batches.loader(0):
        pass


def measure(base: Path, place: Path, times: int, steps: int, workers: int) -> Figures:
    """Walk the road with the data so many times over; what is written is removed again."""
    place.mkdir()
    repeat_records(base / RECORDS, times, place / RECORDS)
    figures: Figures = {}
    with watched() as seen:
        figures |= alone(preprocess, base, place, workers)
    peaks = {"worker": seen.worker, "driver": seen.driver, "store": seen.store}
    figures |= {f"preprocess_{name}": peak / MIB for name, peak in peaks.items()}
    figures["preprocess_ms"] = 1000 * sum(seen.workers.values()) / figures["images"]
    with watched() as seen:
        figures |= alone(train, place, steps)
    figures["train"] = seen.driver / MIB
    with watched() as seen:
        figures |= alone(evaluate, base, place)
    figures["evaluate"] = seen.driver / MIB
    shutil.rmtree(place)
    return figures


def repeat_records(source: Path, times: int, target: Path) -> None:
    """Write records so many times over: every id is a new one, every copy of a picture names the same photo file."""
    table = pq.read_table(source)
    rows = table.to_pylist()
    ids = [(row, "image_id") for row in rows]
    for row in rows:
        ids += [(instance, "ann_id") for instance in row["instances"]]
        for ref in row["refs"]:
            ids += [(ref, "ref_id"), (ref, "ann_id"), *((sentence, "sent_id") for sentence in ref["sentences"])]
    step = 1 + max(item[name] for item, name in ids)
    with pq.ParquetWriter(target, table.schema, compression="zstd") as writer:
        for _ in range(times):
            writer.write_table(pa.Table.from_pylist(rows, schema=table.schema), row_group_size=ROW_GROUP_IMAGES)
            for item, name in ids:
                item[name] += step


def preprocess(base: Path, place: Path, workers: int) -> Figures:
    """The stage itself, on a private Ray."""
    chosen = PreprocessParams(load_params(PARAMS).preprocess.image_size, STORAGE)
    with cluster.connected(num_cpus=workers):
        seconds, manifest = timed(
            lambda: build(place / RECORDS, base / RAW, place / SHARDS, DATASET, chosen), time.perf_counter
        )
    images = manifest["images"]
    return {
        "images": images,
        "refs": sum(split["refs"] for split in manifest["splits"].values()),
        "expressions": manifest["splits"]["val"]["sentences"],
        "shards": len(manifest["shards"]),
        "disk": shard_bytes(place) / 1e6,
        "preprocess_s": seconds,
    }


def train(place: Path, steps: int) -> Figures:
    """Open the shards, make batches, and train on one thread."""

    torch.set_num_threads(1)
    forget(place / SHARDS)
    anonymous, read = status(os.getpid()).anonymous, psutil.Process().io_counters().read_bytes
    cold, store = timed(lambda: ShardStore(place / SHARDS), time.perf_counter)
    opened = status(os.getpid()).anonymous - anonymous
    read = psutil.Process().io_counters().read_bytes - read
    warm, _ = timed(lambda: ShardStore(place / SHARDS), time.perf_counter)
    verified, _ = timed(store.verify, time.perf_counter)
    chosen = case("small")
    params = replace(chosen.train, epochs=1, steps_per_epoch=steps, validate_images=VALIDATED)
    runtime = LocalRuntime(Checkpoints(Storage(place / "run")), "cpu")
    trainer = make_trainer(chosen.build("cpu"), params, store, runtime)
    batches = trainer.batches
    planned, drawn = timed(lambda: batches.epoch(1))
    count = min(LOADED, len(batches))
    loaded, _ = timed(lambda: [drawn[step]["image"].shape for step in range(count)])
    trained, _ = timed(trainer.fit)
    index = sum(column.nbytes for column in (store.ref_image, store.ref_position, store.ref_split))
    samples = count * params.batch_images * params.expressions_per_image
    return {
        "verify_rate": shard_bytes(place) / verified / 1e6,
        "open_cold_s": cold,
        "open_read": read / 1000 / len(store.manifest["shards"]),
        "open_s": warm,
        "index": index / len(store.ref_image),
        "open_memory": opened / len(store),
        "plan_s": planned,
        "loader_ms": 1000 * loaded / samples,
        "step_ms": 1000 * trained / len(batches),
    }


def evaluate(base: Path, place: Path) -> Figures:
    """An evaluation's actor on pieces from all over the split val, of which it knows all that is asked."""

    torch.set_num_threads(1)
    places = {"model": Place(str(base / MODEL)), "shards": Place(str(place / SHARDS))}
    scorer = Scorer(places, expressions_per_batch=64, precision="fp32")
    job = {"job": "ours/val", "protocol": "ours", "split": "val", "seed": 0}
    anonymous = status(os.getpid()).anonymous
    listed, queries = timed(lambda: job_queries(scorer.store, job))
    anonymous = status(os.getpid()).anonymous - anonymous
    count = len(queries)
    del queries
    tasks = list(pieces(scorer.store, [job]))
    chosen = [tasks[place] for place in sorted({number * len(tasks) // PIECES for number in range(PIECES)})]
    scored, tables = timed(lambda: [scorer(pa.Table.from_pylist([piece])) for piece in chosen])
    return {
        "queries_s": listed,
        "queries_memory": anonymous / count,
        "score_ms": 1000 * scored / sum(table.num_rows for table in tables),
    }


def forget(folder: Path) -> None:
    """Have the system forget what it keeps of the files in a folder, so that they are read from disk."""
    for file in folder.iterdir():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def timed(function: Callable[[], T], clock: Callable[[], float] = time.process_time) -> tuple[float, T]:
    """Seconds that a call takes by a clock, and its result."""
    start = clock()
    result = function()
    return clock() - start, result


def shard_bytes(place: Path) -> int:
    """Size of all shards."""
    return sum(file.stat().st_size for file in (place / SHARDS).iterdir())


def report_all(report: Report, found: dict[int, Figures]) -> None:
    """A line for each metric and scale; peaks beside those of the smallest scale."""
    least = min(found)
    for metric in METRICS:
        for times, figures in found.items():
            value, first = figures[metric.name], found[least][metric.name]
            beside = (value / first, f"{least} x") if metric.name in PEAKS and times != least else (None, "")
            report.add(f"{metric.what}, {times} x", value, metric.unit, *beside)


def not_flat(found: dict[int, Figures]) -> list[str]:
    """Say which peaks (`PEAKS`) are more above those of the smallest scale than they may be."""
    least, problems = min(found), []
    for times, figures in found.items():
        more = {name: value - found[least][name] for name, value in figures.items()}
        for name, bytes_of in PEAKS.items():
            allowed = (SLACK + sum(each * more[what] for what, each in bytes_of.items())) / MIB
            if more[name] > allowed:
                problems.append(
                    f"{name} at {times} x: {more[name]:.0f} MiB more than at {least} x, allowed {allowed:.0f}"
                )
    return problems


if __name__ == "__main__":
    main()
