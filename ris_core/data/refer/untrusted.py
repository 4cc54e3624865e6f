"""Reading files that came from elsewhere and may be anything: REFER pickles without running code, and JSON.

Everything that can be wrong with such a file becomes a `DataError` that names the file, the cause and the remedy.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ris_core.data.refer.plain_pickle import NotPlain, read_plain_pickle
from ris_core.errors import DataError

# The largest official refs file is well below 50 MB. What is read takes 14 times its size of memory at most, see plain_pickle.
PICKLE_CAP_BYTES = 2**30

_LOOKALIKES = (
    (b"version https://git-lfs", "is a git-LFS pointer, not the file itself: run `git lfs pull` where it came from"),
    (b"PK\x03\x04", "is a zip archive: unpack it"),
    (b"\x1f\x8b", "is a gzip archive: unpack it"),
    (b"<", "is an HTML or XML page (a server's error or download page saved under this name)"),
)


@dataclass(frozen=True, slots=True)
class InputFile:
    """What was read, for the audit report: path relative to the dataset root, size in bytes, SHA-256 in hex."""

    path: str
    size: int
    sha256: str


def read_input(root: Path, path: str, remedy: str, cap_bytes: int | None = None) -> tuple[bytes, InputFile]:
    """Read content and identity of `root/path`. Raises DataError if it is missing, too large, or plainly something else."""
    place = root / path
    if not place.is_file():
        raise DataError(f"{place}: no such file. {remedy}")
    if cap_bytes is not None and place.stat().st_size > cap_bytes:
        raise DataError(f"{place} has {place.stat().st_size:,} bytes, more than the allowed {cap_bytes:,}. {remedy}")
    content = place.read_bytes()
    start = content[:64].removeprefix(b"\xef\xbb\xbf").lstrip()
    if not start:
        raise DataError(f"{place} is empty. {remedy}")
    for magic, what in _LOOKALIKES:
        if start.startswith(magic):
            raise DataError(f"{place} {what}. {remedy}")
    return content, InputFile(path, len(content), hashlib.sha256(content).hexdigest())


def parse_pickle(content: bytes, path: Path, remedy: str) -> tuple[Any, str]:
    """Give containers, texts and numbers of a pickle, and the encoding its Python 2 `str` texts were read in.

    No global is ever looked up, so nothing can be executed. UTF-8 is tried first, strictly; Latin-1 reads any byte.
    Raises DataError for a pickle that needs a class or function, is damaged or cut short, or is JSON.
    """
    if content.lstrip()[:1] in (b"{", b"["):
        raise DataError(
            f"{path} is JSON text, not a pickle: call it {path.with_suffix('.json').name}, which is read as well. {remedy}"
        )
    try:
        try:
            return read_plain_pickle(content, "utf-8"), "utf-8"
        except UnicodeDecodeError:
            return read_plain_pickle(content, "latin-1"), "latin-1"
    except NotPlain as error:
        raise DataError(
            f"{path} asks for {error}, but a REFER pickle holds only lists, dicts, texts and numbers. Nothing was "
            f"executed; {_of_a_library(str(error), path, remedy)}"
        ) from None
    except ValueError as error:
        raise DataError(f"{path} is damaged, cut short or no pickle at all ({error}). {remedy}") from None


def _of_a_library(asked: str, path: Path, remedy: str) -> str:
    """Tell what to make of a pickle that asks for something: it may be an honest one, of other tools than REFER's."""
    if "Python object numpy." in asked or "Python object collections." in asked:
        return (
            f"where you wrote the file yourself, write {path.with_suffix('.json').name} in its place, which is read as well: "
            "`json.dump(refs, file, default=lambda value: value.tolist())`"
        )
    return f"the file may be malicious, so do not open it with pickle.load. {remedy}"


def read_json(
    root: Path, path: str, remedy: str, made: Callable[[dict[str, Any]], Any] | None = None
) -> tuple[Any, InputFile]:
    """Read value and identity of the JSON file `root/path`, without holding its bytes and its text at once.

    made: gives what becomes of each object as soon as it is read, so that a large file need not be held as Python has it.
    Raises DataError as `read_input` and `parse_json` do.
    """
    content, identity = read_input(root, path, remedy)
    try:
        text = content.decode(json.detect_encoding(content), "surrogatepass")  # as json.loads does
    except UnicodeDecodeError as error:
        raise _no_json(root / path, error, remedy) from None
    del content
    return parse_json(text, root / path, remedy, made), identity


def parse_json(
    content: bytes | str, path: Path, remedy: str, made: Callable[[dict[str, Any]], Any] | None = None
) -> Any:
    """Give the value of a JSON file. Raises DataError when it is damaged or cut short."""
    try:
        return json.loads(content, object_hook=made)
    except (ValueError, RecursionError) as error:
        raise _no_json(path, error, remedy) from None


def _no_json(path: Path, error: Exception, remedy: str) -> DataError:
    return DataError(f"{path} is damaged, cut short or no JSON at all ({error}). {remedy}")
