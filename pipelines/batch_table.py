"""Tables that users bring, read exactly as they are: Parquet, CSV and JSON lines.

CSV has no types, so that all of its values are text: an id of 007 stays one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from ris_core.errors import DataError, list_problems, short

IMAGE = "image"
BYTES = "bytes"  # the field of it, where the column is as Hugging Face's datasets write it: {bytes, path}
ENDINGS = (".parquet", ".csv", ".jsonl")
ROWS_AT_ONCE = 256  # of a column of image files


def read_table(path: Path) -> pa.Table:
    """Read a table, but for a column `image` of bytes, which `read_bytes` gives. Raises DataError if it cannot be read."""
    try:
        if path.suffix.lower() == ".parquet":
            names = [field.name for field in pq.read_schema(path) if not _of_bytes(field)]
            return _plain(pq.read_table(path, columns=names, partitioning=None))
        if path.suffix.lower() == ".csv":
            return _read_csv(path)
        return _read_json_lines(path)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read: {_line(error)}") from error


def has_bytes(path: Path) -> bool:
    """Tell whether a table has a column `image` of image files themselves."""
    return path.suffix.lower() == ".parquet" and any(map(_of_bytes, pq.read_schema(path)))


def read_bytes(path: Path) -> Iterator[bytes | None]:
    """Give the column `image` of a Parquet file, value by value, a little at a time. Raises DataError if it cannot be read."""
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(ROWS_AT_ONCE, columns=[IMAGE]):
                column = batch.column(0)
                if pa.types.is_struct(column.type):
                    column = pc.struct_field(column, BYTES)
                yield from (value.as_py() for value in column)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read: {_line(error)}") from error


def _of_bytes(field: pa.Field) -> bool:
    kind = field.type
    if pa.types.is_struct(kind) and BYTES in kind.names:
        kind = kind.field(BYTES).type
    return field.name == IMAGE and bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _plain(table: pa.Table) -> pa.Table:
    """Give dictionaries of text as text, as whoever reads the answers would have it."""
    for place, field in enumerate(table.schema):
        if pa.types.is_dictionary(field.type):
            table = table.set_column(place, field.name, table.column(place).cast(field.type.value_type))
    return table


def _read_csv(path: Path) -> pa.Table:
    wide = pa.csv.ReadOptions(block_size=1 << 26)  # a quoted text may have many lines
    parsing = pa.csv.ParseOptions(newlines_in_values=True)
    with pa.csv.open_csv(path, wide, parsing) as reader:
        names = reader.schema.names
    texts = pa.csv.ConvertOptions(column_types={name: pa.string() for name in names}, strings_can_be_null=False)
    return pa.csv.read_csv(path, wide, parsing, texts)


def _read_json_lines(path: Path) -> pa.Table:
    rows: list[dict[str, Any]] = []
    problems: list[str] = []
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    _add_line(rows, problems, number, line)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no UTF-8 text: {error.reason} at byte {error.start}") from error
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns: dict[str, pa.Array] = {}
    for name in names:
        try:
            columns[name] = pa.array([row.get(name) for row in rows])
        except (pa.ArrowException, OverflowError, UnicodeEncodeError) as error:
            problems.append(f"{short(name)}: its values make no column ({_line(error)})")
    if problems:
        raise DataError(list_problems(f"{path} cannot be read as JSON lines", problems))
    return pa.table(columns)


def _add_line(rows: list[dict[str, Any]], problems: list[str], number: int, line: str) -> None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        problems.append(f"line {number}: no JSON ({_line(error)})")
        return
    if isinstance(row, dict):
        rows.append(row)
    else:
        problems.append(f"line {number}: a {type(row).__name__}, not names and values")


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
