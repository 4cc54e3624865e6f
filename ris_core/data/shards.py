"""Shards: Arrow IPC files, one row per image, memory-mapped for random access.

A row holds the letterboxed image (raw uint8 pixels, or JPEG bytes of them), the image's annotations with exact masks
(COCO RLE at the ORIGINAL size), its referents with their sentences, and what each referent's mask is in training: made once
here, it is not made again in every epoch. No pickle anywhere; any Arrow reader opens a
shard. `write_shard` is one unit of work: it depends on nothing but its arguments, so a shard's bytes are the same
whichever worker writes it, and it writes under a temporary name first, so a file with the final name is always whole.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

import numpy as np
import pyarrow as pa
from PIL import Image

from ris_core.data import masks
from ris_core.data.images import BadImage, decode_image, load_image
from ris_core.data.letterbox import Mode, letterbox_image, letterbox_masks
from ris_core.data.records import ImageRecord
from ris_core.errors import ConfigError
from ris_core.files import file_sha256, replaced_file, write_json
from ris_core.options import option

if TYPE_CHECKING:
    from typing_extensions import Buffer

SCHEMA_VERSION = 3
TARGET_STRIDE = 4  # pixels per cell of training targets, as CRIS and LTS want them; 2 % more bytes beside pixels
MANIFEST = "manifest.json"
JPEG_QUALITY = 95
BYTES_PER_PIXEL = {"pixels": 3.0, "jpeg": 0.38}  # of photos of 640x480 at 416 and 560 a side, letterboxed
WRITE_PIECE = 1 << 20

_SENTENCE = pa.struct([("sent_id", pa.int64()), ("sent", pa.string()), ("raw", pa.string())])
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
        ("targets", pa.large_binary()),  # of each referent in turn, (S/4, S/4) levels 0..255
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


@dataclass(frozen=True)
class PreprocessParams:
    """Letterboxing of a dataset: the options of its shards, how large these are, and how many bad images are borne."""

    image_size: int = option(160, minimum=32)
    storage: str = option("pixels", choices=("pixels", "jpeg"))
    resample: str = option("opencv4", choices=get_args(Mode))
    images_per_shard: int = option(256, minimum=1)
    max_bad_images: float = option(0.01, minimum=0)

    def __post_init__(self) -> None:
        if self.image_size % TARGET_STRIDE:
            raise ConfigError(f"preprocess.image_size is {self.image_size}: use a multiple of {TARGET_STRIDE}")

    def shards(self) -> ShardOptions:
        """Give what decides a shard's content."""
        return ShardOptions(self.image_size, self.storage, cast("Mode", self.resample))


def expected_bytes(images: int, referents: int, options: ShardOptions) -> int:
    """Estimate what shards take on disk, without masks and sentences, some kB an image; of a JPEG's size what photos have."""
    pixels = options.image_size**2
    return round(images * pixels * BYTES_PER_PIXEL[options.storage] + referents * pixels / TARGET_STRIDE**2)


def shard_fingerprint(records: Sequence[ImageRecord], image_root: Path, options: ShardOptions) -> str:
    """Give the name of a shard's content: records, sizes of the image files, options and schema version.

    Equal fingerprints mean equal rows, unless an image was replaced by another one of the same size to the byte.
    """
    files = [image_root / record.file_name for record in records]
    sizes = [file.stat().st_size if file.is_file() else None for file in files]
    content = [SCHEMA_VERSION, options, list(records), sizes]
    text = json.dumps(content, sort_keys=True, default=_fields)
    return hashlib.sha256(text.encode()).hexdigest()


def _fields(item: Any) -> dict[str, Any]:
    """Give a dataclass for JSON. Unlike `asdict` it copies nothing, which matters for tens of thousands of records."""
    return {field.name: getattr(item, field.name) for field in fields(item)}


