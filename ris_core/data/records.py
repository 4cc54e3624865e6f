"""Records: what the reader hands to the rest of the pipeline, one `ImageRecord` per image with its referents.

They are kept as one Parquet file per dataset, one row per image; nothing later reads a pickle or instances.json again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ris_core.errors import DataError
from ris_core.files import replaced_file

SCHEMA_VERSION = "1"
ROW_GROUP_IMAGES = 2048


@dataclass(frozen=True, slots=True)
class Sentence:
    """One referring expression: `raw` as the annotator typed it, `sent` the dataset's cleaned lower-case form."""

    sent_id: int
    sent: str
    raw: str


@dataclass(frozen=True, slots=True)
class Instance:
    """One annotated object of an image, whether anybody refers to it or not.

    `bbox` is (x, y, width, height) in pixels and `area` in square pixels, both as annotated; `iscrowd` is 0 or 1.
    `counts` is the COCO compressed RLE of the union of its parts at the original image size (`ris_core.data.masks`).
    """

    ann_id: int
    category_id: int
    category: str
    iscrowd: int
    bbox: tuple[float, float, float, float]
    area: float
    counts: str


@dataclass(frozen=True, slots=True)
class Reference:
    """One referred object: `ann_id` names its `Instance` in the same `ImageRecord`; it has at least one sentence."""

    ref_id: int
    ann_id: int
    category_id: int
    split: str
    sentences: tuple[Sentence, ...]


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """One image; `file_name` is the path of its file relative to the dataset root, with forward slashes."""

    image_id: int
    file_name: str
    height: int
    width: int
    instances: tuple[Instance, ...]
    refs: tuple[Reference, ...]


def _struct(**fields: pa.DataType) -> pa.DataType:
    return pa.struct([pa.field(name, kind, nullable=False) for name, kind in fields.items()])


def _list(item: pa.DataType, size: int = -1) -> pa.DataType:
    return pa.list_(pa.field("item", item, nullable=False), size)


_SENTENCE = _struct(sent_id=pa.int64(), sent=pa.string(), raw=pa.string())
_INSTANCE = _struct(
    ann_id=pa.int64(),
    category_id=pa.int64(),
    category=pa.string(),
    iscrowd=pa.int8(),
    bbox=_list(pa.float64(), 4),
    area=pa.float64(),
    counts=pa.string(),
)
_REFERENCE = _struct(
    ref_id=pa.int64(), ann_id=pa.int64(), category_id=pa.int64(), split=pa.string(), sentences=_list(_SENTENCE)
)
RECORDS_SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.int64(), nullable=False),
        pa.field("file_name", pa.string(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("instances", _list(_INSTANCE), nullable=False),
        pa.field("refs", _list(_REFERENCE), nullable=False),
    ]
)


_REF_ID = "refs.list.element.ref_id"  # of RECORDS_SCHEMA's columns as Parquet calls them


def write_records(path: str | Path, records: Sequence[ImageRecord], dataset: str) -> None:
    """Write records to a Parquet file, one row per image in the given order; equal records give equal bytes.

    The schema version and the dataset's name go into the file's metadata. The file appears only when it is whole.
    """
    path = Path(path)
    metadata = {"ris.schema": "records", "ris.schema_version": SCHEMA_VERSION, "ris.dataset": dataset}
    schema = RECORDS_SCHEMA.with_metadata(metadata)
    with replaced_file(path) as temporary, pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
        for start in range(0, len(records), ROW_GROUP_IMAGES):  # one group in memory at a time
            rows = [_as_row(record) for record in records[start : start + ROW_GROUP_IMAGES]]
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))


def read_records(path: str | Path, first: int = 0, last: int | None = None) -> list[ImageRecord]:
    """Read what `write_records` wrote, in the same order: rows first..last-1 (all, by default).

    Only the row groups that hold these rows are read, so that a task can fetch its share of a large file. Rows beyond
    the end are left out, as in a slice. Raises DataError when the file is missing, is no whole Parquet file, or was
    written in another schema version.
    """
    records: list[ImageRecord] = []
    with _opened(Path(path)) as file:
        last = file.metadata.num_rows if last is None else last
        start = 0
        for group in range(file.num_row_groups):
            end = start + file.metadata.row_group(group).num_rows
            low, high = max(first, start), min(last, end)
            if low < high:
                rows = file.read_row_group(group).slice(low - start, high - low)
                records += [_from_row(row) for row in rows.to_pylist()]
            start = end
    return records


def count_records(path: str | Path) -> int:
    """Count the records (images) that a file holds, from its footer alone. Raises DataError as `read_records` does."""
    with _opened(Path(path)) as file:
        return int(file.metadata.num_rows)


def count_references(path: str | Path) -> int:
    """Count the referents that a file holds, from its footer alone. Raises DataError as `read_records` does."""
    with _opened(Path(path)) as file:
        groups = [file.metadata.row_group(number) for number in range(file.num_row_groups)]
        columns = [group.column(place) for group in groups for place in range(group.num_columns)]
        return sum(column.num_values for column in columns if column.path_in_schema == _REF_ID)


@contextmanager
def _opened(path: Path) -> Iterator[pq.ParquetFile]:
    """Open the Parquet file, its version and columns checked; what is damaged inside becomes a DataError as well."""
    if not path.is_file():
        raise DataError(f"{path}: no such records file; the stage `prepare` writes it (dvc repro prepare)")
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            version = (schema.metadata or {}).get(b"ris.schema_version", b"none").decode()
            if version != SCHEMA_VERSION:
                raise DataError(
                    f"{path} has schema version {version}, this code reads {SCHEMA_VERSION}; run `prepare` again"
                )
            if not schema.equals(RECORDS_SCHEMA):
                raise DataError(f"{path} has other columns than records have; run `prepare` again")
            yield file
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path} is not a whole Parquet file ({error}); delete it and run `prepare` again") from None


def _as_row(record: ImageRecord) -> dict[str, Any]:
    return {
        "image_id": record.image_id,
        "file_name": record.file_name,
        "height": record.height,
        "width": record.width,
        "instances": [
            {name: getattr(instance, name) for name in Instance.__dataclass_fields__} for instance in record.instances
        ],
        "refs": [
            {
                "ref_id": ref.ref_id,
                "ann_id": ref.ann_id,
                "category_id": ref.category_id,
                "split": ref.split,
                "sentences": [{"sent_id": s.sent_id, "sent": s.sent, "raw": s.raw} for s in ref.sentences],
            }
            for ref in record.refs
        ],
    }


def _from_row(row: dict[str, Any]) -> ImageRecord:
    return ImageRecord(
        image_id=row["image_id"],
        file_name=row["file_name"],
        height=row["height"],
        width=row["width"],
        instances=tuple(Instance(**{**instance, "bbox": tuple(instance["bbox"])}) for instance in row["instances"]),
        refs=tuple(
            Reference(**{**ref, "sentences": tuple(Sentence(**sentence) for sentence in ref["sentences"])})
            for ref in row["refs"]
        ),
    )
