"""How fast photos become shards: against the decode + resize floor, and Ray Data against a plain process pool.

python -m benchmarks.preprocess [--images 256] [--workers 2] [--record]
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil
import torch
from PIL import Image

from benchmarks.measure import Report, alone, best_of, peak_memory
from benchmarks.samples import HEIGHT, WIDTH, write_images
from pipelines import cluster, parts
from pipelines.preprocess import shard_tasks, write_one
from ris_core.data.images import load_image
from ris_core.data.letterbox import letterbox_image
from ris_core.data.records import read_records, write_records
from ris_core.data.shards import ShardOptions, write_shard
from ris_core.options import Plain

RECORDS = "records.parquet"
SHARD_IMAGES = 32
WARM_RUNS = 2
PASSES = 4  # over the photos in each parallel run, so that it takes seconds
ROUNDS = 4
TARGET = 0.85  # though it makes training targets too, which a usual loader does in every epoch


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=256, help="different photos (default 256)")
    parser.add_argument("--size", type=int, default=416, help="side of the letterbox (default 416)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="parallel processes (default: all cores)")
    parser.add_argument("--record", action="store_true", help="keep the result in benchmarks/records")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size_kb = alone(prepare, folder, args.images)
        settings = {"images": args.images, "jpeg_kb": size_kb, "size": args.size, "workers": args.workers}
        report = Report("preprocess", settings)
        single = alone(one_process, folder, args.images, args.size)
        report_one_process(report, single, args.images)
        tasks = partial(new_tasks, folder, args.images, args.size)
        pool, ray = with_pool(tasks, args.workers), with_ray(tasks, args.workers)
        if pool.checksums != ray.checksums:
            raise RuntimeError("Ray Data and the process pool wrote different shards")
        report_parallel(report, pool, ray, args.workers, single["write_shard"] / args.images)
        report.finish(args.record)


def prepare(folder: Path, images: int) -> float:
    """Write photos and their records file; returns the mean size of a photo in kB."""
    write_records(folder / RECORDS, write_images(folder, images), "benchmark")
    return sum(path.stat().st_size for path in folder.glob("*.jpg")) / images / 1000


def one_process(folder: Path, images: int, size: int) -> dict[str, float]:
    """CPU seconds for all images of the floor, of `write_shard` and of its parts, one thread; peak memory in MiB."""
    torch.set_num_threads(1)
    records = read_records(folder / RECORDS)
    files = [folder / record.file_name for record in records]
    scale = min(size / WIDTH, size / HEIGHT)
    resized = (round(WIDTH * scale), round(HEIGHT * scale))
    number, pixels = itertools.count(), os.urandom(3 * size * size)

    def floor() -> None:
        for file in files:
            with Image.open(file) as image:
                image.convert("RGB").resize(resized, Image.Resampling.BICUBIC)

    def write() -> None:
        write_shard(folder / f"single-{next(number)}.arrow", records, folder, ShardOptions(size))

    def write_bytes() -> None:
        with (folder / f"single-{next(number)}.bytes").open("wb") as out:
            for _ in files:
                out.write(pixels)

    functions: dict[str, Callable[[], object]] = {
        "floor": floor,
        "write_shard": write,
        "decode": lambda: [load_image(file).size for file in files],
        "decode_and_letterbox": lambda: [letterbox_image(load_image(file), size).size for file in files],
        "file": write_bytes,
    }
    imported = peak_memory()
    seconds = {name: timing.cpu for name, timing in best_of(functions, ROUNDS).items()}
    return {**seconds, "imported": imported, "peak": peak_memory()}


def report_one_process(report: Report, found: dict[str, float], images: int) -> None:
    """The rate against the floor, and where the time of an image goes."""
    rates = {name: images / found[name] for name in ("floor", "write_shard")}
    report.add("floor: decode + PIL bicubic resize", rates["floor"], "images/s/core")
    ratio = rates["write_shard"] / rates["floor"]
    report.add("write_shard", rates["write_shard"], "images/s/core", ratio, f"the floor (target {TARGET})")
    spent = {
        "decode": found["decode"],
        "letterbox": found["decode_and_letterbox"] - found["decode"],
        "file (as many bytes alone)": found["file"],
    }
    spent["Arrow, checksum"] = found["write_shard"] - sum(spent.values())
    for name, seconds in spent.items():
        share = seconds / found["write_shard"]
        report.add(f"  {name}", 1000 * seconds / images, "ms CPU/image", share, "write_shard")
    report.add(
        "peak memory, one shard of all images", found["peak"], "MiB", found["imported"] / found["peak"], "imports"
    )


@dataclass(frozen=True)
class Run:
    """A parallel run: wall seconds from nothing and with workers ready, and what the workers said of themselves."""

    images: int
    cold: float
    warm: float  # the best of several
    started: float  # wall seconds of `cold` until the pool or cluster could take tasks
    cpu: float  # CPU seconds of all workers in the warm run
    worker_peak: float  # MiB
    driver_peak: float  # MiB
    around: float  # MiB of all other processes of this run, shared pages divided among those that share them
    checksums: list[str]


def new_tasks(folder: Path, images: int, size: int) -> list[Plain]:
    """The tasks of one run; what an earlier run wrote is removed, so that no shard is there already."""
    out = folder / "parallel"
    shutil.rmtree(out, ignore_errors=True)
    found: list[Plain] = []
    for number in range(PASSES):
        (out / str(number)).mkdir(parents=True)
        found += shard_tasks(folder / RECORDS, images, folder, out / str(number), ShardOptions(size), SHARD_IMAGES)
    return found


def with_pool(tasks: Callable[[], list[Plain]], workers: int) -> Run:
    """`write_one` in a process pool of the standard library, its processes as fresh as Ray's."""
    start = time.perf_counter()
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=spawn, initializer=use_one_thread) as pool:
        started = time.perf_counter() - start

        def run(todo: list[Plain]) -> list[Plain]:
            rows = [{"task": json.dumps(task)} for task in todo]
            return [json.loads(row["done"]) for row in pool.map(observed, rows)]

        return several_runs(tasks, run, started)


