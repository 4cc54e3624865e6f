"""How long one answer takes on this machine, of each trained system: a first one about a photo, and one more about it.

python -m benchmarks.waiting [--split val] [--record]

Needs what `dvc repro` makes. `--record` writes results/waiting.json, which the report shows.

Times mean little away from their machine, so they come with the rate at which the same device multiplies matrices,
measured in the same run, and with the time that a first answer's operations would take at that rate.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch

from benchmarks.measure import number
from benchmarks.models import matmul_rate, synchronise
from pipelines import paths
from pipelines.fingerprint import git_commit
from ris_core.data.dataset import ShardStore
from ris_core.data.images import load_image
from ris_core.errors import ConfigError, DataError
from ris_core.evaluation.behaviour import Answering
from ris_core.evaluation.cost import Costly, cost
from ris_core.evaluation.metrics import PROTOCOLS
from ris_core.evaluation.queries import queries_of
from ris_core.files import write_json
from ris_core.predictor import RISPredictor

RESULTS = Path("results/evaluate")


class Waiting(TypedDict):
    """What answers of one system take.

    ms_first: milliseconds of `set_image` and one expression; ms_next: of one more about the same image. Both include the
        work around the network.
    device: "cpu, 2 threads", or the GPU's name. gflop_per_s_matmul: its best rate in float32 matrix products.
    floor_ms_first: milliseconds of a first answer's operations at that rate. Not quite a bound on a GPU, where answers run
        in bf16.
    """

    ms_first: float
    ms_next: float
    device: str
    gflop_per_s_matmul: float
    floor_ms_first: float


def waiting(
    predictor: Costly, device: torch.device, rgb: np.ndarray, expressions: Sequence[str], repeats: int = 5
) -> Waiting:
    """Time answers about `rgb`, uint8 (H, W, 3), to `expressions`. Sets the predictor's image.

    Times are the best of `repeats`, which take the expressions in turn, after a warm-up. Raises DataError if there is no
    expression or `repeats` is below 1.
    """
    if repeats < 1:
        raise DataError(f"the best of {repeats} repeats cannot be taken: use 1 or more")
    operations = cost(predictor, rgb, expressions)
    first, following = _waits(predictor, rgb, expressions, repeats, synchronise(device.type))
    rate = matmul_rate(device.type, torch.float32, "wall")
    return {
        "ms_first": 1e3 * min(first),
        "ms_next": 1e3 * min(following),
        "device": device_name(device),
        "gflop_per_s_matmul": rate,
        "floor_ms_first": 1e3 * (operations["gflop_image"] + operations["gflop_expression"]) / rate,
    }


def _waits(
    predictor: Answering, rgb: np.ndarray, expressions: Sequence[str], repeats: int, finish: Callable[[], object]
) -> tuple[list[float], list[float]]:
    """Seconds of each first answer and of each further one."""
    first, following = [], []
    for turn in range(repeats + 1):
        one, other = (expressions[(turn + i) % len(expressions)] for i in (0, 1))
        first.append(_seconds(partial(_first_answer, predictor, rgb, one), finish))
        following.append(_seconds(partial(predictor.predict, [other]), finish))
    return first[1:], following[1:]  # the first turn warms up


def _first_answer(predictor: Answering, rgb: np.ndarray, text: str) -> None:
    predictor.set_image(rgb)
    predictor.predict([text])


def _seconds(function: Callable[[], object], finish: Callable[[], object]) -> float:
    finish()
    start = time.perf_counter()
    function()
    finish()
    return time.perf_counter() - start


def device_name(device: torch.device) -> str:
    """The device in words: "cpu, 2 threads", or the name of a GPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{device.type}, {threads} thread{'s' if threads != 1 else ''}"


def of_model(folder: Path, dataset: str, split: str) -> Waiting:
    """`waiting` of the model in a folder, about the first image of a split."""
    store = ShardStore(paths.shards(dataset))
    predictor = RISPredictor.from_folder(folder)
    image = int(store.images_of(split)[0])
    texts = [query.text for query in queries_of(store, split, PROTOCOLS["ours"], [image])]
    rgb = load_image(paths.raw(dataset) / store.row(image)["file_name"])
    return waiting(predictor, predictor.device, rgb, texts)


def main() -> None:
    """Run the benchmark. Raises ConfigError if there is no system to time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--split", default="val", help="whose first image is asked about (default val)")
    parser.add_argument("--record", action="store_true", help=f"write {paths.WAITING}")
    args = parser.parse_args()
    found: dict[str, Waiting] = {}
    for folder in sorted(RESULTS.glob("*-*")):
        system, dataset = folder.name.split("-", 1)
        found[folder.name] = each = of_model(paths.model(system, dataset), dataset, args.split)
        first, following, floor = (number(ms) for ms in (each["ms_first"], each["ms_next"], each["floor_ms_first"]))
        where = f"{each['device']}, {number(each['gflop_per_s_matmul'])} GFLOP/s"
        print(f"{folder.name}: first answer {first} ms, floor {floor} ms, one more {following} ms ({where})")
    if not found:
        raise ConfigError(f"{RESULTS} is empty: run the pipeline first")
    if args.record:
        write_json(paths.WAITING, {"date": time.strftime("%Y-%m-%d"), "commit": git_commit(), "systems": found})
        print(f"recorded in {paths.WAITING}")


if __name__ == "__main__":
    main()
