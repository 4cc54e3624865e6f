"""Where a user lets a verb write: what is wrong with such a place is told before any work is done, and nothing is lost there."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from ris_core.errors import ConfigError, short


def problem_of_new(out: Path) -> str | None:
    """Tell what keeps a new file or folder from being made at `out`, in words that go on after its name.

    Nothing may be there yet, not even a link that leads nowhere. Folders above it are made if need be.
    """
    if os.path.lexists(out):
        return "exists already, and nothing is overwritten: give another name"
    above = next(each for each in out.absolute().parents if os.path.lexists(each))
    return problem_of_folder(above) if above.is_dir() else f"cannot be made: {short(str(above))} is no folder"


def problem_of_folder(folder: Path) -> str | None:
    """Tell what keeps files from being written in a folder. It is tried: permissions tell little of a disk."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return f"cannot be written: {error.strerror or error}"


def followed(out: Path) -> Path:
    """Give the place that a name leads to through links. Of links in a circle it gives one of them, which is no file."""
    return Path(os.path.realpath(out))


@contextmanager
def written(out: Path) -> Iterator[None]:
    """Turn what the machine says against writing in the block, a full disk say, into a ConfigError about --out."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # the second for whatever a disk says to its writer
        told = (error.strerror if isinstance(error, OSError) else None) or error
        raise ConfigError(f"--out {out} cannot be written: {told}") from error
