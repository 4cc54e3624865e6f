"""The one mask codec: COCO run-length text <-> binary masks, and every COCO `segmentation` form -> that text.

A mask is written as the ASCII `counts` of a COCO compressed RLE: column-major runs at the image's own size. Encoding
and the rasterising of polygons are those of pycocotools (github.com/cocodataset/cocoapi, common/maskApi.c), behind
checks of what it takes on trust: an empty polygon would end in an IndexError, one of four numbers be taken for a box.
Decoding is done here, because counts that do not fill the image make pycocotools return uninitialised memory.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from ris_core.errors import DataError

STRAY_NUMBERS = (2, 4)  # of one or two points
POLYGON_MIN_NUMBERS = 6  # three points; COCO tools read four numbers as a box


def encode(mask: np.ndarray) -> str:
    """Give the counts of a mask of shape (H, W), bool or uint8; every non-zero pixel is foreground.

    Raises DataError for another shape or dtype.
    """
    if mask.ndim != 2 or mask.size == 0 or mask.dtype not in (np.bool_, np.uint8):
        raise DataError(f"a mask must be (H, W) of bool or uint8 and not empty; found {mask.shape} of {mask.dtype}")
    rle = coco_mask.encode(np.asfortranarray(mask != 0, dtype=np.uint8))
    return str(rle["counts"].decode("ascii"))


def decode(counts: str, height: int, width: int) -> np.ndarray:
    """Decode to a mask of shape (height, width), uint8 of {0, 1}, C-contiguous.

    Raises DataError when the counts are damaged or belong to a mask of another size.
    """
    return np.ascontiguousarray(decode_by_columns(counts, height, width))


def decode_by_columns(counts: str, height: int, width: int) -> np.ndarray:
    """Decode as `decode` does, laid out as runs are, column after column: faster, where only parts of it are looked at."""
    runs = _check_counts(counts, height, width)
    pixels = np.repeat((np.arange(runs.size) % 2).astype(np.uint8), runs)  # runs alternate: 0, 1, 0, ...
    return pixels.reshape(width, height).T


def area(counts: str, height: int, width: int) -> int:
    """Count the foreground pixels, without decoding. Raises DataError as `decode` does."""
    return int(_check_counts(counts, height, width)[1::2].sum())


def extent(counts: str, height: int, width: int) -> tuple[float, float, float, float]:
    """Give x, y, width, height in pixels of the box around a mask's foreground. Raises DataError as `decode` does."""
    _check_counts(counts, height, width)
    x, y, wide, high = coco_mask.toBbox({"size": [height, width], "counts": counts.encode("ascii")}).tolist()
    return x, y, wide, high


def segmentation_to_counts(segmentation: Any, height: int, width: int) -> str:
    """Give the counts of the union of all parts of a COCO `segmentation` at (height, width) pixels.

    Forms: a list of polygons `[[x0, y0, x1, y1, ...], ...]` in pixels, a compressed or uncompressed RLE dict
    `{"size": [h, w], "counts": ...}`, or a list of such dicts. The union is what the masks mean; the official REFER
    reader (github.com/lichengunc/refer) sums the parts instead, which gives pixels of value 2 where they overlap.
    Raises DataError that names every part that cannot be used.
    """
    parts = [segmentation] if isinstance(segmentation, dict) else segmentation
    if not isinstance(parts, list) or not parts:
        raise DataError(f"segmentation must be polygons or run lengths; found {_brief(segmentation)}")
    rles, problems = [], []
    for number, part in enumerate(parts, start=1):
        try:
            rles.append(_part_to_rle(part, height, width))
        except DataError as error:
            problems.append(f"part {number} of {len(parts)}: {error}")
    if problems:
        raise DataError("; ".join(problems))
    union = rles[0] if len(rles) == 1 else coco_mask.merge(rles)
    return str(union["counts"].decode("ascii"))


