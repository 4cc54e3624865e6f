"""`dvc repro` with stages side by side that do not wait for each other, and one Ray for all of them.

python -m pipelines.repro

DVC itself runs one stage after the other, and each starts a Ray of its own: on few cores the second one idles through
imports, starts and small models. DVC still says what depends on what and what is up to date, and records what was made:
every stage is a `dvc repro --single-item` of its own.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from graphlib import TopologicalSorter
from typing import Annotated

import typer

from pipelines import cluster
from pipelines.stage import run
from ris_core.errors import ClusterError, ConfigError

RESOLVE = "resolve"  # the stage
AT_ONCE = 2  # stages, where they compute on CPUs
# What libraries say in every run and nobody can act on: Ray's core about its own actors, DVC about a remote.
NOISE = re.compile(r"core_worker\.cc:\d+: Actor with class name|^Use `dvc push` to send your updates")
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main(
    at_once: Annotated[
        int | None,
        typer.Option(min=1, help=f"stages at a time; default: {AT_ONCE}, or 1 where there is a GPU to share"),
    ] = None,
) -> None:
    """Bring everything up to date that `dvc repro` would, with independent stages side by side."""
    resolve()
    stages = outdated()
    if not stages:
        typer.echo("everything is up to date")
        return
    with cluster.shared() as environment:
        most = cluster.total_cpus()
        if at_once is not None and at_once > most:
            raise ConfigError(
                f"--at-once {at_once}: the cluster has {most} CPUs, and a stage needs one; use 1 to {most}"
            )
        lanes = at_once or (1 if cluster.has_gpu("auto") else min(AT_ONCE, most))
        environment |= {cluster.AT_ONCE: str(lanes)}
        if lanes > 1:  # what a stage computes outside Ray shares this machine's cores
            threads = max(1, len(os.sched_getaffinity(0)) // lanes)
            environment["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", str(threads))
        with stopped_together() as children:
            width = max(map(len, stages))
            failed = in_order(stages, lambda stage: reproduce(stage, width, environment, children), lanes)
    if failed:
        raise ClusterError(
            f"{', '.join(failed)} failed, for the reason above. What was finished is kept: run this again to go on"
        )


def resolve() -> None:
    """Bring the values that stages depend on up to date, if need be: only then DVC can tell what has changed.

    Raises ConfigError where the parameters cannot be used; the reason was printed.
    """
    if RESOLVE not in json.loads(dvc("status", "--json", RESOLVE)):
        return
    if subprocess.run(_dvc("repro", "--single-item", RESOLVE), check=False).returncode:
        raise ConfigError("the parameters cannot be used, for the reason above")


def outdated() -> dict[str, list[str]]:
    """Find stages of dvc.yaml that DVC finds changed, and all that come after them; with each, those of them it waits for."""
    waits_for: dict[str, list[str]] = {name: [] for name in dvc("stage", "list", "--name-only").split()}
    for first, second in re.findall(r'^"(.+)" -> "(.+)";$', dvc("dag", "--dot"), re.MULTILINE):
        if first in waits_for and second in waits_for:
            waits_for[second].append(first)
    # prepare.exclude_images_of reads datasets that DVC does not know of.
    written = [name for name in waits_for if name.startswith("synthesize@")]
    for name in [name for name in waits_for if name.startswith("prepare@")]:
        waits_for[name] = sorted({*waits_for[name], *written})
    changed = set(json.loads(dvc("status", "--json")))
    for stage in TopologicalSorter(waits_for).static_order():
        if changed.intersection(waits_for[stage]):
            changed.add(stage)
    return {
        stage: [other for other in others if other in changed]
        for stage, others in waits_for.items()
        if stage in changed
    }


def in_order(stages: Mapping[str, Sequence[str]], work: Callable[[str], bool], at_once: int) -> list[str]:
    """Do `work` for every stage after those it waits for, at most `at_once` at a time; the stages whose work failed.

    After a failure, or an interruption, what is running ends, and nothing else begins.
    """
    order = TopologicalSorter(stages)
    order.prepare()
    ready: deque[str] = deque()
    running: dict[Future[bool], str] = {}
    failed: list[str] = []
    with ThreadPoolExecutor(at_once) as lanes:
        while True:
            ready.extend(order.get_ready())
            while ready and len(running) < at_once and not failed:
                stage = ready.popleft()
                running[lanes.submit(work, stage)] = stage
            if not running:
                return failed
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                stage = running.pop(future)
                if future.result():
                    order.done(stage)
                else:
                    failed.append(stage)


def reproduce(stage: str, width: int, environment: Mapping[str, str], children: set[subprocess.Popen[str]]) -> bool:
    """Run one stage by DVC, every line it prints under its name; whether it succeeded. It is in `children` while it runs."""
    with subprocess.Popen(
        _dvc("repro", "--single-item", stage),
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,  # its own process group: `stopped_together` reaches DVC and the stage
    ) as process:
        children.add(process)
        assert process.stdout is not None
        for line in process.stdout:
            if not NOISE.search(line):
                print(f"{stage:{width}} | {line.rstrip()}", flush=True)
    children.discard(process)
    return process.returncode == 0


@contextmanager
def stopped_together() -> Iterator[set[subprocess.Popen[str]]]:
    """Let what ends this process in the block (Ctrl-C, SIGTERM, a closed terminal) first interrupt the children given."""
    children: set[subprocess.Popen[str]] = set()

    def stop(number: int, frame: object) -> None:
        for child in [child for child in children if child.poll() is None]:
            os.killpg(child.pid, signal.SIGINT)
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, stop) for number in STOPPING}
    try:
        yield children
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def dvc(*arguments: str) -> str:
    """Run a DVC command and give what it prints. Raises ConfigError with its message if it fails."""
    done = subprocess.run(_dvc(*arguments), capture_output=True, encoding="utf-8", errors="replace", check=False)
    if done.returncode:
        raise ConfigError(f"dvc {' '.join(arguments)} failed: {done.stderr.strip()}")
    return done.stdout


def _dvc(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "dvc", "--wait-for-lock", *arguments]


if __name__ == "__main__":
    run(main)
