"""CRIS here beside its authors' code, from a checkout of yours: the same weights, the same batch, in turns.

git clone https://github.com/DerrickWang005/CRIS.pytorch ~/cris
python -m benchmarks.peer --official ~/cris [--batch 2] [--device cuda] [--threads 2] [--record]

Of the checkout `model/` is used, which needs torch alone. Its training and evaluation loops ask for a GPU, LMDB, OpenCV, wandb
and loguru; what they do to a batch and to an answer is done here in their order. Photos are made, weights are random.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.measure import Report, Timing, alone, best_of
from benchmarks.models import case, synchronise
from benchmarks.samples import EXPRESSIONS, SPLIT, WIDTH, write_images
from ris_core.data.dataset import BatchPlan, ShardStore, TrainingBatches
from ris_core.data.images import load_image
from ris_core.data.letterbox import letterbox_image, unletterbox
from ris_core.data.records import ImageRecord
from ris_core.data.shards import ShardOptions, write_manifest, write_shard
from ris_core.data.text import tokenize
from ris_core.errors import ConfigError
from ris_core.evaluation.answers import MapAnswers
from ris_core.evaluation.evaluator import evaluate
from ris_core.evaluation.metrics import PROTOCOLS
from ris_core.evaluation.queries import queries_of
from ris_core.models.clip import load_clip, normalise
from ris_core.models.cris import CRIS
from ris_core.storage import Storage
from ris_core.training.checkpoint import Checkpoints
from ris_core.training.loop import Trainer
from ris_core.training.runtime import LocalRuntime

CASE = "r50"
HEADS = 8
FILES = ("clip.py", "layers.py", "segmenter.py")
GOALS = {"cpu": 0.7, "cuda": 0.4}  # of the authors' time for a training step
EVALUATION_GOAL = 8.0  # times their expressions a second
EQUAL = 1e-3  # of logits
ROUNDS = {"cpu": 2, "cuda": 20}


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--official", type=Path, required=True, help="a checkout of DerrickWang005/CRIS.pytorch")
    parser.add_argument("--batch", type=int, default=2, help="images of a training step (default 2)")
    parser.add_argument("--images", type=int, default=1, help="photos of the evaluation (default 1)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="cuda: fp16 there, bf16 here")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch (default: all cores)")
    parser.add_argument("--record", action="store_true", help="keep the result in benchmarks/records")
    args = parser.parse_args()
    check(args.official, args.device)
    settings = {"device": args.device, "threads": args.threads, "batch": args.batch, "images": args.images}
    report = Report("peer" if args.device == "cpu" else "peer-cuda", settings)
    report_peers(report, alone(measure, args), args.device)
    report.finish(args.record)


def check(official: Path, device: str) -> None:
    """Raise ConfigError unless the folder is a checkout, and the device is there."""
    missing = [name for name in FILES if not (official / "model" / name).is_file()]
    if missing:
        wanted = "git clone https://github.com/DerrickWang005/CRIS.pytorch"
        raise ConfigError(
            f"{official} is no checkout of CRIS: model/{', model/'.join(missing)} missing; get one by `{wanted}`"
        )
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: this machine has no GPU that torch sees")


@contextmanager
def package(official: Path) -> Iterator[None]:
    """Inside the block, `model` is the checkout's, without its `__init__`, which asks for loguru."""
    found = ModuleType("model")
    found.__path__ = [str(official / "model")]
    with patch.dict(sys.modules, {"model": found}):  # which also forgets what is imported inside
        yield


def theirs(official: Path, device: str) -> torch.nn.Module:
    """Build the authors' model for RN50 at 416, of random weights."""
    chosen = case(CASE)
    clip = load_clip(chosen.architecture)
    state = {name: value.clone() for name, value in clip.state_dict().items()}
    stored = SimpleNamespace(eval=lambda: SimpleNamespace(state_dict=lambda: state))
    settings = SimpleNamespace(
        clip_pretrain="", word_len=chosen.train.word_len, word_dim=1024, vis_dim=512, fpn_in=[512, 1024, 1024],
        fpn_out=[256, 512, 1024], num_layers=3, num_head=HEADS, dim_ffn=2048, dropout=0.1, intermediate=False,
    )  # fmt: skip
    torch.manual_seed(0)
    with package(official), patch("torch.jit.load", lambda *_, **__: stored):
        model: torch.nn.Module = importlib.import_module("model.segmenter").CRIS(settings)
    return model.to(device)


@dataclass(frozen=True)
class Peers:
    """What both took, theirs under "their ..." and ours under "our ..."; the largest difference of their logits."""

    timings: dict[str, Timing]
    difference: float
    samples: int
    expressions: int


