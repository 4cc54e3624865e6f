"""How long a predictor's answers take, with and without the image encoded before, beside the model's own kernels.

python -m benchmarks.predict [--system cris] [--rounds 60] [--threads 1] [--record]

Needs what `dvc repro` makes. Each answer is timed from a JPEG file, or from an image encoded before, to masks in memory, and
stands beside two floors of the same run, on tensors that were prepared before:

kernels   what torch's profiler counts inside the operators of a forward pass, added up. It is the work itself, without Python
          between two operators, yet each operator's entry and the profiler's own part are in it: of a small model it can come
          out above the forward pass.
forward   the same pass as a whole, unprofiled: what no predictor around this model can be faster than.

What is above `forward` is decoding and letterboxing (without an encoded image), tokens, and maps brought to the image's size.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.measure import Report, alone, number
from benchmarks.models import synchronise
from pipelines import paths
from ris_core.data.dataset import ShardStore
from ris_core.data.images import read_image
from ris_core.data.letterbox import letterbox_image
from ris_core.device import autocast
from ris_core.errors import ConfigError
from ris_core.evaluation.metrics import PROTOCOLS
from ris_core.evaluation.queries import queries_of
from ris_core.models.clip import normalise
from ris_core.models.registry import systems
from ris_core.predictor import MapPredictor, ProposalPredictor, RISPredictor

DATASET, SPLIT = "shapes", "val"
MANY = 16
PROFILED = 5
FORWARD = "forward of "
TARGETS = {"cached": 2.5, "together": 5.0}  # of CRIS

Function = Callable[[], object]


@dataclass(frozen=True)
class Found:
    """Milliseconds of one system. waits: (p50, p95) by what was asked; kernels: of what has them."""

    waits: dict[str, tuple[float, float]]
    kernels: dict[str, float]


def answers(predictor: RISPredictor, photo: Path, texts: list[str]) -> dict[str, Function]:
    """What a client may ask: one expression or many, of a file or of an image that it has encoded."""
    encoded = predictor.encode(photo)
    one = texts[:1]
    return {
        "first, 1": lambda: predictor.answer(predictor.encode(photo), one),
        "cached, 1": lambda: predictor.answer(encoded, one),
        f"first, {MANY}": lambda: predictor.answer(predictor.encode(photo), texts),
        f"cached, {MANY}": lambda: predictor.answer(encoded, texts),
        f"first, {MANY} calls": lambda: [predictor.answer(predictor.encode(photo), [text]) for text in texts],
        f"cached, {MANY} calls": lambda: [predictor.answer(encoded, [text]) for text in texts],
    }


def passes(predictor: RISPredictor, photo: Path, texts: list[str]) -> dict[str, Function]:
    """The same on prepared tensors: the system alone."""
    rgb = read_image(photo)
    if isinstance(predictor, ProposalPredictor):
        return _passes_over_proposals(predictor, rgb, texts)
    assert isinstance(predictor, MapPredictor)
    system, size = predictor.system, predictor.image_size
    pixels = torch.from_numpy(letterbox_image(rgb, size, predictor.resample)).to(predictor.device)
    images = normalise(pixels.permute(2, 0, 1)[None])
    features = system.encode_image(images)

    def made(count: int, cached: bool) -> Function:
        tokens = system.tokenize(texts[:count], predictor.most_tokens).to(predictor.device)
        index = torch.zeros(count, dtype=torch.long, device=predictor.device)

        def run() -> None:
            with autocast(predictor.precision, predictor.device):
                known = features if cached else system.encode_image(images)
                system.segment(known, tokens, index)
                if system.locates:
                    system.located(known, tokens, index, size)

        return run

    return {f"{name}, {count}": made(count, name == "cached") for name in ("first", "cached") for count in (1, MANY)}


def _passes_over_proposals(predictor: ProposalPredictor, rgb: np.ndarray, texts: list[str]) -> dict[str, Function]:
    """Proposals are made before, as they are no part of the model."""
    proposals = predictor.propose(rgb)
    features = predictor.system.encode_proposals(rgb, proposals)

    def made(count: int, cached: bool) -> Function:
        def run() -> None:
            known = features if cached else predictor.system.encode_proposals(rgb, proposals)
            predictor.system.score(known, texts[:count])

        return run

    return {f"{name}, {count}": made(count, name == "cached") for name in ("first", "cached") for count in (1, MANY)}


def kernel_time(function: Function, device: str) -> float:
    """The least of some passes' milliseconds inside operators, by torch's profiler; on a GPU, of its kernels."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    found = []
    for _ in range(PROFILED):
        with _quiet(), profile(activities=activities, acc_events=True) as profiler:
            function()
            synchronise(device)()
        events = profiler.key_averages()
        name = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
        found.append(sum(getattr(event, name) for event in events) / 1e3)
    return min(found)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what the profiler's own library says of each start and stop off the terminal; errors are exceptions all the same."""
    shown = os.dup(2)
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(shown, 2)
        os.close(shown)


