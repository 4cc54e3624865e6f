"""Forward pass and training step against the machine's matrix product: published sizes and the small models.

python -m benchmarks.train_step [--models small r50 risclip_b] [--device cuda] [--threads 2] [--record]
"""

from __future__ import annotations

import argparse
import os
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from benchmarks.measure import Report, Timing, alone, best_of, peak_memory
from benchmarks.models import CASES, case, gflop, matmul_rate, synchronise
from benchmarks.samples import SPLIT, write_store
from ris_core.data.dataset import BatchPlan, ShardStore, TrainingBatches
from ris_core.models.clip import normalise
from ris_core.storage import Storage
from ris_core.training.checkpoint import Checkpoints
from ris_core.training.loop import Trainer
from ris_core.training.runtime import LocalRuntime


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=CASES, default=CASES, help="default: all")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="cuda: bf16 autocast")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch (default: all cores)")
    parser.add_argument("--record", action="store_true", help="keep the result in benchmarks/records")
    args = parser.parse_args()
    settings = {"device": args.device, "threads": args.threads}
    report = Report("train_step" if args.device == "cpu" else f"train_step-{args.device}", settings)
    for name in args.models:
        report_case(report, alone(measure, name, args.device, args.threads), args.device)
    report.finish(args.record)


@dataclass(frozen=True)
class Found:
    """One model: timings and GFLOP of a forward pass and of a step over a batch of `samples` expressions."""

    title: str
    images: int
    samples: int
    tokens: int
    matmul: float  # GFLOP/s
    forward: Timing
    step: Timing
    forward_gflop: float
    step_gflop: float
    peak: float  # MiB, of the GPU if there is one


def measure(name: str, device: str, threads: int) -> Found:
    """Time one model; the step is the training loop's own, on a batch from shards."""
    torch.set_num_threads(threads)
    matmul = (
        matmul_rate(device, torch.bfloat16, "wall") if device == "cuda" else matmul_rate(device, torch.float32, "cpu")
    )
    chosen = case(name)
    plan = BatchPlan(chosen.train.batch_images, chosen.train.expressions_per_image, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        store = ShardStore(write_store(Path(folder), plan.batch_images, chosen.image_size, chosen.words))
        model = chosen.build(device)
        tokenize = partial(model.tokenize, length=chosen.train.word_len)
        batches = TrainingBatches(store, SPLIT, plan, tokenize, model.stride)
        trainer = Trainer(
            model, batches, lambda model: {}, chosen.train, LocalRuntime(Checkpoints(Storage(folder)), device)
        )
        batch = batches.epoch(0)[0]
    on_device = {key: value.to(device) for key, value in batch.items()}

    @torch.inference_mode()
    def forward() -> None:
        trainer.model.eval()
        images = normalise(on_device["image"]).contiguous(memory_format=torch.channels_last)
        with trainer.autocast:
            trainer.model(images, on_device["tokens"], on_device["image_index"])

    losses: list[torch.Tensor] = []

    def step() -> None:
        trainer.model.train()
        losses.append(trainer._step(batch, 0))

    forward_gflop, step_gflop = gflop(forward), gflop(step)
    rounds = 3 if name.startswith("small") else 2
    timings = best_of({"forward": forward, "step": step}, rounds, synchronise(device))
    if not all(loss.isfinite() for loss in losses):
        raise RuntimeError(f"losses of {name} are {losses}: their timing would mean nothing")
    peak = torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else peak_memory()
    samples, tokens = batch["tokens"].shape
    return Found(
        chosen.title,
        plan.batch_images,
        samples,
        tokens,
        matmul,
        **timings,
        forward_gflop=forward_gflop,
        step_gflop=step_gflop,
        peak=peak,
    )


def report_case(report: Report, found: Found, device: str) -> None:
    """Seconds a sample, and the share of the matrix product's rate that the model reaches."""
    clock = "CPU s" if device == "cpu" else "s"
    report.add(f"{found.title}: matrix product", found.matmul, f"GFLOP/{clock}")
    report.add("  images in a batch", found.images, "images")
    report.add("  samples in a batch", found.samples, f"of {found.tokens} tokens")
    for what, timing, work in (
        ("forward", found.forward, found.forward_gflop),
        ("training step", found.step, found.step_gflop),
    ):
        spent = timing.cpu if device == "cpu" else timing.wall
        report.add(f"  {what}", spent / found.samples, f"{clock}/sample")
        report.add(f"  {what}, work", work / found.samples, "GFLOP/sample")
        report.add(f"  {what}, rate", work / spent, f"GFLOP/{clock}", work / spent / found.matmul, "matrix product")
        report.add(f"  {what}, wall", found.samples / timing.wall, "samples/s")
    report.add("  peak memory", found.peak, "MiB")


if __name__ == "__main__":
    main()
