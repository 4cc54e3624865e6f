"""Single entries of the REFER files, type-checked: an entry becomes a typed row, or a `Problem` that says why not.

Field names and meanings: github.com/lichengunc/refer and the COCO annotation format (cocodataset.org/#format-data).
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from ris_core.data.records import Reference, Sentence
from ris_core.errors import short

MAX_SIDE = 65_535  # pixels; the limit of JPEG
_NUMBER = (int, float)
_Kinds = type | tuple[type, ...]
_OPTIONAL: dict[str, _Kinds] = {"iscrowd": (int, bool), "bbox": list, "area": _NUMBER}  # of an annotation


PROBLEM_KINDS = (
    "malformed_ref",
    "duplicate_id",
    "no_sentences",
    "unknown_split",
    "dangling_ref",
    "image_mismatch",
    "category_mismatch",
    "ref_to_crowd",
    "shared_annotation",
    "empty_sentence",
    "not_utf8",
    "malformed_category",
    "malformed_annotation",
    "dangling_annotation",
    "degenerate_segmentation",
    "stray_polygon",
    "empty_mask",
    "area_mismatch",
    "bbox_mismatch",
    "malformed_image",
    "missing_image",
    "undecodable_image",
    "wrong_image_size",
)


@dataclass(frozen=True, slots=True)
class Problem:
    """Something wrong in the data, of one of `PROBLEM_KINDS`. `blocking`: referents cannot be used because of it."""

    kind: str
    message: str
    blocking: bool = False

    def __post_init__(self) -> None:
        assert self.kind in PROBLEM_KINDS, self.kind


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """An entry of `images` in instances.json; sizes in pixels, `file_name` relative, with forward slashes."""

    image_id: int
    file_name: str
    height: int
    width: int


@dataclass(frozen=True, slots=True)
class Annotation:
    """An entry of `annotations` in instances.json; the parts of its segmentation are checked by `ris_core.data.masks`.

    bbox and area are None where the entry has none, as other tools than COCO's may write it. A negative id is that of a
    target made of none or several annotations, see `ris_core.data.refer.generalised`.
    """

    ann_id: int
    image_id: int
    category_id: int
    iscrowd: int
    bbox: tuple[float, float, float, float] | None
    area: float | None
    stored: Any  # the segmentation, perhaps with packed polygons, see `pack_polygons`

    @property
    def segmentation(self) -> Any:
        """Give what the entry has, in a form of COCO's; numbers of packed polygons are floats."""
        if not isinstance(self.stored, list):
            return self.stored
        return [part.tolist() if isinstance(part, array) else part for part in self.stored]

    @property
    def is_target(self) -> bool:
        """Tell whether it is no annotation of the file but what a referent refers to, which may be empty."""
        return self.ann_id < 0


def pack_polygons(entry: dict[str, Any]) -> dict[str, Any]:
    """Pack the polygons of an object as JSON has it, if it is an annotation: a number then takes 8 bytes, not 32.

    A polygon by itself, as VIA writes it, becomes a list of one. What is no list of numbers stays as it is, for
    `ris_core.data.masks` to tell what is wrong with it.
    """
    parts = entry.get("segmentation")
    if type(parts) is list:
        parts = [parts] if parts and _are_numbers(parts) else parts
        entry["segmentation"] = [_packed(part) for part in parts]
    return entry


def _packed(part: Any) -> Any:
    if type(part) is not list or not _are_numbers(part):
        return part
    try:
        return array("d", part)
    except OverflowError:  # an integer that no float can hold
        return part


def _are_numbers(values: list[Any]) -> bool:
    return set(map(type, values)) <= {float, int}


def parse_reference(entry: Any, position: int, splits: tuple[str, ...]) -> tuple[int, Reference] | Problem:
    """Give (image_id, reference) of an entry of the refs pickle whose split must be one of `splits`."""
    where = _where("ref", "ref_id", entry, position)
    ids: dict[str, _Kinds] = dict.fromkeys(("ref_id", "ann_id", "image_id", "category_id"), int)
    wrong = misfits(entry, {**ids, "split": str, "sent_ids": list, "sentences": list})
    if wrong and type(entry) is dict and isinstance(entry.get("ann_id"), list):
        wrong.append(
            "lists of annotations are gRefCOCO's: name the dataset grefcoco_unc, its file grefcoco/grefs(unc).p"
        )
    if not wrong:
        for number, sentence in enumerate(entry["sentences"]):
            faults = misfits(sentence, {"sent_id": int, "sent": str, "raw": str})
            wrong += [f"sentence {number}: {fault}" for fault in faults]
    if not wrong and entry["sent_ids"] != [sentence["sent_id"] for sentence in entry["sentences"]]:
        wrong = [f"sent_ids {short(entry['sent_ids'])} are not the ids of its sentences"]
    if wrong:
        return Problem("malformed_ref", f"{where}: {'; '.join(wrong)}", blocking=True)
    if not entry["sentences"]:
        return Problem("no_sentences", f"{where}: it has no sentences", blocking=True)
    if entry["split"] not in splits:
        text = f"{where}: its split {short(entry['split'])} is not one of {', '.join(splits)}"
        return Problem("unknown_split", text, blocking=True)
    sentences = tuple(Sentence(s["sent_id"], s["sent"], s["raw"]) for s in entry["sentences"])
    reference = Reference(entry["ref_id"], entry["ann_id"], entry["category_id"], entry["split"], sentences)
    return entry["image_id"], reference


