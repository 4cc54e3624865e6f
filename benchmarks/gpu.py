"""What a GPU does here, in one command: training fed from shards, its MFU, how long it waits for its loader, and a cached answer.

python -m benchmarks.gpu [--batch 64] [--steps 40] [--record]

Nobody has run it yet where there was a GPU; on machines without one it says so and ends.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from benchmarks.measure import Report, alone
from benchmarks.models import Case, case, gflop, matmul_rate, synchronise
from benchmarks.samples import HEIGHT, SPLIT, WIDTH, write_store
from ris_core.data.dataset import BatchPlan, ShardStore, TrainingBatches
from ris_core.errors import ConfigError
from ris_core.models.answer import Frame, Reading, read_map
from ris_core.models.clip import normalise
from ris_core.models.contract import MapSystem
from ris_core.storage import Storage
from ris_core.training.checkpoint import Checkpoints
from ris_core.training.loop import Trainer, Waiting
from ris_core.training.runtime import LocalRuntime

CASES = {"r50": 0.35, "risclip_b": 0.40}  # and the goal of their MFU
WAIT_GOAL = 0.03  # of the time
ANSWER_GOAL_MS = 3.0
PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "A100": 312.0}  # dense bf16, of NVIDIA's data sheets
WARM_STEPS = 5
ANSWERS = 50
LOADERS = 4


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64, help="images of a step (default 64)")
    parser.add_argument("--steps", type=int, default=40, help="that are timed (default 40)")
    parser.add_argument("--record", action="store_true", help="keep the result in benchmarks/records")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise ConfigError("this machine has no GPU that torch sees: nothing was measured")
    name = torch.cuda.get_device_name()
    report = Report("gpu", {"gpu": name, "batch": args.batch, "steps": args.steps})
    peak = peak_of(name)
    for chosen, goal in CASES.items():
        report_case(report, alone(measure, chosen, "cuda", args.batch, args.steps), peak, goal)
    report.finish(args.record)


def peak_of(name: str) -> float | None:
    """GFLOP/s that a chip's data sheet promises in bf16; None for one that is not known here."""
    return next((1000 * peak for chip, peak in PEAK_TFLOPS.items() if chip in name), None)


@dataclass(frozen=True)
class Found:
    """A training's steps as the loop makes them, and answers about one image that is encoded already."""

    title: str
    images_per_second: float
    gflop_per_second: float
    waited: float  # share of the time in which the loader was waited for
    matmul: float  # GFLOP/s of a large matrix product
    answer_ms: float  # the median


def measure(name: str, device: str, batch: int, steps: int) -> Found:
    """Train on photos from shards for some steps; then ask one expression again and again."""
    chosen = case(name)
    chosen = replace(chosen, train=replace(chosen.train, batch_images=batch))
    with tempfile.TemporaryDirectory() as folder:
        store = ShardStore(write_store(Path(folder), 2 * batch, chosen.image_size, chosen.words))
        model = chosen.build(device)
        batches = batches_of(store, chosen, model)
        runtime = LocalRuntime(Checkpoints(Storage(folder)), device)
        trainer = Trainer(model, batches, lambda model: {}, chosen.train, runtime)
        trainer.model.train()
        finish = synchronise(device)
        first = batches.epoch(0)[0]
        work = gflop(lambda: trainer._step(first, 0))
        for _ in range(WARM_STEPS):
            trainer._step(first, 0)
        finish()
        waiting = Waiting(endless(batches, steps))
        began = time.perf_counter()
        for step, each in enumerate(waiting):
            trainer._step(each, step)
        finish()
        spent = time.perf_counter() - began
        answer = median_ms(answering(trainer.model, store, chosen, device), finish)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return Found(
        chosen.title,
        batch * steps / spent,
        work * steps / spent,
        waiting.seconds / spent,
        matmul_rate("cuda" if device == "cuda" else "cpu", dtype, "wall"),
        answer,
    )


def batches_of(store: ShardStore, chosen: Case, model: MapSystem) -> TrainingBatches:
    """The batches of a case's recipe."""
    plan = BatchPlan(chosen.train.batch_images, chosen.train.expressions_per_image, seed=0)
    return TrainingBatches(store, SPLIT, plan, partial(model.tokenize, length=chosen.train.word_len), model.stride)


def endless(batches: TrainingBatches, steps: int) -> Iterable[dict[str, torch.Tensor]]:
    """So many batches, of as many epochs as it takes."""
    epoch = 0
    while steps > 0:
        for batch in batches.loader(epoch, threads=LOADERS):
            if not steps:
                return
            steps -= 1
            yield batch
        epoch += 1


def answering(model: MapSystem, store: ShardStore, chosen: Case, device: str) -> Callable[[], object]:
    """What answers an expression about an encoded image: tokens, map, mask at the photo's size."""
    model.eval()
    with torch.inference_mode():
        pixels = torch.from_numpy(store.pixels(0).copy()).permute(2, 0, 1)[None].to(device)
        features = model.encode_image(normalise(pixels).contiguous(memory_format=torch.channels_last))
    frame, index = Frame(HEIGHT, WIDTH, store.image_size), torch.zeros(1, dtype=torch.long, device=device)

    @torch.inference_mode()
    def answer() -> object:
        tokens = model.tokenize(["the second man in the red shirt"], chosen.train.word_len).to(device)
        return read_map(model.segment(features, tokens, index), frame, Reading())

    return answer


def median_ms(function: Callable[[], object], finish: Callable[[], object]) -> float:
    """The median of the wall time of a call, in milliseconds, after a warm-up."""
    times = []
    for _ in range(ANSWERS + WARM_STEPS):
        began = time.perf_counter()
        function()
        finish()
        times.append(1000 * (time.perf_counter() - began))
    return statistics.median(times[WARM_STEPS:])


def report_case(report: Report, found: Found, peak: float | None, goal: float) -> None:
    """Rates beside the chip's data sheet and its own matrix product."""
    report.add(f"{found.title}: training from shards", found.images_per_second, "images/s")
    share = found.gflop_per_second / found.matmul
    report.add("  rate", found.gflop_per_second / 1000, "TFLOP/s", share, "a matrix product")
    if peak is None:
        report.add("  MFU: the peak of this chip is not known here", 0.0, "")
    else:
        mfu = found.gflop_per_second / peak
        report.add("  MFU", mfu, f"of {peak / 1000:.0f} TFLOP/s", mfu / goal, f"the goal of {goal}")
    report.add(
        "  waited for the loader", found.waited, "of the time", found.waited / WAIT_GOAL, f"the goal of {WAIT_GOAL}"
    )
    ratio = found.answer_ms / ANSWER_GOAL_MS
    report.add("  one more expression, p50", found.answer_ms, "ms", ratio, f"the goal of {ANSWER_GOAL_MS} ms")


if __name__ == "__main__":
    main()
