"""Files and folders that are written whole or not at all: under a temporary name first, which is renamed at the end."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

PARTIAL = ".partial"  # begins the ending of everything that is not finished


@contextmanager
def replaced_file(path: Path) -> Iterator[Path]:
    """Give a name beside `path` to write a file under; it takes the place of `path` when the block ends, else it goes away.

    Every writer has a name of its own, as a worker that was given up may still be writing; the ending stays. The file is as
    readable as any new one of this process. The folder is made if it is not there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}{PARTIAL}-{os.getpid()}-{os.urandom(4).hex()}{path.suffix}")
    temporary.touch()
    mode = temporary.stat().st_mode
    try:
        yield temporary
        temporary.chmod(mode)  # safetensors, for one, puts a private file of its own in the place
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replaced_folder(path: Path) -> Iterator[Path]:
    """Give a fresh folder to fill, which takes the place of `path` when the block ends, and goes away when it raises."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + PARTIAL)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
    except BaseException:
        shutil.rmtree(temporary)
        raise
    put_folder(temporary, path)


def put_folder(finished: Path, path: Path) -> None:
    """Let a finished folder, which lies beside `path`, take its place.

    Who is stopped between the two renamings leaves what was there under the name of `replaced`.
    """
    old = replaced(path)
    if os.path.lexists(path):  # else the old one is all there is, and stays until the new one is in place
        _remove(old)
        os.replace(path, old)
    os.replace(finished, path)
    _remove(old)


def replaced(path: Path) -> Path:
    """Tell where a folder lies for a moment while another takes its place."""
    return path.with_name(path.name + ".old")


def _remove(path: Path) -> None:
    if path.is_symlink() or path.is_file():  # a link, as DVC lays folders out where its cache is linked
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def file_sha256(path: Path) -> str:
    """Give the SHA-256 of a file, hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write UTF-8."""
    with replaced_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: object) -> None:
    """Write indented JSON with a final newline, keys in the order given."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def write_csv(path: Path, rows: Sequence[Mapping[str, object]], without_rows: Sequence[str] = ()) -> None:
    """Write rows with the keys of the first as header, or `without_rows` where there are none; the form `dvc plots` reads."""
    with replaced_file(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else list(without_rows), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