def quantiles(functions: Mapping[str, Function], rounds: int, finish: Function) -> dict[str, tuple[float, float]]:
    """Median and 95th percentile of each function's milliseconds; rounds go through all, so that bursts fall on all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(rounds + 2):
        for name, function in functions.items():
            finish()
            start = time.perf_counter()
            function()
            finish()
            if turn >= 2:  # the first ones warm up
                seconds[name].append(time.perf_counter() - start)
    return {
        name: (1e3 * float(np.median(each)), 1e3 * float(np.quantile(each, 0.95))) for name, each in seconds.items()
    }


def measure(folder: Path, photo: Path, texts: list[str], rounds: int, threads: int) -> Found:
    """Time one system in this process."""
    torch.set_num_threads(threads)
    predictor = RISPredictor.from_folder(folder)
    device = predictor.device.type
    with torch.inference_mode():
        alone = passes(predictor, photo, texts)
        kernels = {name: kernel_time(function, device) for name, function in alone.items()}
        functions = {**answers(predictor, photo, texts), **{f"{FORWARD}{name}": each for name, each in alone.items()}}
        return Found(quantiles(functions, rounds, synchronise(device)), kernels)


def subject() -> tuple[Path, list[str]]:
    """A photo of the validation split, the first with expressions enough, and those."""
    store = ShardStore(paths.shards(DATASET))
    for image in store.images_of(SPLIT).tolist():
        texts = list(dict.fromkeys(query.text for query in queries_of(store, SPLIT, PROTOCOLS["ours"], [image])))
        if len(texts) >= 3:  # an image has few: they are asked in turns, which costs what others would
            texts = list(islice((text for _ in range(MANY) for text in texts), MANY))
            return paths.raw(DATASET) / store.row(image)["file_name"], texts
    raise ConfigError(f"no image of {DATASET} {SPLIT} has three expressions: run the pipeline first")


def report_system(report: Report, system: str, found: Found) -> None:
    """Its rows: waits beside forward pass and kernels, and what caching and asking together bring."""
    for name, (median, late) in found.waits.items():
        if name.startswith(FORWARD):
            continue
        if floor := found.kernels.get(name):
            beside = f"kernels, {number(floor)} ms"
            report.add(f"{system}: {name}, p50", median, "ms", median / floor, beside)
            forward = found.waits[f"{FORWARD}{name}"][0]
            report.add(f"{system}: {name}, the forward pass alone, p50", forward, "ms", forward / floor, beside)
        else:
            report.add(f"{system}: {name}, p50", median, "ms")
        report.add(f"{system}: {name}, p95", late, "ms")
    usual = {name: each[0] for name, each in found.waits.items()}
    asked = TARGETS if system == "cris" else {}
    cached = usual["first, 1"] / usual["cached, 1"]
    _ratio(report, f"{system}: 1 expression, image encoded before", cached, "as fast", asked.get("cached"))
    for name in ("first", "cached"):
        ratio = usual[f"{name}, {MANY} calls"] / usual[f"{name}, {MANY}"]
        _ratio(
            report, f"{system}: {MANY} in one call, {name}", ratio, f"as fast as {MANY} calls", asked.get("together")
        )


def _ratio(report: Report, what: str, value: float, unit: str, target: float | None) -> None:
    report.add(what, value, f"x {unit}", *((value / target, f"the {target} asked") if target else ()))


def main() -> None:
    """Run the benchmark. Raises ConfigError if nothing is trained."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--system", choices=systems(), action="append", help="only this one; may be given several times"
    )
    parser.add_argument("--rounds", type=int, default=60, help="how often each is asked (default 60)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default 1)")
    parser.add_argument("--record", action="store_true", help="keep the result in benchmarks/records")
    args = parser.parse_args()
    wanted = [name for name in args.system or systems() if paths.model(name, DATASET).exists()]
    if not wanted:
        raise ConfigError("no system is trained here: run the pipeline first")
    photo, texts = subject()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    settings = {"device": device, "threads": args.threads, "rounds": args.rounds, "dataset": DATASET}
    report = Report("predict" if device == "cpu" else f"predict-{device}", settings)
    for system in wanted:
        found = alone(measure, paths.model(system, DATASET), photo, texts, args.rounds, args.threads)
        report_system(report, system, found)
    report.finish(args.record)


if __name__ == "__main__":
    main()
