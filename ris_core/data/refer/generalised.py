"""Referents with none or several targets, as gRefCOCO has them (Liu, Ding and Jiang, "GRES", CVPR 2023; henghuiding/gRefCOCO).

    <root>/grefcoco/grefs(unc).json    as refs, but ann_id and category_id are lists; no target is an empty one, or [-1]

Everything after the reader knows one annotation to a referent. So a referent with another number of them gets one of its own:
its target, which is the union of its annotations, or empty. A target has the id -1 - ref_id, is a group (`iscrowd`), so that
it is none of the objects an answer could be compared with, and has no box or area of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ris_core.data.refer.rows import Annotation, ImageInfo, Problem, misfits
from ris_core.errors import short

CATEGORY, NAME = -1, "none or several"  # of targets
NO_TARGET = -1  # in a list of annotations


def target_id(ref_id: int) -> int:
    """Give the id of a referent's target, which no annotation of a file has."""
    return -1 - ref_id


def parse_targets(entry: Any) -> tuple[dict[str, Any], tuple[int, ...]] | Problem:
    """Give an entry of grefs in the form of refs, and the annotations that it refers to: none, one or several.

    A Problem where these are no lists of integers, or an annotation is named twice.
    """
    if type(entry) is not dict:
        return entry, ()
    wrong = misfits(entry, {"ref_id": int, "ann_id": (list, int), "category_id": (list, int)})
    named: dict[str, list[Any]] = {
        key: entry[key] if isinstance(entry.get(key), list) else [entry.get(key)] for key in ("ann_id", "category_id")
    }
    if not wrong:
        wrong = [
            f"'{key}' must be a list of integers, found {short(numbers)}"
            for key, numbers in named.items()
            if not all(type(number) is int and abs(number) < 2**63 for number in numbers)
        ]
    ids: tuple[int, ...] = () if wrong else tuple(number for number in named["ann_id"] if number != NO_TARGET)
    if len(set(ids)) != len(ids) or any(number < 0 for number in ids):
        wrong = [f"'ann_id' names an annotation twice, or by a negative id: {short(list(ids))}"]
    if wrong:
        return Problem("malformed_ref", f"ref {short(entry.get('ref_id'))}: {'; '.join(wrong)}", blocking=True)
    one = len(ids) == 1
    plain = {
        **entry,
        "ann_id": ids[0] if one else target_id(entry["ref_id"]),
        "category_id": named["category_id"][0] if one and named["category_id"] else CATEGORY,
    }
    return plain, ids


def target(
    ref_id: int,
    image: ImageInfo,
    ids: Iterable[int],
    annotations: Mapping[int, Annotation],
    bad_annotations: Mapping[int, Problem],
) -> Annotation | Problem:
    """Make the target of a referent: the union of its annotations. A Problem where one of them is not to be had."""
    parts: list[Any] = []
    wrong: list[str] = []
    for number in ids:
        found = annotations.get(number)
        if number in bad_annotations:
            wrong.append(bad_annotations[number].message)
        elif found is None:
            wrong.append(f"there is no annotation {number}")
        elif found.image_id != image.image_id:
            wrong.append(
                f"its annotation {number} belongs to image {found.image_id}, the ref says image {image.image_id}"
            )
        else:
            parts += found.segmentation if isinstance(found.segmentation, list) else [found.segmentation]
    if wrong:
        return Problem("dangling_ref", f"ref {ref_id}: {'; '.join(wrong)}")
    nothing = {"size": [image.height, image.width], "counts": [image.height * image.width]}
    return Annotation(target_id(ref_id), image.image_id, CATEGORY, 1, None, None, parts or [nothing])