def without_strays(segmentation: Any) -> Any:
    """Give a COCO `segmentation` without polygons of one or two points, which cover nothing, if any other part remains.

    Labelling tools leave them behind where somebody clicked once too often.
    """
    if not isinstance(segmentation, list):
        return segmentation
    parts = [part for part in segmentation if not (isinstance(part, list) and len(part) in STRAY_NUMBERS)]
    return parts or segmentation


def is_polygons(segmentation: Any) -> bool:
    """Tell the list-of-polygons form (True) from run lengths (False)."""
    return isinstance(segmentation, list) and all(isinstance(part, list) for part in segmentation)


def _part_to_rle(part: Any, height: int, width: int) -> dict[str, Any]:
    if isinstance(part, dict):
        return _checked_rle(part, height, width)
    if not isinstance(part, list):
        raise DataError(f"expected a polygon or run lengths, found {_brief(part)}")
    _check_polygon(part, height, width)
    return dict(coco_mask.frPyObjects([part], height, width)[0])


def _check_polygon(polygon: list[Any], height: int, width: int) -> None:
    if not {type(number) for number in polygon} <= {int, float}:
        raise DataError(f"degenerate polygon: not only numbers in {_brief(polygon)}")
    if len(polygon) < POLYGON_MIN_NUMBERS or len(polygon) % 2:
        raise DataError(
            f"degenerate polygon of {len(polygon)} numbers, needs x, y of at least three points: {_brief(polygon)}"
        )
    # A point far away is never a matter of rounding, and pycocotools would walk every pixel of the way to it.
    margin = max(height, width)
    if not all(-margin <= number <= 2 * margin for number in polygon):
        raise DataError(f"degenerate polygon: points far outside the {width}x{height} image in {_brief(polygon)}")


def _checked_rle(rle: dict[str, Any], height: int, width: int) -> dict[str, Any]:
    size, counts = rle.get("size"), rle.get("counts")
    if size != [height, width]:
        raise DataError(f"run lengths are of size {size} (height, width), the image is [{height}, {width}]")
    if isinstance(counts, list):
        if not all(type(run) is int and run >= 0 for run in counts) or sum(counts) != height * width:
            raise DataError(f"uncompressed run lengths do not sum to {height}x{width} pixels: {_brief(counts)}")
        return dict(coco_mask.frPyObjects(rle, height, width))
    if not isinstance(counts, str):
        raise DataError(f"run lengths must be text or a list of integers, found {_brief(counts)}")
    _check_counts(counts, height, width)
    return {"size": size, "counts": counts.encode("ascii")}


def _check_counts(counts: str, height: int, width: int) -> np.ndarray:
    """Give run lengths (int64; background first) of counts that fill exactly height x width pixels; DataError otherwise."""
    runs = _run_lengths(counts)
    if runs is None or runs.min() < 0 or int(runs.sum()) != height * width:
        raise DataError(f"run-length text does not describe {height}x{width} pixels: {_brief(counts)}")
    return runs


def _run_lengths(counts: str) -> np.ndarray | None:
    """Give the run lengths of a COCO compressed text, or None when it is no such text.

    Each number is stored in 5-bit digits, least significant first, one character (code 48 + digit) each; bit 5 of a
    character says that more digits follow, bit 4 of the last one is the sign. From the fourth number on, it is the
    difference to the run two places before.
    """
    if not counts.isascii():
        return None
    digits = np.frombuffer(counts.encode("ascii"), np.uint8).astype(np.int64) - 48
    if not digits.size or digits.min() < 0 or digits.max() > 63 or digits[-1] & 0x20:
        return None
    ends = np.flatnonzero(digits & 0x20 == 0)
    starts = np.concatenate(([0], ends[:-1] + 1))
    lengths = ends - starts + 1
    if lengths.max() > 7:  # 35 bits: more than any run; keeps the shifts below 64 bits
        return None
    places = np.arange(digits.size) - np.repeat(starts, lengths)
    values = np.add.reduceat((digits & 0x1F) << (5 * places), starts)
    values = np.where(digits[ends] & 0x10, values - (1 << (5 * lengths)), values)
    values[1::2] = np.cumsum(values[1::2])
    values[2::2] = np.cumsum(values[2::2])
    return values


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
