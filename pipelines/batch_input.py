"""What `ris predict-batch` is asked: a folder or a table of images, and expressions -> one row per pair of the two."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image
from tqdm import tqdm

from pipelines.batch_answers import ANSWERS
from pipelines.batch_table import ENDINGS, IMAGE, has_bytes, read_bytes, read_table
from ris_core.data.images import FORMATS
from ris_core.errors import DataError, list_problems, short
from ris_core.files import file_sha256, replaced_file
from ris_core.options import digest

TEXT = "text"
NO_IMAGE = "no image is named"
AT_ONCE = 8  # files that are read to know their content
HOW = "give a folder of images, or a table (" + ", ".join(ENDINGS) + ") with the columns image and text"


@dataclass(frozen=True)
class Asked:
    """All that is asked. Dims: N pairs of an image and an expression about it, M images.

    pairs: N rows, columns image (string), text (string) and those that are carried through. image_of: int64 (N,), which of
    the images a pair is about. images: M names, paths as given; of images that lie in the table itself their SHA-256. source:
    the folder or file. skipped: what in the folder is no image, in words.
    """

    pairs: pa.Table
    image_of: np.ndarray
    images: list[str]
    source: Path
    of_bytes: bool
    skipped: str = ""

    @property
    def folder(self) -> Path:
        """Give the folder from which the names of images lead to them."""
        return self.source if self.source.is_dir() else self.source.parent


@dataclass(frozen=True)
class Photo:
    """An image's file, or why there is none; `key` stands for its content."""

    key: str
    path: Path | None = None
    problem: str = ""


def read_asked(source: Path, expressions: Sequence[str]) -> Asked:
    """Read what is asked; every image with each of `expressions`, where there are some.

    Raises DataError for an input that cannot be used as a whole. What is wrong with one row of it is told in its answer.
    """
    if source.is_dir():
        return _of_folder(source, expressions)
    if not source.exists():
        raise DataError(f"there is no folder or table {short(str(source))}: {HOW}")
    if not source.is_file() or source.suffix.lower() not in ENDINGS:
        raise DataError(f"{source} is no folder and no table that is read here: {HOW}")
    return _of_table(source, expressions)


