"""The folder in which `ris predict-batch` leaves its answers: parts in the order of what was asked, each whole or not there.

_manifest.json        what decides the answers, and how many rows and parts there are
part-00000.parquet    rows of `batch_input.Asked.pairs` with the columns of `batch_answers.ANSWERS`
.waiting/             answers whose part lacks others yet, while it is made: rows about one image may be far apart
.images/              images that came inside a table, while it is made

Readers of Parquet folders pass over names that begin with a dot or an underscore.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import places
from pipelines.batch_answers import ANSWERS, FOUND, ROW
from ris_core.errors import ConfigError, list_problems, short
from ris_core.files import PARTIAL, replaced_file, write_json
from ris_core.options import Plain

MANIFEST = "_manifest.json"
IMAGES, WAITING = ".images", ".waiting"
IMAGES_EACH, ROWS = 64, 512  # the most of one part: seconds to minutes of work, so that little is lost
FORMAT = 1


def cut(rows: Sequence[int], images: Sequence[int]) -> list[int]:
    """Cut runs of so many rows and images into pieces of at most `ROWS` and `IMAGES_EACH`, or of one run.

    Gives the runs at which pieces begin, and the number of all runs.
    """
    bounds, held, seen = [0], 0, 0
    for run, (length, new) in enumerate(zip(rows, images, strict=True)):
        if run > bounds[-1] and (held + length > ROWS or seen + new > IMAGES_EACH):
            bounds.append(run)
            held, seen = 0, 0
        held, seen = held + length, seen + new
    return [*bounds, len(rows)]


def parts_of(image_of: np.ndarray) -> np.ndarray:
    """Give the rows at which parts begin, and the number of all rows; rows in a row about one image stay together.

    Of images only those count that were not there before, as the others' answers are made with those.
    """
    starts = np.concatenate(([0], np.flatnonzero(np.diff(image_of)) + 1))
    new = np.zeros(len(starts), int)
    new[np.unique(image_of[starts], return_index=True)[1]] = 1
    bounds = cut(np.diff(starts, append=len(image_of)).tolist(), new.tolist())
    return np.append(starts, len(image_of))[bounds]


def problem_of(out: Path) -> str | None:
    """Tell why a folder that is there is none for answers, in words that go on after its name."""
    if not os.path.lexists(out):
        return None
    if not out.is_dir():
        return "is no folder: give another name"
    if not (out / MANIFEST).exists() and any(not _is_left(path) for path in out.iterdir()):
        return "holds other things than answers: give a new folder"
    return None


@contextmanager
def opened(out: Path, decides: Plain, pairs: pa.Table, bounds: np.ndarray) -> Iterator[Answers]:
    """Open a folder for answers, new or left by a run that was stopped, for this process alone.

    `decides` is all that the answers depend on, `bounds` are rows as `parts_of` gives them. Raises ConfigError if another
    process has it, or if it holds answers that depend on something else.
    """
    with places.written(out):
        out.mkdir(parents=True, exist_ok=True)
    lock = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"--out {out}: another run is writing there now: wait for it, or give another folder"
            ) from None
        content = {"format": FORMAT, **decides, "rows": len(pairs), "parts": len(bounds) - 1}
        if (out / MANIFEST).exists():
            _check_same(out, content)
        else:
            with places.written(out):
                write_json(out / MANIFEST, content)
        for stale in [path for path in out.iterdir() if PARTIAL in path.name]:
            stale.unlink()
        yield Answers(out, pairs, bounds)
    finally:
        os.close(lock)


def _is_left(path: Path) -> bool:
    """Tell whether a file is what a run leaves that was killed before it had begun."""
    return path.name.startswith(".") and PARTIAL in path.name


def _check_same(out: Path, content: Plain) -> None:
    try:
        known = json.loads((out / MANIFEST).read_text())
    except ValueError:
        known = None
    if not isinstance(known, dict):
        raise ConfigError(f"--out {out}: its {MANIFEST} is damaged: give another folder")
    names = [name for name in dict.fromkeys([*content, *known]) if known.get(name) != content.get(name)]
    if names:
        differing = [f"{name}: {short(known.get(name))} there, {short(content.get(name))} now" for name in names]
        title = f"--out {out} holds answers to something else"
        raise ConfigError(list_problems(title, differing, "Give another folder; nothing in this one was changed."))


class Answers:
    """The answers that are there, and those that come. Dims: N rows in P parts.

    missing: bool (N,), rows that nobody has answered yet. errors: how many rows have no answer but a reason.
    """

    def __init__(self, folder: Path, pairs: pa.Table, bounds: np.ndarray):
        self.folder, self.pairs, self.bounds = folder, pairs, bounds
        self.missing = np.ones(len(pairs), bool)
        self.errors, self._first_error = 0, (len(pairs), "")
        self._coming: dict[int, list[pa.Table]] = {}
        self.parts_before = sum(self._is_there(part) for part in range(len(bounds) - 1))
        for path in sorted((folder / WAITING).glob("*.parquet")):
            self._take_up(path)

    @property
    def example(self) -> str:
        """Give the first row that has no answer, and why."""
        row, error = self._first_error
        return f"row {row}: {error}"

    def add(self, found: pa.Table) -> int:
        """Take from a table of `FOUND` the rows that are missing; how many. Parts of which all rows are there are written."""
        found = self._new(found)
        before = len(self._coming)
        self._distribute(found)
        if self._coming:
            waiting = found.filter(pa.array(np.isin(self._part_of(found), list(self._coming))))
            if len(waiting):
                self._keep(waiting, self.folder / WAITING / f"{waiting[ROW][0].as_py():09d}.parquet")
        elif before:
            shutil.rmtree(self.folder / WAITING, ignore_errors=True)
        return len(found)

    def finish(self) -> None:
        """Remove what only the making needed."""
        assert not self.missing.any()
        for name in (IMAGES, WAITING):
            shutil.rmtree(self.folder / name, ignore_errors=True)

    def _path(self, part: int) -> Path:
        return self.folder / f"part-{part:05d}.parquet"

    def _new(self, found: pa.Table) -> pa.Table:
        return found.filter(pa.array(self.missing[found[ROW].to_numpy()]))

    def _part_of(self, found: pa.Table) -> np.ndarray:
        return np.searchsorted(self.bounds, found[ROW].to_numpy(), "right") - 1

    def _is_there(self, part: int) -> bool:
        first, end = self.bounds[part : part + 2]
        if not self._path(part).exists():
            return False
        try:
            table = pq.read_table(self._path(part), columns=["error"], partitioning=None)
        except (OSError, pa.ArrowException):  # of a machine that lost its power, say
            table = None
        if table is None or len(table) != end - first:
            print(f"warning: {self._path(part)} is damaged: it is made again", file=sys.stderr)
            return False
        self._count(table["error"], first)
        self.missing[first:end] = False
        return True

    def _take_up(self, path: Path) -> None:
        """Take answers that waited when a run was stopped."""
        try:
            found = pq.read_table(path, schema=FOUND, partitioning=None)
        except (OSError, pa.ArrowException):
            print(f"warning: {path} is damaged: its rows are answered again", file=sys.stderr)
            return
        self._distribute(self._new(found))

    def _distribute(self, found: pa.Table) -> None:
        parts = self._part_of(found)
        self.missing[found[ROW].to_numpy()] = False
        for part in np.unique(parts).tolist():
            self._coming.setdefault(part, []).append(found.filter(pa.array(parts == part)))
            first, end = self.bounds[part : part + 2]
            if not self.missing[first:end].any():
                self._write(part, pa.concat_tables(self._coming.pop(part)).sort_by(ROW))

    def _write(self, part: int, found: pa.Table) -> None:
        first, end = self.bounds[part : part + 2]
        assert found[ROW].to_pylist() == list(range(first, end))
        table = self.pairs.slice(first, end - first)
        for name in ANSWERS.names:
            table = table.append_column(ANSWERS.field(name), found[name])
        self._keep(table, self._path(part))
        self._count(found["error"], first)

    def _keep(self, table: pa.Table, path: Path) -> None:
        with places.written(self.folder), replaced_file(path) as temporary:
            pq.write_table(table, temporary)

    def _count(self, errors: pa.ChunkedArray, first: int) -> None:
        wrong = errors.is_valid().to_numpy().nonzero()[0]
        self.errors += len(wrong)
        if len(wrong):
            self._first_error = min(self._first_error, (int(first + wrong[0]), errors[int(wrong[0])].as_py()))