def measure(args: argparse.Namespace) -> Peers:
    """Both models on one batch and on the same photos, in turns."""
    torch.set_num_threads(args.threads)
    chosen, device = case(CASE), args.device
    official = theirs(args.official, device)
    ours = CRIS.from_official_state_dict(official.state_dict(), HEADS).to(device)
    plan = BatchPlan(args.batch, 1, seed=0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        records = write_images(folder, max(args.batch, args.images), chosen.words)
        store = store_of(folder, records, chosen.image_size)
        batches = TrainingBatches(store, SPLIT, plan, partial(ours.tokenize, length=chosen.train.word_len), ours.stride)
        batch = {name: value.to(device) for name, value in batches.epoch(0)[0].items()}
        difference = compare(official, ours, batch)
        runtime = LocalRuntime(Checkpoints(Storage(folder / "run")), device)
        trainer = Trainer(ours, batches, lambda model: {}, chosen.train, runtime)
        their_step = their_training(official, batch, device)
        few = records[: args.images]
        functions: dict[str, Callable[[], object]] = {
            "their step": their_step,
            "our step": lambda: (trainer.model.train(), trainer._step(batch, 0)),
            "their evaluation": lambda: their_evaluation(official, folder, few, chosen.image_size, device),
            "our evaluation": lambda: our_evaluation(ours, folder, few, chosen.image_size, chosen.train.word_len),
        }
        timings = best_of(functions, ROUNDS[device], synchronise(device))
    return Peers(timings, difference, args.batch, args.images * EXPRESSIONS)


def store_of(folder: Path, records: list[ImageRecord], size: int) -> ShardStore:
    """Make shards of photos: decoded and letterboxed once."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        place, options = Path(name), ShardOptions(size)
        write_manifest(place, "benchmark", options, [write_shard(place / "a.arrow", records, folder, options)])
        store = ShardStore(place)
        store.pixels(0)  # mapped: it stays when the folder goes
        return store


@torch.no_grad()
def compare(official: torch.nn.Module, ours: CRIS, batch: dict[str, torch.Tensor]) -> float:
    """The largest difference of logits of one batch. Raises RuntimeError where it is no rounding."""
    images = normalise(batch["image"]).contiguous()
    expected = official.eval()(images, padded(batch["tokens"]))
    found = ours.eval()(images, batch["tokens"], batch["image_index"])
    difference = float((expected - found).abs().max() / expected.abs().max())
    if not difference < EQUAL:
        raise RuntimeError(f"logits differ by {difference} of the largest: these are not the same model")
    return difference


def padded(tokens: torch.Tensor) -> torch.Tensor:
    """As the authors' tokenizer leaves them: always of the longest that is read."""
    length = case(CASE).train.word_len
    return F.pad(tokens, (0, length - tokens.shape[1]))


def their_training(official: torch.nn.Module, batch: dict[str, torch.Tensor], device: str) -> Callable[[], None]:
    """The authors' training step: the target at full size, its loss, Adam with a tenth of the rate for CLIP."""
    images = normalise(batch["image"]).contiguous()
    tokens, target = padded(batch["tokens"]), batch["target"].float() / 255
    groups: dict[bool, list[Any]] = {True: [], False: []}
    for name, parameter in official.named_parameters():
        groups[name.startswith("backbone") and "positional_embedding" not in name].append(parameter)
    rates = [{"params": groups[True], "lr": 1e-5}, {"params": groups[False], "lr": 1e-4}]
    optimizer = torch.optim.Adam(rates, lr=1e-4)
    scaler = torch.amp.GradScaler(device, enabled=device == "cuda")

    def step() -> None:
        official.train()
        with torch.autocast(device, torch.float16, enabled=device == "cuda"):
            _, _, loss = official(images, tokens, target)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    return step


@torch.no_grad()
def their_evaluation(
    official: torch.nn.Module, folder: Path, records: list[ImageRecord], size: int, device: str
) -> list[float]:
    """In the order of their `inference`: a photo is decoded for each referent, encoded for each sentence, scored in float.

    Their resampling is OpenCV's; here it is ours, which gives the same.
    """
    official.eval()
    found = []
    for record in records:
        masks = {item.ann_id: item.counts for item in record.instances}
        for ref in record.refs:
            rgb = letterbox_image(load_image(folder / record.file_name), size)
            images = normalise(torch.from_numpy(rgb).permute(2, 0, 1)[None].to(device)).contiguous()
            truth = decoded(masks[ref.ann_id], record) / 255
            for sentence in ref.sentences:
                tokens = padded(torch.from_numpy(tokenize([sentence.sent], case(CASE).train.word_len))).to(device)
                map_ = official(images, tokens).sigmoid()
                whole = F.interpolate(map_, (size, size), mode="bicubic", align_corners=True)[0].cpu()
                answer = unletterbox(whole, record.height, record.width, size)[0].numpy() > 0.35
                found.append(np.logical_and(answer, truth).sum() / (np.logical_or(answer, truth).sum() + 1e-6))
    return found


def decoded(counts: str, record: ImageRecord) -> np.ndarray:
    """A mask as their PNG files hold it, 0 and 255."""
    from ris_core.data import masks

    return masks.decode(counts, record.height, record.width) * np.uint8(255)


def our_evaluation(ours: CRIS, folder: Path, records: list[ImageRecord], size: int, word_len: int) -> object:
    """From the photo to the table of scores: preprocess and evaluate."""
    store, protocol = store_of(folder, records, size), PROTOCOLS["cris"]
    return evaluate(MapAnswers(ours, word_len), store, queries_of(store, SPLIT, protocol), protocol, split=SPLIT)


def report_peers(report: Report, found: Peers, device: str) -> None:
    """Theirs, and ours as a ratio to it."""
    clock = "CPU s" if device == "cpu" else "s"
    spent = {name: timing.cpu if device == "cpu" else timing.wall for name, timing in found.timings.items()}
    report.add("largest difference of logits", found.difference, "of the largest logit")
    report.add("the authors' training step", spent["their step"] / found.samples, f"{clock}/sample")
    ratio = spent["our step"] / spent["their step"]
    report.add("  here", spent["our step"] / found.samples, f"{clock}/sample", ratio, f"that (goal {GOALS[device]})")
    rates = {name: found.expressions / spent[f"{name} evaluation"] for name in ("their", "our")}
    title = f"the authors' evaluation, photos of {WIDTH} pixels across, {EXPRESSIONS} expressions each"
    report.add(title, rates["their"], f"expressions/{clock}")
    ratio = rates["our"] / rates["their"]
    report.add(
        "  here, from photo to score", rates["our"], f"expressions/{clock}", ratio, f"that (goal {EVALUATION_GOAL})"
    )


if __name__ == "__main__":
    main()