def write_shard(path: Path, records: Sequence[ImageRecord], image_root: Path, options: ShardOptions) -> dict[str, Any]:
    """Decode, letterbox and write the images of one shard; returns its manifest entry.

    An image that cannot be decoded, or whose size is not the annotated one, is left out and named with its reason under
    `quarantined`. A whole shard with the same fingerprint that already lies at `path` is kept as it is, unless it left
    out images, which may have been mended since.
    """
    fingerprint = shard_fingerprint(records, image_root, options)
    entry = _finished_entry(path, fingerprint)
    if entry is not None:
        return entry
    rows: list[dict[str, Any]] = []
    quarantined = []
    images = _Binary(len(records) * options.image_size**2 * (3 if options.storage == "pixels" else 1))
    targets = _Binary(sum(len(record.refs) for record in records) * (options.image_size // TARGET_STRIDE) ** 2)
    for record in records:
        try:
            images.append(_image(record, image_root, options))
            targets.append(_targets(record, options))
            rows.append(_row(record))
        except BadImage as error:
            quarantined.append({"image_id": record.image_id, "file_name": record.file_name, "reason": error.reason})
    entry = {"file": path.name, "images": len(rows), "splits": _split_counts(rows), "quarantined": quarantined}
    metadata = {
        "ris.schema_version": str(SCHEMA_VERSION),
        "ris.fingerprint": fingerprint,
        "ris.entry": json.dumps(entry),
    }
    table = _table(rows, images, targets).replace_schema_metadata(metadata)
    with replaced_file(path) as temporary, HashedFile(temporary) as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    return {**entry, "sha256": file.sha256.hexdigest()}


class HashedFile(io.BufferedWriter):
    """A new file whose SHA-256 is known when it is written, without reading it again.

    It goes out in pieces that stay in the processor's cache between the two uses. Linux also takes a write of hundreds
    of megabytes into its largest pages, which cost ten times as much when they are first touched (measured, ext4).
    """

    def __init__(self, path: Path):
        super().__init__(io.FileIO(path, "wb"))
        self.sha256 = hashlib.sha256()

    def write(self, data: Buffer, /) -> int:
        """Write and hash all of `data`; returns its size in bytes."""
        view = memoryview(data)
        for start in range(0, view.nbytes, WRITE_PIECE):
            piece = view[start : start + WRITE_PIECE]
            self.sha256.update(piece)
            super().write(piece)
        return view.nbytes


def _image(record: ImageRecord, image_root: Path, options: ShardOptions) -> bytes | np.ndarray:
    path = image_root / record.file_name
    rgb = load_image(path)
    if rgb.shape[:2] != (record.height, record.width):
        found, wanted = f"{rgb.shape[1]}x{rgb.shape[0]}", f"{record.width}x{record.height}"
        raise BadImage(path, f"the image is {found}, its annotations are for {wanted}")
    return _encode(letterbox_image(rgb, options.image_size, mode=options.resample), options.storage)


def _targets(record: ImageRecord, options: ShardOptions) -> bytes:
    counts = {item.ann_id: item.counts for item in record.instances}
    exact = [masks.decode_by_columns(counts[ref.ann_id], record.height, record.width) for ref in record.refs]
    return letterbox_masks(exact, options.image_size, TARGET_STRIDE, options.resample).tobytes()


class _Binary:
    """A column of bytes in the making, end to end in one array: converted one by one, they would be in memory three times.

    capacity: bytes there is room for at first. NumPy's arrays of that size take the system's large pages, the first touch
    of which costs far less than that of as many bytes in small ones.
    """

    def __init__(self, capacity: int) -> None:
        self.content, self.ends = np.empty(capacity, np.uint8), [0]

    def append(self, content: bytes | np.ndarray) -> None:
        """Add a row."""
        added = np.frombuffer(content, np.uint8)
        first, end = self.ends[-1], self.ends[-1] + added.size
        if end > self.content.size:
            grown = np.empty(max(end, 2 * self.content.size), np.uint8)
            grown[:first] = self.content[:first]
            self.content = grown
        self.content[first:end] = added
        self.ends.append(end)

    def column(self) -> pa.LargeBinaryArray:
        """Give the rows; the array belongs to them from now on."""
        buffers = [None, pa.py_buffer(np.array(self.ends, np.int64)), pa.py_buffer(self.content[: self.ends[-1]])]
        return pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(self.ends) - 1, buffers)


def _row(record: ImageRecord) -> dict[str, Any]:
    """Give all of a row but its image and targets."""
    return {
        "image_id": record.image_id,
        "file_name": record.file_name,
        "height": record.height,
        "width": record.width,
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
                "sentences": [_fields(s) for s in ref.sentences],
            }
            for ref in record.refs
        ],
    }


def _table(rows: Sequence[dict[str, Any]], images: _Binary, targets: _Binary) -> pa.Table:
    """Join rows with their images and targets, with `SHARD_SCHEMA`."""
    binary = {"image": images, "targets": targets}
    plain = pa.schema([field for field in SHARD_SCHEMA if field.name not in binary])
    table = pa.Table.from_pylist(rows, schema=plain).combine_chunks()
    columns = {name: table[name] if name not in binary else binary[name].column() for name in SHARD_SCHEMA.names}
    return pa.table(columns, schema=SHARD_SCHEMA)


def _encode(pixels: np.ndarray, storage: str) -> bytes | np.ndarray:
    if storage == "pixels":
        return pixels
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()


def decode_pixels(content: pa.Buffer, storage: str, image_size: int) -> np.ndarray:
    """Give the letterboxed image of a row, uint8 (S, S, 3); a view into the memory map when pixels are stored raw."""
    if storage == "pixels":
        return np.frombuffer(content, np.uint8).reshape(image_size, image_size, 3)
    return decode_image(content.to_pybytes())


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
    try:
        with pa.OSFile(str(path)) as source:
            metadata = pa.ipc.open_file(source).schema.metadata or {}
    except pa.ArrowInvalid:  # a machine that lost power may leave a file without its end
        return None
    if metadata.get(b"ris.fingerprint") != fingerprint.encode():
        return None
    entry = json.loads(metadata[b"ris.entry"])
    return None if entry["quarantined"] else {**entry, "sha256": file_sha256(path)}


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
    write_json(folder / MANIFEST, content)
    return content
