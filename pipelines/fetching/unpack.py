"""Zip archives, unpacked as if anybody had made them: what is wrong with an archive is told, all of it, before a file is written.

Nothing is written outside of the folder, no link and no device is made, and no more than is allowed, whatever the archive
says of itself: bytes are counted while they are written.
"""

from __future__ import annotations

import stat
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

from ris_core.errors import DataError, list_problems, short
from ris_core.files import replaced_file

PIECE = 1 << 20

_UNPACKED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_ENCRYPTED = 1  # bit of flag_bits


@dataclass(frozen=True)
class Limits:
    """How many files an archive may have, and how many bytes they may take unpacked, together and each."""

    files: int
    total: int
    each: int


ANNOTATIONS = Limits(files=1_000, total=2_000_000_000, each=1_000_000_000)
PHOTOS = Limits(files=100_000, total=16_000_000_000, each=20_000_000)


def unpack(
    archive: Path, folder: Path, limits: Limits, chosen: Callable[[str], bool], each: Callable[[int], None]
) -> int:
    """Unpack the files whose names, without folders, are `chosen`, right into a folder; how many there are.

    Files that are there with their size are left as they are. Each appears whole or not at all. `each` is told the bytes
    of a file when it is there. Raises DataError for an archive that cannot be used, or of which too much is unpacked.
    """
    with _opened(archive) as opened:
        members = checked(opened, archive, limits)
        wanted = [(PurePosixPath(member.filename).name, member) for member in members]
        wanted = [(name, member) for name, member in wanted if chosen(name)]
        twice = [name for name, count in Counter(name for name, _ in wanted).items() if count > 1]
        if twice:
            problems = [f"{name} lies in several of its folders" for name in twice]
            raise DataError(list_problems(f"{archive} cannot be unpacked", problems))
        left = limits.total
        for name, member in wanted:
            place = folder / name
            if not (place.is_file() and place.stat().st_size == member.file_size):
                with replaced_file(place) as temporary:
                    left -= _write(opened, member, temporary, min(left, limits.each), archive)
            each(member.file_size)
    return len(wanted)


def unpacked_bytes(archive: Path, limits: Limits) -> int:
    """Tell how many bytes the files of an archive take, as it says. Raises DataError as `unpack` does."""
    with _opened(archive) as opened:
        return sum(member.file_size for member in checked(opened, archive, limits))


def checked(opened: zipfile.ZipFile, archive: Path, limits: Limits) -> list[zipfile.ZipInfo]:
    """Give the files of an archive, without folders. Raises DataError with all that is wrong with any entry."""
    entries = opened.infolist()
    if len(entries) > limits.files:
        raise DataError(f"{archive} has {len(entries):,} entries, and {limits.files:,} are allowed: it is not unpacked")
    problems = [f"{short(entry.orig_filename)} {told}" for entry in entries for told in _faults(entry, limits)]
    names = Counter(entry.filename.rstrip("/").casefold() for entry in entries)
    problems += [f"{short(name)} is there {count} times" for name, count in names.items() if count > 1]
    total = sum(entry.file_size for entry in entries)
    if total > limits.total:
        problems.append(f"its files would take {total:,} bytes, and {limits.total:,} are allowed")
    if problems:
        raise DataError(list_problems(f"{archive} is not unpacked", problems, "Get it from another source."))
    return [entry for entry in entries if not entry.is_dir()]


def _faults(entry: zipfile.ZipInfo, limits: Limits) -> Iterator[str]:
    """Tell what forbids to unpack an entry, in words that go on after its name."""
    name = entry.orig_filename
    parts = name.replace("\\", "/").split("/")
    if name.startswith(("/", "\\")) or PureWindowsPath(name).drive:
        yield "is an absolute path"
    if ".." in parts:
        yield "leads out of its folder"
    if "\\" in name or "\0" in name or not name.isprintable():
        yield "has signs in its name that no file has"
    kind = stat.S_IFMT(entry.external_attr >> 16)
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        yield "is a link" if kind == stat.S_IFLNK else "is a device, a pipe or a socket"
    if entry.flag_bits & _ENCRYPTED:
        yield "is encrypted"
    if entry.compress_type not in _UNPACKED:
        yield f"is packed by method {entry.compress_type}, which is not unpacked here"
    if entry.file_size > limits.each:
        yield f"would take {entry.file_size:,} bytes, and {limits.each:,} are allowed for a file"


def _write(opened: zipfile.ZipFile, member: zipfile.ZipInfo, target: Path, most: int, archive: Path) -> int:
    """Unpack a file, whose CRC is checked by this; its bytes. Raises DataError for more bytes than allowed, or damage."""
    written = 0
    try:
        with opened.open(member) as packed, target.open("wb") as file:
            while piece := packed.read(PIECE):
                written += len(piece)
                if written > most:
                    raise DataError(
                        f"{archive}: unpacking stopped in {short(member.filename)}: it takes more than the {most:,} bytes "
                        "that are left of those allowed"
                    )
                file.write(piece)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise _damaged(archive, error) from error
    return written


@contextmanager
def _opened(archive: Path) -> Iterator[zipfile.ZipFile]:
    try:
        opened = zipfile.ZipFile(archive)
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        raise _damaged(archive, error) from error
    with opened:
        yield opened


def _damaged(archive: Path, error: Exception) -> DataError:
    return DataError(
        f"{archive} is damaged, or no zip archive ({error}): fetch it again, or get it from another source"
    )
