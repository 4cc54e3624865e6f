"""`dvc repro` with stages side by side that do not wait for each other, and one Ray for all of them.

python -m pipelines.repro

DVC itself runs one stage after the other, and each starts a Ray of its own. On few cores that is a third of the time: the
start of a Ray, imports and small models leave a second core idle. DVC still says what depends on what and what is up to
date, and records what was made: every stage is a `dvc repro --single-item` of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from graphlib import TopologicalSorter
from typing import Annotated

import typer

from pipelines import cluster
from pipelines.stage import run

AT_ONCE = 2  # stages, where they compute on CPUs


def main(
    at_once: Annotated[
        int | None,
        typer.Option(min=1, help=f"stages at a time; default: {AT_ONCE}, or 1 where there is a GPU to share"),
    ] = None,
) -> None:
    """Bring everything up to date that `dvc repro` would, with independent stages side by side."""
    from ris_core.errors import ClusterError, ConfigError

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
        threads = max(1, cluster.smallest_node() // lanes)
        environment |= {cluster.AT_ONCE: str(lanes), "OMP_NUM_THREADS": str(threads)}
        width = max(map(len, stages))
        failed = in_order(stages, lambda stage: reproduce(stage, width, environment), lanes)
    if failed:
        raise ClusterError(
            f"{', '.join(failed)} failed, for the reason above. What was finished is kept: run this again to go on"
        )


def outdated() -> dict[str, list[str]]:
    """Stages that DVC finds changed, and all that come after them; with each, those of them that it waits for."""
    from dvc.repo import Repo

    with Repo() as repo:
        graph = repo.index.graph  # edges lead from a stage to what it depends on
        changed = set(repo.status())
        names = {stage: stage.addressing for stage in graph}
        waits_for = {names[stage]: [names[other] for other in graph.successors(stage)] for stage in graph}
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

    After a failure what is running ends, and nothing else begins.
    """
    order = TopologicalSorter(stages)
    order.prepare()
    running: dict[Future[bool], str] = {}
    failed: list[str] = []
    with ThreadPoolExecutor(at_once) as lanes:
        while True:
            if not failed:
                running |= {lanes.submit(work, stage): stage for stage in order.get_ready()}
            if not running:
                return failed
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                stage = running.pop(future)
                if future.cancelled():
                    continue
                if future.result():
                    order.done(stage)
                else:
                    failed.append(stage)
                    for waiting in running:
                        waiting.cancel()


def reproduce(stage: str, width: int, environment: Mapping[str, str]) -> bool:
    """One stage by DVC, every line it prints under its name; whether it succeeded."""
    command = [sys.executable, "-m", "dvc", "--wait-for-lock", "repro", "--single-item", stage]
    with subprocess.Popen(
        command, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(f"{stage:{width}} | {line.rstrip()}", flush=True)
    return process.returncode == 0


if __name__ == "__main__":
    run(main)
