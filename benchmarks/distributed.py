"""What Ray Train costs: the same epoch in a plain process and in Ray Train, under torchrun and with two workers; checkpoints;
what a stage takes beside its training; and one that has nothing to do.

python -m benchmarks.distributed [--steps 150] [--rounds 2] [--record]      (needs what `make repro` makes of CRIS)
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from omegaconf import OmegaConf

from benchmarks.measure import Report
from pipelines import cluster, paths

NEVER = 10**9
SYSTEM, DATASET = "cris", "shapes"


class Place:
    """A working directory with the data of this repository and parameters for one short epoch."""

    def __init__(self, root: Path, steps: int):
        self.root, self.steps = root, steps
        for folder in (paths.shards(DATASET), paths.clip("rn"), paths.start(SYSTEM, DATASET)):
            (root / folder).parent.mkdir(parents=True, exist_ok=True)
            (root / folder).symlink_to(folder.absolute())
        self.params = OmegaConf.load(paths.PARAMS)
        self.batch = self.params.train.batch_images * self.params.train.expressions_per_image

    def run(self, command: list[str], **environment: str) -> tuple[float, float]:
        """Run a training with parameters of its own; samples a second of its epoch, and seconds in all."""
        for left in ("runs", "plain"):
            shutil.rmtree(self.root / left, ignore_errors=True)
        began = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", *command],
            cwd=self.root,
            env={**os.environ, "PYTHONPATH": os.getcwd(), **environment},
            capture_output=True,
            text=True,
            check=False,
        )
        seconds = time.perf_counter() - began
        if done.returncode:
            raise RuntimeError(f"{command} failed:\n{done.stdout}{done.stderr}")
        (state,) = self.root.glob("*/**/00001-0000000/state.json")
        points = [row for row in json.loads(state.read_text())["points"] if "samples_per_second" in row]
        return points[-1]["samples_per_second"], seconds

    def set(self, workers: int, every: int) -> None:
        """Write params.yaml."""
        train = {"epochs": 1, "steps_per_epoch": self.steps, "validate_images": 8, "checkpoint_every_steps": every}
        changes = {"cris": {"train": train}, "cluster": {"train_workers": workers}}
        OmegaConf.save(OmegaConf.merge(self.params, changes), self.root / "params.yaml")


def main() -> None:
    """Run the command line of this module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150, help="of the epoch")
    parser.add_argument("--rounds", type=int, default=2, help="the best of so many counts")
    parser.add_argument("--record", action="store_true", help="keep the numbers under benchmarks/records/")
    arguments = parser.parse_args()
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # who starts a stage twice has its modules compiled
    cores = len(os.sched_getaffinity(0))
    report = Report("distributed", {"steps": arguments.steps, "rounds": arguments.rounds, "system": SYSTEM})
    inputs = ["--shards", str(paths.shards(DATASET)), "--clip", str(paths.clip("rn")), "--out", "plain"]
    plain = ["ris_core.train", "--system", SYSTEM, "--device", "cpu", *inputs]
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", *plain]
    ray = ["pipelines.train", "--system", SYSTEM, "--dataset", DATASET]
    with tempfile.TemporaryDirectory() as folder, cluster.shared() as joined:
        place = Place(Path(folder), arguments.steps)
        all_cores, one = {"OMP_NUM_THREADS": str(cores)}, {"OMP_NUM_THREADS": "1"}
        ways: dict[str, tuple[int, int, Callable[[], tuple[float, float]]]] = {
            "plain process": (1, NEVER, lambda: place.run(plain, **all_cores)),
            "plain process, checkpoints every 50 steps": (1, 50, lambda: place.run(plain, **all_cores)),
            "Ray Train, one worker": (1, NEVER, lambda: place.run(ray, **joined)),
            "torchrun, two processes": (2, NEVER, lambda: place.run(torchrun, **one)),
            "Ray Train, two workers": (2, NEVER, lambda: place.run(ray, **joined)),
        }
        rates = dict.fromkeys(ways, 0.0)
        beside = dict.fromkeys(ways, float("inf"))
        for _ in range(arguments.rounds):
            for name, (workers, every, way) in ways.items():
                place.set(workers, every)
                rate, seconds = way()
                rates[name] = max(rates[name], rate)
                beside[name] = min(beside[name], seconds - arguments.steps * place.batch / rate)
        nothing = float("inf")
        for _ in range(arguments.rounds):
            began = time.perf_counter()
            subprocess.run(
                [sys.executable, "-m", *ray],
                cwd=place.root,
                env={**os.environ, "PYTHONPATH": os.getcwd(), **joined},
                capture_output=True,
                check=True,
            )
            nothing = min(nothing, time.perf_counter() - began)
    first, second = "plain process", "torchrun, two processes"
    for name, rate in rates.items():
        peer = second if "two" in name else first
        report.add(name, rate, "samples/s", None if name == peer else rate / rates[peer], peer)
    report.add("a stage beside its epoch, in a running Ray", beside["Ray Train, one worker"], "s")
    report.add("a stage with nothing to do", nothing, "s")
    report.finish(arguments.record)


if __name__ == "__main__":
    main()
