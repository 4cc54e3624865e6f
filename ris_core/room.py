"""Whether a disk has room for what a stage is about to write: told and, where it has not, refused before the work begins."""

from __future__ import annotations

import shutil
from pathlib import Path

from ris_core.errors import ConfigError


def free(place: Path) -> int:
    """Tell how many bytes are free on the disk of a folder, which need not be there yet."""
    there = next(each for each in (place, *place.absolute().parents) if each.is_dir())
    return shutil.disk_usage(there).free


def size(count: int) -> str:
    """Give bytes as people read them."""
    power = min((len(str(count)) - 1) // 3, 3)
    return f"{count / 1000**power:.1f} {('bytes', 'kB', 'MB', 'GB')[power]}" if power else f"{count} bytes"


def check(place: Path, needed: int, what: str, remedy: str) -> None:
    """Raise ConfigError unless so many bytes are free for what will be done there."""
    if needed > (there := free(place)):
        raise ConfigError(f"{what}: that takes {size(needed)} in {place}, where {size(there)} are free: {remedy}")