def read_expressions(path: Path) -> list[str]:
    """Read one expression a line; lines that are blank do not count. Raises DataError if there are none."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = (
            error.strerror if isinstance(error, OSError) else f"no UTF-8 text: {error.reason} at byte {error.start}"
        )
        raise DataError(f"--expressions {path} cannot be read: {reason}") from error
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise DataError(f"--expressions {path} is empty: write one expression a line")
    return found


def _of_folder(folder: Path, expressions: Sequence[str]) -> Asked:
    if not expressions:
        raise DataError(f"{folder} has images and no expressions: give --expressions FILE or --expression TEXT")
    names, skipped = _images_below(folder)
    told = ", ".join(f"{count} {what}" for what, count in sorted(skipped.items()))
    if not names:
        kinds = ", ".join(sorted(_endings()))
        raise DataError(f"{folder} holds no image ({kinds}){f'; there are {told}' if told else ''}: {HOW}")
    table = pa.table({IMAGE: pa.array(names, pa.string())})
    pairs, parent = _with_each(table, expressions)
    return Asked(pairs, parent, names, folder, False, told)


def _images_below(folder: Path) -> tuple[list[str], Counter[str]]:
    """Give the names of all images below a folder, sorted, and how much else there is."""
    endings = _endings()
    names: list[str] = []
    skipped: Counter[str] = Counter()
    for place, folders, files in os.walk(folder):
        hidden = [name for name in folders if name.startswith(".")]
        linked = [name for name in folders if name not in hidden and os.path.islink(os.path.join(place, name))]
        skipped.update({"hidden": len(hidden), "links to folders": len(linked)})
        folders[:] = [name for name in folders if name not in hidden]
        for name in files:
            path = Path(place, name)
            if name.startswith("."):
                skipped["hidden"] += 1
            elif path.suffix.lower() not in endings or not (path.is_file() or path.is_symlink()):
                skipped["of another kind"] += 1
            elif not _is_text(str(path)):
                skipped["with names that are no UTF-8"] += 1
            else:
                names.append(path.relative_to(folder).as_posix())
    return sorted(names), +skipped


def _endings() -> set[str]:
    return {ending for ending, name in Image.registered_extensions().items() if name in FORMATS}


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _of_table(path: Path, expressions: Sequence[str]) -> Asked:
    table = read_table(path)
    in_table = IMAGE not in table.column_names and has_bytes(path)
    problems = _problems(table, in_table, bool(expressions))
    if problems:
        raise DataError(list_problems(f"{path} cannot be answered", problems))
    if in_table:
        keys = [None if value is None else hashlib.sha256(value).hexdigest() for value in read_bytes(path)]
        images = pa.chunked_array([pa.array(keys, pa.string())])
    else:
        images = table[IMAGE].cast(pa.string())
    others = [name for name in table.column_names if name not in (IMAGE, TEXT)]
    rows = pa.table({IMAGE: images, **({} if expressions else {TEXT: table[TEXT]}), **{n: table[n] for n in others}})
    pairs, parent = _with_each(rows, expressions) if expressions else _with_own(rows)
    known = images.combine_chunks().fill_null("").dictionary_encode()
    names = known.dictionary.to_pylist()
    return Asked(pairs, known.indices.to_numpy().astype(np.int64)[parent], names, path, in_table)


def _problems(table: pa.Table, in_table: bool, with_expressions: bool) -> list[str]:
    """Tell what keeps a table as a whole from being answered."""
    names = table.column_names
    has = ", ".join(short(name) for name in names[:20]) or "none"
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        return [f"the column {short(name)} is there {names.count(name)} times" for name in twice]
    problems: list[str] = []
    if IMAGE not in names and not in_table:
        problems.append(f"there is no column image (a path, or an image file's bytes); the columns are {has}")
    elif IMAGE in names and not _of_text(table.schema.field(IMAGE).type):
        problems.append(
            f"the column image is {table.schema.field(IMAGE).type}: paths or an image file's bytes are read"
        )
    if TEXT in names and with_expressions:
        problems.append("there is a column text, and expressions are given beside it: leave out one of the two")
    elif TEXT not in names and not with_expressions:
        problems.append(f"there is no column text, and no --expressions or --expression; the columns are {has}")
    elif TEXT in names and not _of_text(_inner(table.schema.field(TEXT).type)):
        problems.append(f"the column text is {table.schema.field(TEXT).type}: texts or lists of texts are read")
    if taken := [name for name in names if name in ANSWERS.names]:
        problems.append(f"answers have columns {', '.join(taken)}, too: rename them")
    if not len(table):
        problems.append("it has no rows")
    return problems


def _of_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind))


def _inner(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_list(kind) or pa.types.is_large_list(kind) else kind


def _with_each(rows: pa.Table, expressions: Sequence[str]) -> tuple[pa.Table, np.ndarray]:
    """Give each row with each expression, and the row that a pair comes from, int64 (N,)."""
    parent = np.repeat(np.arange(len(rows)), len(expressions))
    texts = pa.array(expressions, pa.string()).take(pa.array(np.tile(np.arange(len(expressions)), len(rows))))
    return rows.take(pa.array(parent)).add_column(1, TEXT, texts), parent


def _with_own(rows: pa.Table) -> tuple[pa.Table, np.ndarray]:
    """Give each row with each of its own texts, and the row that a pair comes from; a row without any is kept, as a pair
    without text.
    """
    texts = rows[TEXT].combine_chunks()
    if not (pa.types.is_list(texts.type) or pa.types.is_large_list(texts.type)):
        return rows.set_column(1, TEXT, texts.cast(pa.string())), np.arange(len(rows))
    counts = pc.fill_null(pc.list_value_length(texts), 0).to_numpy(zero_copy_only=False)
    parent = np.repeat(np.arange(len(rows)), np.maximum(counts, 1))
    none = (counts == 0)[parent]
    own = texts.flatten().cast(pa.string()).take(pa.array(np.cumsum(~none) - 1, mask=none))
    return rows.drop_columns([TEXT]).take(pa.array(parent)).add_column(1, TEXT, own), parent


def photos(asked: Asked, kept: Path) -> list[Photo]:
    """Find the files of all images, and what they hold; of images that lie in a table those in the folder `kept`."""
    if asked.of_bytes:
        return [Photo(key, kept / key) if key else Photo(key, problem=NO_IMAGE) for key in asked.images]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        found = pool.map(lambda name: _photo(asked.folder, name), asked.images)
        return list(tqdm(found, "reading images", len(asked.images), unit="img", disable=None, leave=False))


def _photo(folder: Path, name: str) -> Photo:
    path = folder / name
    try:
        if not name or "\0" in name:
            return Photo(name, problem="the image's name is no path" if name else NO_IMAGE)
        if not path.is_file():
            return Photo(f"none: {name}", problem="the image is no file" if path.exists() else "there is no such file")
        return Photo(file_sha256(path), path)
    except OSError as error:
        return Photo(f"unreadable: {name}", problem=f"the image cannot be read: {error.strerror or error}")


def unpack(asked: Asked, wanted: Iterable[str], kept: Path) -> None:
    """Write images that lie in the table itself as files named by their SHA-256 into the folder `kept`."""
    missing = {key for key in wanted if key and not (kept / key).exists()}
    for value in read_bytes(asked.source) if missing else ():
        key = "" if value is None else hashlib.sha256(value).hexdigest()
        if key in missing:
            with replaced_file(kept / key) as temporary:
                temporary.write_bytes(value or b"")
            missing.remove(key)


def digest_of(asked: Asked, found: Sequence[Photo], expressions: Sequence[str]) -> str:
    """Give a short name for all that is asked: equal content, equal name, wherever it lies."""
    table = None if asked.source.is_dir() else file_sha256(asked.source)
    return digest([table, list(expressions), asked.images if table is None else None, [photo.key for photo in found]])
