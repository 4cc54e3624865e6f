"""Proposals of a dataset's images on disk: made once, read by every system that chooses among masks.

part-00000.parquet   image_id, height, width, counts: the masks as COCO RLE at the original size
manifest.json        how they were made, how many there are, and the checksums of the parts
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ris_core.data import masks
from ris_core.errors import DataError, list_problems
from ris_core.files import file_sha256, replaced_file, write_json

MANIFEST = "manifest.json"
SCHEMA = pa.schema(
    [("image_id", pa.int64()), ("height", pa.int32()), ("width", pa.int32()), ("counts", pa.list_(pa.string()))]
)


def write_part(path: Path, images: Iterable[tuple[int, np.ndarray]]) -> None:
    """Write proposals (P, H, W) of images, given by their ids; the file appears whole or not at all."""
    rows = [
        {
            "image_id": image_id,
            "height": proposals.shape[1],
            "width": proposals.shape[2],
            "counts": [masks.encode(mask) for mask in proposals],
        }
        for image_id, proposals in images
    ]
    with replaced_file(path) as temporary:
        pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), temporary)


def part_counts(path: Path) -> dict[int, int]:
    """Count the proposals of each image of a part, by image id."""
    table = pq.read_table(path, columns=["image_id", "counts"])
    return dict(zip(table["image_id"].to_pylist(), map(len, table["counts"].to_pylist()), strict=True))


def write_manifest(folder: Path, content: dict[str, Any]) -> None:
    """Write the manifest, last of all: a folder with a manifest is a finished one. `parts` are the names of its files."""
    checksums = {name: file_sha256(folder / name) for name in content["parts"]}
    write_json(folder / MANIFEST, {**content, "sha256": checksums})


class ProposalStore:
    """The proposals of one dataset, by image id.

    Raises DataError if the folder holds no finished ones, or parts are missing or damaged.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        manifest = self.folder / MANIFEST
        if not manifest.exists():
            raise DataError(f"{manifest} does not exist: run the propose stage for this dataset first")
        self.manifest: dict[str, Any] = json.loads(manifest.read_text())
        checksums = self.manifest.get("sha256", {})
        damaged = [
            name
            for name in self.manifest["parts"]
            if not (self.folder / name).is_file() or file_sha256(self.folder / name) != checksums.get(name)
        ]
        if damaged:
            remedy = "Run the propose stage for this dataset again."
            raise DataError(list_problems(f"{self.folder}: parts that are missing or not as written", damaged, remedy))
        self._rows: dict[int, dict[str, Any]] = {}
        for part in self.manifest["parts"]:
            for row in pq.read_table(self.folder / part).to_pylist():
                self._rows[row["image_id"]] = row

    def masks(self, image_id: int) -> np.ndarray:
        """Give proposals of an image, bool (P, H, W), largest first. Raises DataError if none were made for it."""
        row = self._rows.get(image_id)
        if row is None:
            made = self.manifest["splits"] or "no split: no system among `systems` chose among proposals"
            raise DataError(
                f"{self.folder} has no proposals of image {image_id}; they were made for {made}. "
                "Set proposals.splits, or run the propose stage again"
            )
        return decode_all(row["counts"], row["height"], row["width"])


def candidates(row: dict[str, Any], proposals: ProposalStore | None) -> np.ndarray:
    """Give masks of an image to choose among, bool (P, H, W): proposals or, where none are given, its annotated objects."""
    if proposals is not None:
        return proposals.masks(row["image_id"])
    objects = [item["counts"] for item in row["instances"] if not item["iscrowd"]]
    return decode_all(objects, row["height"], row["width"])


def decode_all(counts: Sequence[str], height: int, width: int) -> np.ndarray:
    """Decode masks bool (P, height, width) from their run lengths; P may be 0."""
    found = np.zeros((len(counts), height, width), bool)
    for mask, text in zip(found, counts, strict=True):
        mask[:] = masks.decode(text, height, width)
    return found
