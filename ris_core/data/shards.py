"""Shards: Arrow IPC files, one row per image, memory-mapped for random access.

A row holds the letterboxed image (raw uint8 pixels, or JPEG bytes of them), the image's annotations with exact masks
(COCO RLE at the ORIGINAL size) and its referents with tokenised sentences. No pickle anywhere; any Arrow reader opens a
shard. `write_shard` is one unit of work: it depends on nothing but its arguments, so a shard's bytes are the same
whichever worker writes it, and it writes under a temporary name first, so a file with the final name is always whole.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image, UnidentifiedImageError

from ris_core.data.letterbox import Mode, letterbox_image
from ris_core.data.records import ImageRecord
from ris_core.data.text import encode

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
JPEG_QUALITY = 95

_SENTENCE = pa.struct(
    [("sent_id", pa.int64()), ("sent", pa.string()), ("raw", pa.string()), ("tokens", pa.list_(pa.uint16()))]
)
_REF = pa.struct(
    [("ref_id", pa.int64()), ("ann_id", pa.int64()), ("split", pa.string()), ("sentences", pa.list_(_SENTENCE))]
)
_INSTANCE = pa.struct(
    [
        ("ann_id", pa.int64()),
        ("category", pa.string()),
        ("iscrowd", pa.bool_()),
        ("bbox", pa.list_(pa.float32(), 4)),
        ("counts", pa.string()),
    ]
)
SHARD_SCHEMA = pa.schema(
    [
        ("image_id", pa.int64()),
        ("file_name", pa.string()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("image", pa.large_binary()),
        ("instances", pa.list_(_INSTANCE)),
        ("refs", pa.list_(_REF)),
    ]
)


@dataclass(frozen=True)
class ShardOptions:
    """What decides a shard's content besides its records; part of the manifest and of every shard's metadata."""

    image_size: int
    storage: str = "pixels"
    resample: Mode = "opencv4"
    text: str = "sent"


def shard_fingerprint(records: Sequence[ImageRecord], options: ShardOptions) -> str:
    """Name of a shard's content: records, options and schema version. Equal fingerprints mean equal rows."""
    content = [SCHEMA_VERSION, asdict(options), [asdict(record) for record in records]]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def load_image(path: Path) -> np.ndarray:
    """Decode an image file to RGB uint8 (H, W, 3). EXIF orientation is ignored, as COCO's annotations do.

    Raises OSError (also for a truncated file) or PIL.UnidentifiedImageError.
    """
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def write_shard(path: Path, records: Sequence[ImageRecord], image_root: Path, options: ShardOptions) -> dict[str, Any]:
    """Decode, letterbox and write the images of one shard; returns its manifest entry.

    An image that cannot be decoded, or whose size is not the annotated one, is left out and named with its reason under
    `quarantined`. A whole shard with the same fingerprint that already lies at `path` is kept as it is.
    """
    fingerprint = shard_fingerprint(records, options)
    entry = _finished_entry(path, fingerprint)
    if entry is not None:
        return entry
    rows, quarantined = [], []
    for record in records:
        try:
            rows.append(_row(record, load_image(image_root / record.file_name), options))
        except (OSError, UnidentifiedImageError, DataMismatch) as error:
            # PIL's messages hold object addresses, which would change the bytes from run to run.
            reason = str(error) if isinstance(error, DataMismatch) else type(error).__name__
            quarantined.append({"image_id": record.image_id, "file_name": record.file_name, "reason": reason})
    entry = {"file": path.name, "images": len(rows), "splits": _split_counts(rows), "quarantined": quarantined}
    metadata = {
        "ris.schema_version": str(SCHEMA_VERSION),
        "ris.fingerprint": fingerprint,
        "ris.entry": json.dumps(entry),
    }
    table = pa.Table.from_pylist(rows, schema=SHARD_SCHEMA.with_metadata(metadata)).combine_chunks()
    temporary = path.with_name(path.name + ".tmp")
    with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    os.replace(temporary, path)
    return {**entry, "sha256": _sha256(path)}


class DataMismatch(Exception):
    """An image contradicts its annotation (its size, say)."""


def _row(record: ImageRecord, rgb: np.ndarray, options: ShardOptions) -> dict[str, Any]:
    if rgb.shape[:2] != (record.height, record.width):
        found, wanted = f"{rgb.shape[1]}x{rgb.shape[0]}", f"{record.width}x{record.height}"
        raise DataMismatch(f"the image is {found}, its annotations are for {wanted}")
    pixels = letterbox_image(rgb, options.image_size, mode=options.resample)
    return {
        "image_id": record.image_id,
        "file_name": record.file_name,
        "height": record.height,
        "width": record.width,
        "image": _encode(pixels, options.storage),
        "instances": [
            {
                "ann_id": item.ann_id,
                "category": item.category,
                "iscrowd": bool(item.iscrowd),
                "bbox": list(item.bbox),
                "counts": item.counts,
            }
            for item in record.instances
        ],
        "refs": [
            {
                "ref_id": ref.ref_id,
                "ann_id": ref.ann_id,
                "split": ref.split,
                "sentences": [{**asdict(s), "tokens": encode(getattr(s, options.text))} for s in ref.sentences],
            }
            for ref in record.refs
        ],
    }


def _encode(pixels: np.ndarray, storage: str) -> bytes:
    if storage == "pixels":
        return pixels.tobytes()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()


def decode_pixels(content: pa.Buffer, storage: str, image_size: int) -> np.ndarray:
    """The letterboxed image of a row, uint8 (S, S, 3); a view into the memory map when pixels are stored raw."""
    if storage == "pixels":
        return np.frombuffer(content, np.uint8).reshape(image_size, image_size, 3)
    with Image.open(io.BytesIO(content.to_pybytes())) as image:
        return np.asarray(image.convert("RGB"))


def _split_counts(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, int]]:
    images: Counter[str] = Counter()
    refs: Counter[str] = Counter()
    sentences: Counter[str] = Counter()
    for row in rows:
        images.update({ref["split"] for ref in row["refs"]})
        for ref in row["refs"]:
            refs[ref["split"]] += 1
            sentences[ref["split"]] += len(ref["sentences"])
    return {
        split: {"images": images[split], "refs": refs[split], "sentences": sentences[split]} for split in sorted(refs)
    }


def _finished_entry(path: Path, fingerprint: str) -> dict[str, Any] | None:
    if not path.exists():
        return None
    with pa.memory_map(str(path)) as source:
        metadata = pa.ipc.open_file(source).schema.metadata
    if metadata.get(b"ris.fingerprint") != fingerprint.encode():
        return None
    return {**json.loads(metadata[b"ris.entry"]), "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(
    folder: Path, dataset: str, options: ShardOptions, entries: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Write `manifest.json` last, after all its shards: a folder with a manifest is a finished one."""
    entries = sorted(entries, key=lambda entry: entry["file"])
    splits: dict[str, Counter[str]] = {}
    for entry in entries:
        for split, counts in entry["splits"].items():
            splits.setdefault(split, Counter()).update(counts)
    content = {
        "schema_version": SCHEMA_VERSION,
        "dataset": dataset,
        **asdict(options),
        "images": sum(entry["images"] for entry in entries),
        "splits": {split: dict(counts) for split, counts in sorted(splits.items())},
        "shards": [{key: entry[key] for key in ("file", "images", "sha256")} for entry in entries],
        "quarantined": [bad for entry in entries for bad in entry["quarantined"]],
    }
    temporary = folder / (MANIFEST + ".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, folder / MANIFEST)
    return content
