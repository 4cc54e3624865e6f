"""One large file, fetched: from the first of its addresses that gives it, gone on with where it was stopped, checked.

Beside the place where it will be lies what there is of it, `NAME.part`, and of what that is the beginning, `NAME.part.json`.
Whoever downloads holds the lock of the folder (`stock.py`), so that nobody else writes there.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

from pipelines.fetching.catalogue import ARCHIVE_MAGIC, Wanted
from pipelines.fetching.sources import Broken, Changed, Opened, Refused, Sources, shown
from ris_core.contents import pointer
from ris_core.errors import DataError, list_problems
from ris_core.files import file_sha256, write_json

ATTEMPTS = 5  # in a row that bring nothing new
PAUSE = 1.0  # seconds before the second attempt; twice as long before each further one
LONG = 1_000_000_000  # bytes, of which the SHA-256 takes seconds
LARGEST = 1 << 35  # bytes of a file whose size is not known

Tell = Callable[[str], None]


def download(
    wanted: Wanted, addresses: Sequence[str], target: Path, sources: Sources, tell: Tell, remedy: str = ""
) -> Path:
    """Fetch a file, unless it is there; it appears at `target` whole and with the right SHA-256, or not at all.

    Each address is tried several times as long as it may help, then the next one; `tell` is told of what fails. Raises
    DataError, ending in `remedy`, that lists why each address did not give it.
    """
    if target.is_file():
        told = _mismatch(wanted, target)
        if told is None:
            return target
        tell(f"{target} {told}: it is fetched anew")
    part = _Part(target, wanted, sources, tell)
    problems = []
    for address in addresses:
        try:
            part.fetch(address)
            os.replace(part.path, target)
            part.forget()
        except Refused as error:
            problems.append(f"{shown(address)} {error}")
            tell(problems[-1])
        else:
            return target
    raise DataError(list_problems(f"{wanted.name} could not be fetched", problems, remedy))


def part_bytes(target: Path) -> int:
    """Tell how many bytes of a file are there already."""
    found = (path for path in (target, _beside(target, ".part")) if path.is_file())
    return max((path.stat().st_size for path in found), default=0)


def what_instead(head: bytes, magic: bytes, what: str) -> str | None:
    """Tell what a file is that does not begin as it should, in words that go on after its address."""
    if head.startswith(magic):
        return None
    if told := pointer(head):
        return f"gives no {what}: it {told[0]}"
    text = head.decode("utf-8", errors="replace").lstrip("\ufeff \t\r\n")
    if not text:
        return "gives an empty file"
    if text.startswith("<"):
        title = re.search(r"<(title|message)[^>]*>\s*([^<]{1,80})", text, re.IGNORECASE)
        said = f", which says '{title[2].strip()}'" if title else ""
        return f"gives a web page in place of the {what}{said}"
    return f"gives no {what}: it begins with {head[:12]!r}"


def waiting(attempt: int, error: Broken) -> float:
    """Tell how many seconds to wait after the n-th failure (from 1) in a row."""
    return error.wait if error.wait is not None else PAUSE * 2 ** (attempt - 1)


class _Part:
    """What there is of a file: how much, of which version at which addresses it is the beginning."""

    def __init__(self, target: Path, wanted: Wanted, sources: Sources, tell: Tell):
        self.path, self.note = _beside(target, ".part"), _beside(target, ".part.json")
        self.wanted, self.sources, self.tell = wanted, sources, tell
        self.addresses: list[str] = []
        self.mark, self.total = "", wanted.size
        self._read_note()

    @property
    def size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def fetch(self, address: str) -> None:
        """Get all that is missing from an address, and check the whole. Raises Refused."""
        self._complete(address)
        if self.size > LONG:
            self.tell(f"checking the SHA-256 of {self.wanted.name}")
        mixed = len(self.addresses) > 1
        told = _mismatch(self.wanted, self.path)
        if told and mixed:  # of two addresses that say they have the same, one may be wrong
            self.forget()
            self._complete(address)
            told = _mismatch(self.wanted, self.path)
        if told:
            self.forget()
            raise Refused(told)

    def forget(self) -> None:
        """Begin at the beginning."""
        self.path.unlink(missing_ok=True)
        self.note.unlink(missing_ok=True)
        self.addresses, self.mark, self.total = [], "", self.wanted.size

    def _complete(self, address: str) -> None:
        failures, furthest = 0, self.size
        while True:
            try:
                self._go_on(address)
                return
            except Changed as error:
                if self.wanted.size is not None and shown(address) not in self.addresses:
                    raise Refused(str(error)) from error  # what there is was of a file of the right size
                self.forget()
                failure = Broken(f"{error}, and what was fetched before is given up", 0)
            except Broken as error:
                failure = error
            failures = 0 if self.size > furthest else failures + 1
            furthest = max(furthest, self.size)
            if failures >= ATTEMPTS:
                raise Refused(f"{failure}, {ATTEMPTS} times in a row")
            seconds = waiting(max(failures, 1), failure)
            self.tell(f"{shown(address)} {failure}: trying again in {seconds:g} s")
            time.sleep(seconds)

    def _go_on(self, address: str) -> None:
        """Fetch from where it was stopped to the end. Raises Refused, Broken or Changed."""
        begun = self.size
        if begun and begun == self.total:
            return
        mark = self.mark if self.addresses[-1:] == [shown(address)] else ""
        with self.sources.open(address, begun, mark) as opened:
            pieces = iter(opened.pieces)
            first = next(pieces, b"")
            if opened.start == 0 and (told := what_instead(first, ARCHIVE_MAGIC, "archive")):
                raise Refused(told)  # before what was fetched from elsewhere is given up for it
            self._check_size(opened)
            self._write(address, opened, chain([first], pieces))
        if opened.total is not None and self.size < opened.total:
            raise Broken(f"ended after {self.size:,} of {opened.total:,} bytes")

    def _check_size(self, opened: Opened) -> None:
        size, total = self.wanted.size, opened.total
        if size is not None and total is not None and total != size:
            raise Refused(f"has {total:,} bytes, published are {size:,}: that is another file")
        if opened.start and total is not None and self.total not in (None, total):
            raise Changed("has a file of another size")

    def _write(self, address: str, opened: Opened, pieces: Iterable[bytes]) -> None:
        known = opened.total or self.wanted.size
        with (
            self.path.open("r+b" if opened.start else "wb") as file,
            bar(self.wanted.name, known, opened.start) as progress,
        ):
            self._write_note(address, opened)  # the old beginning is gone by now, if it was of something else
            end = file.seek(opened.start)
            for piece in pieces:
                end += len(piece)
                if end > (known or LARGEST):
                    raise Refused(f"gives more than the {known or LARGEST:,} bytes that it should have")
                file.write(piece)
                progress.update(len(piece))

    def _read_note(self) -> None:
        with suppress(OSError, ValueError, KeyError, TypeError):
            note = json.loads(self.note.read_text())
            if note["sha256"] == list(self.wanted.sha256):
                self.addresses, self.mark, self.total = list(note["addresses"]), str(note["mark"]), note["total"]
        if not self.addresses:  # nobody knows what the part is of
            self.forget()

    def _write_note(self, address: str, opened: Opened) -> None:
        place = shown(address)  # signatures and passwords are nobody's business, and may be renewed
        self.addresses = [*(each for each in self.addresses if each != place and opened.start), place]
        self.mark, self.total = opened.mark, opened.total or self.wanted.size
        note = {"addresses": self.addresses, "mark": self.mark, "total": self.total, "sha256": self.wanted.sha256}
        write_json(self.note, note)


def bar(title: str, total: int | None, begun: int = 0) -> tqdm[NoReturn]:
    """Make a bar that counts bytes, seen where somebody watches."""
    return tqdm(desc=title, total=total, initial=begun, unit="B", unit_scale=True, disable=None)


def _beside(target: Path, ending: str) -> Path:
    return target.with_name(target.name + ending)


def _mismatch(wanted: Wanted, path: Path) -> str | None:
    """Tell how a file differs from what is wanted."""
    size, found = path.stat().st_size, file_sha256(path)
    if found in wanted.sha256:
        return None
    published = f"published is {' or '.join(wanted.sha256)}"
    sizes = f" ({size:,} bytes, published are {wanted.size:,})" if wanted.size not in (None, size) else ""
    return f"has the SHA-256 {found}, {published}{sizes}"
