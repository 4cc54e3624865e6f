"""Tables of expressions as people have them: CSV, JSON lines, a JSON list, Parquet. A row is a dict of plain values."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ris_core.data.refer.untrusted import parse_json
from ris_core.errors import DataError

ENDINGS = (".csv", ".jsonl", ".json", ".parquet")
Row = Mapping[str, Any]


def read_table(content: bytes, path: Path) -> list[tuple[str, Row]]:
    """Give the rows of a file, each with the place that a message names it by ("line 3").

    Raises DataError for another kind of file, or one that is damaged; every damaged line of JSON lines is listed.
    """
    if path.suffix == ".parquet":
        return _numbered(_parquet(content, path), "row", 1)
    if path.suffix == ".csv":
        return _csv(_text(content, path), path)
    if path.suffix == ".jsonl":
        return _json_lines(_text(content, path), path)
    if path.suffix == ".json":
        rows = parse_json(content, path, "Write a list of objects.")
        if not isinstance(rows, list):
            raise DataError(f"{path} holds no list of objects but {type(rows).__name__}")
        return _numbered(rows, "entry", 1)
    raise DataError(f"{path}: expressions are read from {', '.join(ENDINGS)}, not from '{path.suffix}'")


def _text(content: bytes, path: Path) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise DataError(f"{path} is not UTF-8 text at line {line}: save it as UTF-8") from None


def _csv(text: str, path: Path) -> list[tuple[str, Row]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    rows: list[tuple[str, Row]] = []
    try:
        for row in reader:
            given: dict[Any, Any] = row
            if None in given or None in given.values():  # more cells than the header, or fewer
                raise DataError(
                    f"{path} line {reader.line_num}: it has not as many cells as the header; put texts with commas in quotes"
                )
            rows.append((f"line {reader.line_num}", {key: value for key, value in row.items() if value != ""}))
    except csv.Error as error:
        raise DataError(f"{path} line {reader.line_num}: no CSV ({error})") from None
    return rows


def _json_lines(text: str, path: Path) -> list[tuple[str, Row]]:
    rows: list[tuple[str, Row]] = []
    wrong: list[str] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                rows.append((f"line {number}", json.loads(line)))
            except (ValueError, RecursionError) as error:
                wrong.append(f"line {number}: {error}")
    if wrong:
        shown = "; ".join(wrong[:5]) + ("; ..." if len(wrong) > 5 else "")
        raise DataError(f"{path}: {len(wrong)} lines are no JSON: {shown}")
    return rows


def _parquet(content: bytes, path: Path) -> list[Row]:
    try:
        return list(pq.read_table(pa.BufferReader(content)).to_pylist())
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a whole Parquet file ({error})") from None


def _numbered(rows: list[Any], what: str, first: int) -> list[tuple[str, Row]]:
    return [(f"{what} {number}", row) for number, row in enumerate(rows, start=first)]
