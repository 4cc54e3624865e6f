"""What encoding an image's proposals once for all its expressions brings to Global-Local, and what proposals cost.

Part of `python -m benchmarks.evaluate`, which has the command line.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count, islice
from random import Random

import numpy as np
import torch
from PIL import Image

from benchmarks.measure import Report, Timing, best_of
from benchmarks.models import gflop, synchronise
from benchmarks.samples import SENTENCES_OF_REFS, WORDS, photos
from pipelines.paths import PARAMS
from ris_core.config import load_params
from ris_core.data.shapes.flavours import FLAVOURS, describe
from ris_core.data.shapes.scenes import paint, sample_scene
from ris_core.models.clip import Architecture, load_clip
from ris_core.models.global_local import GlobalLocal, GlobalLocalConfig
from ris_core.models.proposals import FelzenszwalbOptions, felzenszwalb

CASES = {"gl_small_rn": False, "gl_small_vit": False, "gl_vit_b32": True, "gl_rn50": True}  # name -> only with --full
SMALL_EXPRESSIONS = 11  # an image of the embedded data
TOLERANCE = 1e-4  # of scores, relative to the largest


@dataclass(frozen=True)
class Sample:
    """An image uint8 (H, W, 3) and the expressions of its referents."""

    image: np.ndarray
    referents: list[list[str]]


@dataclass(frozen=True)
class Case:
    """A CLIP, the sizes of what it is shown, and how often that is timed."""

    title: str
    architecture: Architecture
    config: GlobalLocalConfig
    proposals: FelzenszwalbOptions
    most_proposals: int
    samples: list[Sample]
    rounds: int

    def build(self, device: str) -> GlobalLocal:
        """The system with random weights, always the same."""
        torch.manual_seed(0)
        return GlobalLocal(load_clip(self.architecture), self.config).to(device)


def case(name: str) -> Case:
    """A case of `CASES` by its name: the sizes of params.yaml, or the published ones on something like a photo."""
    if name.startswith("gl_small"):
        params = load_params(PARAMS)
        config, segments = params.of("global_local").model, params.proposals.felzenszwalb
        assert isinstance(config, GlobalLocalConfig)
        # the tiny ViT has three blocks: one of them sees the whole image, as nine of twelve do in the published one
        config = replace(config, masked_blocks=2)
        title, architecture = ("ResNet", "tiny_rn") if name == "gl_small_rn" else ("ViT", "tiny_vit")
        samples = list(islice(scenes(), 4))
        return Case(f"small Global-Local, {title}", architecture, config, segments, 14, samples, 5)
    config = GlobalLocalConfig(box_mode="tight", noun_phrase="rules")
    title, architecture = ("RN50", "RN50-quickgelu") if name == "gl_rn50" else ("ViT-B/32", "ViT-B-32-quickgelu")
    return Case(f"Global-Local, {title} at 224", architecture, config, FelzenszwalbOptions(), 20, [photograph()], 2)


def scenes() -> Iterator[Sample]:
    """Pictures as those of the embedded data, of 160x128 pixels and 11 expressions."""
    for seed in count():
        random = np.random.default_rng(seed)
        scene = sample_scene(random, 160)
        things = range(len(scene.things))
        said = describe(scene, things, FLAVOURS["shapes"], (2, 3), Random(seed)).values()
        referents = [[" ".join(expression.tokens) for expression in about] for about in said]
        if (scene.width, scene.height) == (160, 128) and sum(map(len, referents)) == SMALL_EXPRESSIONS:
            yield Sample(paint(scene, random), referents)


def photograph() -> Sample:
    """Something like a photo, with RefCOCO's numbers of referents and expressions, five words each."""
    random = np.random.default_rng(0)
    image = np.asarray(Image.open(io.BytesIO(next(photos(random)))))
    return Sample(image, [[" ".join(random.choice(WORDS, 5)) for _ in range(number)] for number in SENTENCES_OF_REFS])


@dataclass(frozen=True)
class Found:
    """Timings of all ways over `images`, the GFLOP of the first three, and how far their scores lie apart."""

    title: str
    images: int
    expressions: int
    proposals: float  # an image
    timings: dict[str, Timing]
    gflop: dict[str, float]
    difference: float


