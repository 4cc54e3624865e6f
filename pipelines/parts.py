"""A folder made in parts by Ray Data, one task each: a run that was stopped goes on with the parts it had finished."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pipelines import cluster
from ris_core import files
from ris_core.options import Plain, digest

Row = dict[str, str]


@contextmanager
def collected(out: Path, *identity: object) -> Iterator[Path]:
    """Collect parts in a folder that takes the place of `out` when the block ends and stays as it is when it raises.

    Its name stands for `identity`, all that decides what the parts hold, so that only equal parts are found again. (DVC
    empties `out` itself before each run.)
    """
    work = out.with_name(f"{out.name}{files.PARTIAL}-{digest(identity)}")
    work.mkdir(parents=True, exist_ok=True)
    yield work
    files.put_folder(work, out)


def keep_only(folder: Path, names: Sequence[str]) -> None:
    """Delete other files: half a part of a run that was stopped, or parts of other data."""
    for stale in [path for path in folder.iterdir() if path.name not in names]:
        stale.unlink()


def run_tasks(tasks: Sequence[Plain], write: Callable[[Row], Row], use_gpu: str = "no") -> list[Plain]:
    """Run `write` over all tasks by Ray Data, one at a time for each worker; gives what it returned, in order.

    It gets a row {"task": JSON text} and returns {"done": JSON text}: Ray Data would turn nested values into Arrow
    columns, whose types differ from block to block. `use_gpu` is that of the section `cluster`.
    """
    if not tasks:
        return []
    with cluster.connected():
        gpus = 1 if use_gpu != "no" and cluster.has_gpu(use_gpu) else None
        rows = cluster.data().from_items([{"task": json.dumps(task)} for task in tasks], override_num_blocks=len(tasks))
        return [json.loads(row["done"]) for row in rows.map(write, num_gpus=gpus).take_all()]