def with_ray(tasks: Callable[[], list[Plain]], workers: int) -> Run:
    """`write_one` by the stage's own machinery, on a private Ray of as many CPUs as there are workers."""
    start = time.perf_counter()
    with cluster.connected(num_cpus=workers):
        started = time.perf_counter() - start
        return several_runs(tasks, lambda todo: parts.run_tasks(todo, observed), started)


def several_runs(tasks: Callable[[], list[Plain]], run: Callable[[list[Plain]], list[Plain]], started: float) -> Run:
    """The same work once from nothing, with all imports, and then with workers that have done it before: the best run."""
    cold, _ = timed(run, tasks())
    warm, entries = min((timed(run, tasks()) for _ in range(WARM_RUNS)), key=lambda found: found[0])
    processes = [entry["process"] for entry in entries]
    family = psutil.Process().children(recursive=True)
    working = {process["pid"] for process in processes}
    around = sum(process.memory_full_info().pss for process in family if process.pid not in working)
    return Run(
        images=sum(entry["images"] for entry in entries),
        cold=started + cold,
        warm=warm,
        started=started,
        cpu=sum(process["cpu"] for process in processes),
        worker_peak=max(process["peak"] for process in processes),
        driver_peak=peak_memory(),
        around=around / 2**20,
        checksums=[entry["sha256"] for entry in sorted(entries, key=lambda entry: entry["file"])],
    )


def timed(run: Callable[[list[Plain]], list[Plain]], tasks: list[Plain]) -> tuple[float, list[Plain]]:
    """Wall seconds of a run, and the entries it returned."""
    start = time.perf_counter()
    entries = run(tasks)
    return time.perf_counter() - start, entries


def observed(row: parts.Row) -> parts.Row:
    """`write_one`, its manifest entry carrying the process, CPU seconds and peak memory of the worker too."""
    before = time.process_time()
    entry = json.loads(write_one(row)["done"])
    entry["process"] = {"pid": os.getpid(), "cpu": time.process_time() - before, "peak": peak_memory()}
    return {"done": json.dumps(entry)}


def use_one_thread() -> None:
    """Torch on one thread, as Ray's workers of one CPU have it."""
    torch.set_num_threads(1)


def report_parallel(report: Report, pool: Run, ray: Run, workers: int, alone: float) -> None:
    """Both ways with and without start-up; `alone` is what an image takes in one process, in CPU seconds."""
    ideal = workers / alone
    rate = pool.images / pool.warm
    report.add("process pool", rate, "images/s", rate / ideal, f"{workers} x write_shard")
    report.add("Ray Data", ray.images / ray.warm, "images/s", pool.warm / ray.warm, "process pool")
    report.add(
        "Ray Data, workers' CPU", 1000 * ray.cpu / ray.images, "ms CPU/image", ray.cpu / pool.cpu, "process pool"
    )
    report.add("process pool, with start-up", pool.images / pool.cold, "images/s")
    report.add("Ray Data, with start-up", ray.images / ray.cold, "images/s", pool.cold / ray.cold, "process pool")
    report.add("start-up of the process pool", pool.cold - pool.warm, "s")
    report.add("start-up of Ray Data", ray.cold - ray.warm, "s")
    report.add("  of it Ray itself", ray.started, "s", ray.started / (ray.cold - ray.warm), "start-up of Ray Data")
    report.add("peak memory, a worker of the pool", pool.worker_peak, "MiB")
    report.add("peak memory, a Ray worker", ray.worker_peak, "MiB", ray.worker_peak / pool.worker_peak, "pool's")
    report.add("peak memory, the pool's driver", pool.driver_peak, "MiB")
    report.add("peak memory, Ray's driver", ray.driver_peak, "MiB", ray.driver_peak / pool.driver_peak, "pool's")
    report.add("Ray's other processes together", ray.around, "MiB")


if __name__ == "__main__":
    main()
