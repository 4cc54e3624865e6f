"""Small results that are written whole or not at all."""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write_json(path: Path, content: Any) -> None:
    """Indented JSON with a final newline, keys in the order given."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]], without_rows: Sequence[str] = ()) -> None:
    """Rows with the keys of the first as header, or `without_rows` where there are none; the form `dvc plots` reads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else list(without_rows), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(temporary, path)


def write_text(path: Path, text: str) -> None:
    """Text under its name only when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


@contextmanager
def replaced_folder(path: Path) -> Iterator[Path]:
    """A fresh folder to fill, which takes the place of `path` when the block ends, and goes away when it raises."""
    temporary = path.with_name(path.name + ".partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
    except BaseException:
        shutil.rmtree(temporary)
        raise
    shutil.rmtree(path, ignore_errors=True)
    os.replace(temporary, path)
