"""Clocks, memory, the machine in words, and the table and record in which every benchmark reports.

Nothing here imports torch, so that a benchmark's driver stays as light as the program it measures.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import platform
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

RECORDS = Path(__file__).parent / "records"

T = TypeVar("T")


@dataclass(frozen=True)
class Timing:
    """Seconds: CPU time of this process over all its threads, and wall time."""

    cpu: float
    wall: float


def best_of(
    functions: Mapping[str, Callable[[], object]], rounds: int, finish: Callable[[], object] = lambda: None
) -> dict[str, Timing]:
    """The least CPU and wall time of each function; with two rounds or more, a slow first call does not count.

    A round goes through all functions, so that a burst of other work on the machine falls on all peers alike. `finish` is
    waited for before and after each call (`torch.cuda.synchronize` on a GPU, which works on while Python goes ahead).
    """
    found = {name: Timing(math.inf, math.inf) for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            finish()
            cpu, wall = time.process_time(), time.perf_counter()
            function()
            finish()
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            found[name] = Timing(min(found[name].cpu, cpu), min(found[name].wall, wall))
    return found


def alone(function: Callable[..., T], *arguments: Any) -> T:
    """The result of a function of a module, called in a fresh process: its memory and threads are nobody else's."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def peak_memory() -> float:
    """Most memory this process ever had resident, in MiB (Linux).

    From /proc, not from getrusage: there, a process begins with the peak of the one that started it.
    """
    return _status_kib("/proc/self/status", "VmHWM") / 1024


def _status_kib(path: str, name: str) -> int:
    for line in Path(path).read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    raise KeyError(f"{path} has no entry {name}")


def machine() -> dict[str, Any]:
    """The machine in words that matter to a timing; never its name."""
    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.split(":", 1)[1].strip()
            break
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(_status_kib("/proc/meminfo", "MemTotal") / 2**20, 1),
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": version("torch"),
    }


@dataclass(frozen=True)
class Row:
    """One number. `ratio` is what it is of the thing named in `of` (a floor, a peer), measured in the same run."""

    what: str
    value: float
    unit: str
    ratio: float | None = None
    of: str = ""


@dataclass
class Report:
    """The rows of one benchmark with its settings and machine (whose load is taken when the benchmark begins)."""

    benchmark: str
    settings: dict[str, Any]
    machine: dict[str, Any] = field(default_factory=machine)
    rows: list[Row] = field(default_factory=list)

    def add(self, what: str, value: float, unit: str, ratio: float | None = None, of: str = "") -> None:
        """Append one row."""
        self.rows.append(Row(what, value, unit, ratio, of))

    def text(self) -> str:
        """A small table below one line each for the benchmark's settings and the machine."""
        width = max((len(row.what) for row in self.rows), default=0)
        unit = max((len(row.unit) for row in self.rows), default=0)
        lines = [f"{self.benchmark}: {_pairs(self.settings)}", f"on {_pairs(self.machine)}"]
        for row in self.rows:
            beside = "" if row.ratio is None else f"  {number(row.ratio)} x {row.of}"
            lines.append(f"  {row.what:{width}}  {number(row.value):>8} {row.unit:{unit}}{beside}".rstrip())
        return "\n".join(lines)

    def write(self, folder: Path = RECORDS) -> Path:
        """Keep the report as `<date>-<benchmark>.json`, with the commit; a later one of the same day replaces it."""
        from pipelines.fingerprint import git_commit
        from ris_core.files import write_json

        date = time.strftime("%Y-%m-%d")
        path = folder / f"{date}-{self.benchmark}.json"
        write_json(path, {"date": date, "commit": git_commit(), **asdict(self)})
        return path

    def finish(self, record: bool) -> None:
        """Print the table, and keep it as a record if that was asked for."""
        print(self.text())
        if record:
            print(f"recorded in {self.write()}")


def number(value: float) -> str:
    """Three significant digits, thousands written out: 0.0123, 1.5, 98,700."""
    if value and abs(value) >= 1000:
        digits = 2 - math.floor(math.log10(abs(value)))
        return f"{round(value, digits):,.0f}"
    return f"{value:.3g}"


def _pairs(content: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {number(v) if isinstance(v, float) else v}" for name, v in content.items())