def parse_image(entry: Any, position: int) -> ImageInfo | Problem:
    """Parse an entry of `images`."""
    wrong = misfits(entry, {"id": int, "file_name": str, "height": int, "width": int})
    if not wrong:
        name, height, width = relative(entry["file_name"]), entry["height"], entry["width"]
        if not (1 <= height <= MAX_SIDE and 1 <= width <= MAX_SIDE):
            wrong.append(f"impossible size of {short(width)}x{short(height)} pixels")
        if not name:
            wrong.append(f"file_name {short(entry['file_name'])} names no file below the dataset")
    if wrong:
        return Problem("malformed_image", f"{_where('image', 'id', entry, position)}: {'; '.join(wrong)}")
    return ImageInfo(entry["id"], name, height, width)


def relative(name: str) -> str:
    """Give a file name, as tools write it, as a relative path; "" where it is none.

    Of a path of somebody else's machine, or an address, only the last part means anything here.
    """
    path = PurePosixPath(name.replace("\\", "/"))
    if "\0" in name or ".." in path.parts or not path.parts:
        return ""
    return path.name if path.is_absolute() or ":" in path.parts[0] else str(path)


def parse_annotation(entry: Any, position: int, categories: Mapping[int, str]) -> Annotation | Problem:
    """Parse an entry of `annotations` whose category must be one of `categories` (names by id).

    `iscrowd` may be absent, which means 0, and so may `bbox` and `area`, which follow from the mask.
    """
    wanted: dict[str, _Kinds] = {**dict.fromkeys(("id", "image_id", "category_id"), int), "segmentation": (dict, list)}
    given = {} if type(entry) is not dict else {key: entry[key] for key in _OPTIONAL if entry.get(key) is not None}
    wrong = misfits(entry, {**wanted, **{key: _OPTIONAL[key] for key in given}})
    if not wrong:
        box = dict(zip(("x", "y", "width", "height"), given.get("bbox", ()), strict=False))
        if "bbox" in given and (len(given["bbox"]) != 4 or misfits(box, dict.fromkeys(box, _NUMBER))):
            wrong.append(f"bbox must be four numbers, found {short(given['bbox'])}")
        if given.get("iscrowd", 0) not in (0, 1):
            wrong.append(f"iscrowd must be 0 or 1, found {short(given['iscrowd'])}")
        if entry["category_id"] not in categories:
            wrong.append(f"category_id {short(entry['category_id'])} is not among the categories")
    if wrong:
        return Problem("malformed_annotation", f"{_where('annotation', 'id', entry, position)}: {'; '.join(wrong)}")
    return Annotation(
        ann_id=entry["id"],
        image_id=entry["image_id"],
        category_id=entry["category_id"],
        iscrowd=int(given.get("iscrowd", 0)),
        bbox=(float(box["x"]), float(box["y"]), float(box["width"]), float(box["height"])) if box else None,
        area=float(given["area"]) if "area" in given else None,
        stored=entry["segmentation"],
    )


def parse_category(entry: Any, position: int) -> str | Problem:
    """Give the name of an entry of `categories`."""
    wrong = misfits(entry, {"id": int, "name": str})
    if wrong:
        return Problem("malformed_category", f"{_where('category', 'id', entry, position)}: {'; '.join(wrong)}")
    return str(entry["name"])


def misfits(entry: Any, wanted: Mapping[str, _Kinds]) -> list[str]:
    """Tell what keeps `entry` from being a dict with the wanted fields.

    Types are exact (True is no int here). Integers must fit 64 bits, numbers be finite, texts be encodable in UTF-8.
    """
    if type(entry) is not dict:
        return [f"expected a dict, found {type(entry).__name__}"]
    wrong = []
    for key, kinds in wanted.items():
        value = entry.get(key)
        kinds = kinds if isinstance(kinds, tuple) else (kinds,)
        if key not in entry:
            wrong.append(f"no '{key}'")
        elif type(value) not in kinds:
            names = " or ".join(kind.__name__ for kind in kinds)
            wrong.append(f"'{key}' must be {names}, found {type(value).__name__} {short(value)}")
        elif isinstance(value, _NUMBER) and not (abs(value) < 2**63 and math.isfinite(value)):
            wrong.append(f"'{key}' is out of range: {short(value)}")
        elif isinstance(value, str) and not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
            wrong.append(f"'{key}' is not valid Unicode: {short(value)}")
    return wrong


def _where(what: str, key: str, entry: Any, position: int) -> str:
    known = isinstance(entry, dict) and type(entry.get(key)) is int
    return f"{what} {short(entry[key])}" if known else f"{what} at position {position}"
