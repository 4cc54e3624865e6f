"""A small REFER dataset in the official files, clean but full of what real ones hold, and ways to spoil it.

    data = small_dataset("refcoco_unc")          # plain lists of dicts: change them as a test needs
    root = data.write(tmp_path)                  # then read them back from disk

What is odd but right: overlapping polygons, a crowd with uncompressed run lengths, a list of compressed ones, a
repeated, an empty and a non-ASCII sentence, a grey JPEG, unused annotations that are degenerate.
"""

from __future__ import annotations

import json
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from ris_core.data.refer.reader import DatasetName

IMAGES_2014 = "images/mscoco/images/train2014"
IMAGES_2017 = "images/mscoco/images/train2017"
OVERLAPPING = [[10, 10, 40, 10, 40, 40, 10, 40], [30, 30, 60, 30, 60, 60, 30, 60]]
HTML = b"<!DOCTYPE html>\n<html><head><title>404 Not Found</title></head></html>\n"


class Malicious:
    """Unpickled by plain `pickle.load`, it would create the file `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return open, (str(self.path), "w")


@dataclass
class SmallDataset:
    """The contents of a dataset's files, as they are about to be written."""

    name: DatasetName
    refs: list[Any]
    images: list[Any]
    annotations: list[Any]
    categories: list[Any]

    def ref(self, ref_id: int) -> dict[str, Any]:
        return next(ref for ref in self.refs if ref["ref_id"] == ref_id)

    def annotation(self, ann_id: int) -> dict[str, Any]:
        return next(annotation for annotation in self.annotations if annotation["id"] == ann_id)

    def write(self, root: Path, *, protocol: int = 2, image_folder: str | None = IMAGES_2014) -> Path:
        """Write all files below `root` and return it; no images when `image_folder` is None."""
        folder = root / self.name.folder
        folder.mkdir(parents=True, exist_ok=True)
        (root / self.name.refs_file).write_bytes(pickle.dumps(self.refs, protocol))
        tables = {"images": self.images, "annotations": self.annotations, "categories": self.categories}
        (root / self.name.instances_file).write_text(json.dumps(tables))
        if image_folder:
            (root / image_folder).mkdir(parents=True, exist_ok=True)
            for image in self.images:
                name = f"{image['id']:012d}.jpg" if image_folder.endswith("2017") else image["file_name"]
                write_jpeg(root / image_folder / name, image["width"], image["height"], grey=image["id"] == 3)
        return root


def small_dataset(name: str = "refcoco_unc") -> SmallDataset:
    """Six images of 100x80 pixels, two annotated squares and one ref each (two on image 1), every split present.

    Image n has annotations 10n (referred to by ref n) and 10n + 1; ref 7 is on image 1, annotation 11.
    """
    dataset = DatasetName.parse(name)
    images = [
        {"id": n, "file_name": f"COCO_train2014_{n:012d}.jpg", "height": 80, "width": 100, "license": 1}
        for n in range(1, 7)
    ]
    annotations = [annotation(10 * n + k, n, square(5 + 40 * k + n, 10 + n, 30)) for n in range(1, 7) for k in (0, 1)]
    annotations[0].update(segmentation=OVERLAPPING, area=1800.0, bbox=[10.0, 10.0, 50.0, 50.0])
    splits = ["train", "train", *dataset.splits[1:], "train", "train"][:6]
    refs = [reference(n, 10 * n, n, split, [f"thing {n}", f"the thing {n}"]) for n, split in enumerate(splits, start=1)]
    refs.append(reference(7, 11, 1, "train", ["right one", "right one", "", "caf\u00e9 cup"]))
    small = SmallDataset(dataset, refs, images, annotations, [{"id": 1, "name": "thing"}, {"id": 3, "name": "crowd"}])
    _add_odd_annotations(small)
    return small


def _add_odd_annotations(small: SmallDataset) -> None:
    pixels = np.zeros((80, 100), np.uint8)
    pixels[20:30, 50:70] = 1
    compressed = coco_mask.encode(np.asfortranarray(pixels))
    parts = [{"size": [80, 100], "counts": compressed["counts"].decode()}]
    small.annotation(21).update(segmentation=parts, area=200.0, bbox=[50.0, 20.0, 20.0, 10.0])
    crowd = {"size": [80, 100], "counts": [800, 80, 7120]}  # column 10
    small.annotations += [
        {**annotation(900, 1, crowd), "iscrowd": 1, "category_id": 3, "area": 80.0, "bbox": [10.0, 0.0, 1.0, 80.0]},
        annotation(901, 1, []),
        annotation(902, 2, [[1, 2, 3, 4]]),
    ]


def annotation(ann_id: int, image_id: int, segmentation: Any) -> dict[str, Any]:
    """A COCO annotation; area and bbox are those of a single polygon, else zero."""
    area, bbox = 0.0, [0.0, 0.0, 0.0, 0.0]
    if isinstance(segmentation, list) and segmentation and len(segmentation[0]) >= 6:
        x, y = np.array(segmentation[0][0::2], float), np.array(segmentation[0][1::2], float)
        area = abs(float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))) / 2
        bbox = [float(x.min()), float(y.min()), float(np.ptp(x)), float(np.ptp(y))]
    shape = {"segmentation": segmentation, "area": area, "bbox": bbox}
    return {"id": ann_id, "image_id": image_id, "category_id": 1, "iscrowd": 0, **shape}


def square(x: int, y: int, side: int) -> list[list[int]]:
    return [[x, y, x + side, y, x + side, y + side, x, y + side]]


def reference(ref_id: int, ann_id: int, image_id: int, split: str, texts: list[str]) -> dict[str, Any]:
    sentences = [
        {"sent_id": 10 * ref_id + k, "sent": text, "raw": text.capitalize() + ".", "tokens": text.split()}
        for k, text in enumerate(texts)
    ]
    return {
        "ref_id": ref_id,
        "ann_id": ann_id,
        "image_id": image_id,
        "category_id": 1,
        "split": split,
        "file_name": f"COCO_train2014_{image_id:012d}_{ref_id}.jpg",
        "sent_ids": [sentence["sent_id"] for sentence in sentences],
        "sentences": sentences,
    }


def write_jpeg(path: Path, width: int, height: int, *, grey: bool = False) -> None:
    pixels = np.random.default_rng(width).integers(0, 255, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert("L" if grey else "RGB").save(path, "JPEG")


def python2_pickle(value: Any, encoding: str) -> bytes:
    """Protocol 0 as Python 2 wrote it: every text a byte string (opcode STRING) in some encoding."""

    def dump(item: Any) -> bytes:
        if isinstance(item, list):
            return b"(l" + b"".join(dump(part) + b"a" for part in item)
        if isinstance(item, dict):
            return b"(d" + b"".join(dump(key) + dump(part) + b"s" for key, part in item.items())
        if isinstance(item, str):
            return b"S" + repr(item.encode(encoding))[1:].encode() + b"\n"
        return b"I%d\n" % item

    return dump(value) + b"."
