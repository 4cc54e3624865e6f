"""What encoding an image (or its proposals) once for all its expressions brings, and what the meter costs beside the model.

python -m benchmarks.evaluate [--full] [--device cuda] [--threads 1] [--record]
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from benchmarks import global_local
from benchmarks.measure import Report, Timing, alone, best_of
from benchmarks.models import case, gflop, synchronise
from benchmarks.samples import EXPRESSIONS, HEIGHT, OBJECTS, SPLIT, WIDTH, write_store
from ris_core.data.dataset import ShardStore
from ris_core.data.letterbox import unletterbox
from ris_core.evaluation.answers import MapAnswers
from ris_core.evaluation.evaluator import Job, evaluate, evaluate_all
from ris_core.evaluation.metrics import PROTOCOLS, bootstrap_intervals, scores
from ris_core.evaluation.overlap import packed, pairwise_overlap
from ris_core.evaluation.queries import queries_of
from ris_core.models.clip import normalise
from ris_core.models.contract import MapSystem, Role, SystemConfig
from ris_core.models.losses import LossParams

BESIDE_IMAGES, BESIDE_SIZE = 40, 416
BESIDE_GOAL_MS = 1.0  # of CPU an expression under one protocol
PRESET_CRIS = ("cris", "ours")
IMAGES = {"small": 8, "r50": 1}
ROUNDS = {"small": 3, "r50": 2}
ROWS = 100_000
VAL = (10_834, 1_500)  # expressions and images of RefCOCO val
BOOTSTRAP_SAMPLES = 1000


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--full", action="store_true", help="also CRIS-R50 at 416 and Global-Local on ViT-B/32 and RN50"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default 1, as each actor of the stage has)")
    parser.add_argument("--record", action="store_true", help="keep the result in benchmarks/records")
    args = parser.parse_args()
    settings = {"device": args.device, "threads": args.threads, "expressions_per_image": EXPRESSIONS}
    report = Report("evaluate" if args.device == "cpu" else f"evaluate-{args.device}", settings)
    for name in ["small", "r50"] if args.full else ["small"]:
        report_model(report, alone(measure_model, name, args.device, args.threads), args.device)
    for name, published in global_local.CASES.items():
        if args.full or not published:
            found = alone(global_local.measure, name, args.device, args.threads)
            global_local.report_case(report, found, args.device)
    report_beside(report, alone(measure_beside, args.threads))
    report_meter(report, alone(measure_meter, args.threads))
    report.finish(args.record)


@dataclass(frozen=True)
class Found:
    """Timings of one model over `expressions` of `images`, and the GFLOP of the first two."""

    title: str
    images: int
    expressions: int
    timings: dict[str, Timing]
    shared_gflop: float
    repeated_gflop: float


def measure_model(name: str, device: str, threads: int) -> Found:
    """The same expressions with shared and with repeated encodings, one by one, and through all of `evaluate`."""
    torch.set_num_threads(threads)
    chosen, protocol = case(name), PROTOCOLS["ours"]
    model = chosen.build(device).eval()
    with tempfile.TemporaryDirectory() as folder:
        store = ShardStore(write_store(Path(folder), IMAGES[name], chosen.image_size, chosen.words))
        queries = queries_of(store, SPLIT, protocol)
        pixels = torch.from_numpy(np.stack([store.pixels(i) for i in range(len(store))])).permute(0, 3, 1, 2).to(device)
        tokens = model.tokenize([query.text for query in queries], chosen.train.word_len).to(device)
        index = torch.tensor([query.image for query in queries], device=device)
        row = store.row(0)
        truth = np.stack([store.mask(0, item["ann_id"]) for item in row["instances"]])
    masks = torch.from_numpy(truth).to(device)
    maps = torch.rand(EXPRESSIONS, chosen.image_size // 4, chosen.image_size // 4, device=device)
    full = unletterbox(maps, HEIGHT, WIDTH, chosen.image_size)

    answer = MapAnswers(model, chosen.train.word_len)
    logits: dict[str, torch.Tensor] = {}

    def shared() -> None:
        logits["shared"] = model.segment(model.encode_image(normalise(pixels)), tokens, index)

    def repeated() -> None:
        logits["repeated"] = model(normalise(pixels[index]), tokens)

    def one_by_one() -> None:
        for image, text in zip(index, tokens, strict=True):
            model(normalise(pixels[image][None]), text[None])

    functions = {
        "shared": shared,
        "repeated": repeated,
        "one_by_one": one_by_one,
        "evaluate": lambda: evaluate(answer, store, queries, protocol, split=SPLIT),
        "unletterbox": lambda: [unletterbox(maps, HEIGHT, WIDTH, chosen.image_size) for _ in range(IMAGES[name])],
        "overlap": lambda: [pairwise_overlap(packed(full > 0.5), packed(masks)) for _ in range(IMAGES[name])],
    }
    with torch.inference_mode():
        work = gflop(shared), gflop(repeated)
        timings = best_of(functions, ROUNDS[name], synchronise(device))
    difference = (logits["shared"] - logits["repeated"]).abs().max().item()
    if not difference < 0.01:
        raise RuntimeError(f"shared and repeated encodings of {name} differ by {difference}")
    return Found(chosen.title, len(store), len(queries), timings, *work)


def report_model(report: Report, found: Found, device: str) -> None:
    """Rates with and without sharing beside what the saved work alone would bring, and the meter's parts beside the model."""
    clock = "CPU s" if device == "cpu" else "s"
    spent = {what: timing.cpu if device == "cpu" else timing.wall for what, timing in found.timings.items()}
    rate = {what: found.expressions / seconds for what, seconds in spent.items()}
    report.add(f"{found.title}, an encoding per expression", rate["repeated"], f"expressions/{clock}")
    report.add(
        "  an encoding per image", rate["shared"], f"expressions/{clock}", rate["shared"] / rate["repeated"], "that"
    )
    limit = found.repeated_gflop / found.shared_gflop
    report.add("  by the work saved (GFLOP) alone", limit * rate["repeated"], f"expressions/{clock}", limit, "that")
    ratio = rate["one_by_one"] / rate["repeated"]
    report.add("  one by one, as the official test", rate["one_by_one"], f"expressions/{clock}", ratio, "that")
    ratio = spent["evaluate"] / spent["shared"]
    report.add("  evaluate, all of it", rate["evaluate"], f"expressions/{clock}", ratio, "the model's own time")
    unit = "ms CPU/expression" if device == "cpu" else "ms/expression"
    for what in ("unletterbox", "overlap"):
        share = spent[what] / spent["shared"]
        report.add(
            f"  {what}, {WIDTH}x{HEIGHT}",
            1000 * spent[what] / found.expressions,
            unit,
            share,
            "the model",
        )


