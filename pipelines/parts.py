"""A folder made in parts by Ray Data, one task each: a run that was stopped goes on with the parts it had finished."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from operator import itemgetter
from pathlib import Path

from pipelines import cluster, transport
from pipelines.transport import Place, Road
from ris_core import errors, files
from ris_core.errors import RISError
from ris_core.options import Plain, digest
from ris_core.storage import Storage

Row = dict[str, str]
Names = Callable[[Plain, str], Sequence[str] | None]  # of a task's input: the files that it needs


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


def run_tasks(
    tasks: Sequence[Plain], write: Callable[[Row], Row], use_gpu: str = "no", names: Names = lambda task, place: None
) -> list[Plain]:
    """Run `write` over all tasks by Ray Data, one at a time for each worker; gives what it returned, in order.

    It gets a row {"task": JSON text} and returns {"done": JSON text}: Ray Data would turn nested values into Arrow
    columns, whose types differ from block to block. Of a task, `inputs` are files and folders by name, and `path` is what
    `write` makes; for workers on nodes that share no folder with this one they are local copies, of a folder those files
    that `names` tells (None: all). `use_gpu` is that of the section `cluster`.
    """
    if not tasks:
        return []
    with cluster.connected():
        gpus = 1 if use_gpu != "no" and cluster.has_gpu(use_gpu) else None
        road = Road.find()
        if road.storage is not None:
            return _elsewhere(tasks, write, gpus, names, road, road.storage)
        return [done for _, done in sorted(_run(list(enumerate(tasks)), write, gpus), key=itemgetter(0))]


def _run(
    tasks: Sequence[tuple[int, Plain]], write: Callable[[Row], Row], gpus: int | None
) -> Iterator[tuple[int, Plain]]:
    """Give numbers of tasks with what `write` returned, as they come."""
    items = [{"number": str(number), "task": json.dumps(task)} for number, task in tasks]
    rows = cluster.data().from_items(items, override_num_blocks=len(items))

    def numbered(row: Row) -> Row:
        try:
            return {"number": row["number"], "error": "", **write({"task": row["task"]})}
        except RISError as error:  # Ray would show it amidst tracebacks, and forget its kind
            return {"number": row["number"], "error": type(error).__name__, "done": str(error)}

    for row in rows.map(numbered, num_gpus=gpus).iter_rows():
        if row["error"]:
            raise getattr(errors, row["error"], RISError)(row["done"])
        yield int(row["number"]), json.loads(row["done"])


def _elsewhere(
    tasks: Sequence[Plain], write: Callable[[Row], Row], gpus: int | None, names: Names, road: Road, storage: Storage
) -> list[Plain]:
    """Run tasks whose inputs and results travel through the storage; what had come back before is not made again."""
    done = {number: entry for number, task in enumerate(tasks) if (entry := _returned(Path(task["path"]))) is not None}
    offered: dict[str, Place] = {}

    def place_of(task: Plain, name: str) -> Place:
        path, only = Path(task["inputs"][name]), names(task, name)
        if only is not None:
            return road.offer(path, only)
        if str(path) not in offered:
            offered[str(path)] = road.offer(path)
        return offered[str(path)]

    waiting = [
        (number, {**task, "inputs": {name: place_of(task, name).plain() for name in task["inputs"]}})
        for number, task in enumerate(tasks)
        if number not in done
    ]

    def travelling(row: Row) -> Row:
        task = json.loads(row["task"])
        task["inputs"] = {name: str(Place.of(place).local()) for name, place in task["inputs"].items()}
        with tempfile.TemporaryDirectory(prefix="ris-") as folder:
            task["path"] = str(Path(folder) / Path(task["path"]).name)
            entry = json.loads(write({"task": json.dumps(task)})["done"])
            given = transport.give(Path(task["path"]), storage.place)
        return {"done": json.dumps({"entry": entry, "given": given})}

    for number, returned in _run(waiting, travelling, gpus) if waiting else ():
        path, (digest, _) = Path(tasks[number]["path"]), returned["given"]
        transport.take(path, digest, storage)
        files.write_json(_note(path), returned)
        done[number] = returned["entry"]
    return [done[number] for number in range(len(tasks))]


def _returned(path: Path) -> Plain | None:
    """Give what was noted of a part that came back whole in a run before."""
    try:
        noted: Plain = json.loads(_note(path).read_text())
        return noted["entry"] if files.file_sha256(path) == noted["given"][0] else None
    except (OSError, ValueError):
        return None


def _note(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")