def measure(name: str, device: str, threads: int) -> Found:
    """Scores of the same expressions by each way; raises RuntimeError if they differ."""
    torch.set_num_threads(threads)
    chosen = case(name)
    model, samples = chosen.build(device), chosen.samples
    masks = [felzenszwalb(sample.image, chosen.proposals)[: chosen.most_proposals] for sample in samples]
    expressions = [[text for texts in sample.referents for text in texts] for sample in samples]
    scores: dict[str, torch.Tensor] = {}

    def way(name: str, groups: list[Sequence[Sequence[str]]]) -> Callable[[], None]:
        """Proposals are encoded once for each group of expressions of an image."""

        def run() -> None:
            scores[name] = torch.cat([
                model.score(model.encode_proposals(sample.image, proposals), texts).flatten()
                for sample, proposals, of_image in zip(samples, masks, groups, strict=True)
                for texts in of_image
            ])  # fmt: skip

        return run

    ways = {
        "per image": way("per image", [[texts] for texts in expressions]),
        "per referent": way("per referent", [sample.referents for sample in samples]),
        "per expression": way("per expression", [[[text] for text in texts] for texts in expressions]),
    }
    parts = {
        "encode": lambda: [model.encode_proposals(s.image, p) for s, p in zip(samples, masks, strict=True)],
        "texts": lambda: [model.encode_texts(texts) for texts in expressions],
        "texts one by one": lambda: [model.encode_texts([text]) for texts in expressions for text in texts],
        "propose": lambda: [felzenszwalb(sample.image, chosen.proposals) for sample in samples],
    }
    work = {what: gflop(run) for what, run in ways.items()}
    timings = best_of({**ways, **parts}, chosen.rounds, synchronise(device))
    return Found(
        chosen.title,
        len(samples),
        sum(map(len, expressions)),
        sum(map(len, masks)) / len(samples),
        timings,
        work,
        largest_difference(scores, name),
    )


def largest_difference(scores: dict[str, torch.Tensor], name: str) -> float:
    """How far the ways lie apart, relative to the largest score. Raises RuntimeError where they differ."""
    ours = scores["per image"]
    difference = max((ours - others).abs().max().item() for others in scores.values()) / ours.abs().max().item()
    if not difference < TOLERANCE:
        raise RuntimeError(f"scores of {name} with shared and with repeated encodings differ by {difference}")
    return difference


def report_case(report: Report, found: Found, device: str) -> None:
    """Rates with and without sharing, beside what the saved work alone would bring, and the parts beside the encoding."""
    clock = "CPU s" if device == "cpu" else "s"
    spent = {what: timing.cpu if device == "cpu" else timing.wall for what, timing in found.timings.items()}
    rate = {what: found.expressions / seconds for what, seconds in spent.items()}
    unit = f"expressions/{clock}"
    report.add(f"{found.title}: proposals", found.proposals, "an image")
    report.add("  expressions", found.expressions / found.images, "an image")
    slowest = rate["per expression"]
    report.add("  proposals encoded per expression", slowest, unit)
    for what, title in (("per referent", "per referent, as the official code"), ("per image", "per image")):
        report.add(f"  proposals encoded {title}", rate[what], unit, rate[what] / slowest, "per expression")
        limit = found.gflop["per expression"] / found.gflop[what]
        report.add("    by the work saved (GFLOP) alone", limit * slowest, unit, limit, "per expression")
    report.add("  largest difference of scores", found.difference, "of the largest score")
    report.add("  encoding of proposals alone", found.images / spent["encode"], f"images/{clock}")
    ratio = rate["texts"] / rate["texts one by one"]
    report.add("  texts of an image in one batch, none twice", rate["texts"], unit, ratio, "texts one by one")
    ratio = spent["propose"] / spent["encode"]
    report.add("  proposals by felzenszwalb", found.images / found.timings["propose"].cpu, "images/CPU s")
    report.add("    their time", 1000 * spent["propose"] / found.images, "ms/image", ratio, "the encoding")