class Instant(MapSystem[torch.Tensor, torch.Tensor]):
    """Costs nothing: what is left of an evaluation is what it takes beside any model. Answers are one disc, a soft one."""

    stride = 4

    def __init__(self, side: int) -> None:
        super().__init__(None, SystemConfig())
        self.anchor = nn.Parameter(torch.zeros(1))
        place = torch.linspace(-1, 1, side)
        self.map = 6 - 60 * (place[:, None] ** 2 + (place[None] - 0.2) ** 2)
        self.passes = 0

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        """Nothing."""
        return images.new_zeros(0)

    def segment(
        self, features: torch.Tensor, tokens: torch.Tensor, image_index: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The disc, for each expression."""
        self.passes += len(tokens)
        return self.map.expand(len(tokens), 1, *self.map.shape)

    def forward(
        self, images: torch.Tensor, tokens: torch.Tensor, image_index: torch.Tensor | None = None
    ) -> torch.Tensor:
        """As in evaluation."""
        return self.segment(self.encode_image(images), tokens, image_index)

    def loss(self, output: torch.Tensor, target: torch.Tensor, params: LossParams) -> torch.Tensor:
        """Not to be trained."""
        raise NotImplementedError

    def role(self, name: str) -> Role:
        """None that matters."""
        return "head"


@dataclass(frozen=True)
class Beside:
    """CPU seconds of whole evaluations whose model costs nothing, over `expressions`; and how many each had answered."""

    expressions: int
    timings: dict[str, Timing]
    passes: dict[str, int]


def measure_beside(threads: int) -> Beside:
    """Evaluations under one protocol, and under those of the preset `cris` at once and one by one."""
    torch.set_num_threads(threads)
    model = Instant(BESIDE_SIZE // Instant.stride)
    answer = MapAnswers(model, 17)
    passes: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        store = ShardStore(write_store(Path(folder), BESIDE_IMAGES, BESIDE_SIZE))
        jobs = [Job(name, PROTOCOLS[name], SPLIT, queries_of(store, SPLIT, PROTOCOLS[name])) for name in PRESET_CRIS]

        def run(name: str, *together: list[Job]) -> Callable[[], None]:
            def function() -> None:
                before = model.passes
                for some in together:
                    evaluate_all(answer, store, some)
                passes[name] = model.passes - before

            return function

        by_name = {job.name: job for job in jobs}
        preset = [by_name[name] for name in PRESET_CRIS]
        pixels = [store.pixels(i) for i in range(len(store))]
        functions = {
            "one": run("one", [by_name["cris"]]),
            "preset": run("preset", preset),
            "singly": run("singly", *([job] for job in preset)),
            "tokens": lambda: model.tokenize([query.text for query in by_name["cris"].queries], 17),
            "copy": lambda: [image.copy() for image in pixels],
        }
        timings = best_of(functions, 3)
    return Beside(len(by_name["cris"].queries), timings, passes)


def report_beside(report: Report, found: Beside) -> None:
    """What an evaluation costs beside the model, and what protocols share."""
    ms = {name: 1000 * timing.cpu / found.expressions for name, timing in found.timings.items()}
    title = f"beside any model at {BESIDE_SIZE}, photos of {WIDTH}x{HEIGHT}, protocol cris"
    report.add(title, ms["one"], "ms CPU/expression", ms["one"] / BESIDE_GOAL_MS, f"the goal of {BESIDE_GOAL_MS} ms")
    report.add("  of it tokens", ms["tokens"], "ms CPU/expression", ms["tokens"] / ms["one"], "that")
    report.add("  pixels copied, a floor", ms["copy"], "ms CPU/expression", ms["copy"] / ms["one"], "that")
    preset = f"{', '.join(PRESET_CRIS)}"
    report.add(f"{preset} at once", ms["preset"], "ms CPU/expression", ms["preset"] / ms["singly"], "one by one")
    ratio = found.passes["preset"] / found.passes["singly"]
    report.add("  expressions through the model", found.passes["preset"], "expressions", ratio, "one by one")


def measure_meter(threads: int) -> dict[str, float]:
    """CPU seconds of the meter's parts that no model takes part in."""
    torch.set_num_threads(threads)
    random = np.random.default_rng(0)
    union = random.integers(1, 100_000, ROWS)
    intersection = (union * random.random(ROWS)).astype(np.int64)
    some, image_ids = slice(0, VAL[0]), np.sort(random.integers(VAL[1], size=VAL[0]))
    predicted, truth = (torch.rand(count, HEIGHT, WIDTH) > 0.5 for count in (EXPRESSIONS, OBJECTS))
    functions = {
        "scores": lambda: scores(intersection, union),
        "bootstrap": lambda: bootstrap_intervals(intersection[some], union[some], image_ids, BOOTSTRAP_SAMPLES, 0),
        "overlap": lambda: pairwise_overlap(packed(predicted), packed(truth)),
        "copy": lambda: (predicted.float(), truth.float()),
    }
    return {name: timing.cpu for name, timing in best_of(functions, 5).items()}


def report_meter(report: Report, spent: dict[str, float]) -> None:
    """The meter's rates on the CPU."""
    report.add("meter: scores", ROWS / spent["scores"], "expressions/CPU s")
    ratio = spent["copy"] / spent["overlap"]
    rate = EXPRESSIONS / spent["overlap"]
    report.add("meter: overlap with all objects", rate, "expressions/CPU s", ratio, "one copy of the masks to float")
    report.add("meter: bootstrap of RefCOCO val", spent["bootstrap"], "CPU s")


if __name__ == "__main__":
    main()
