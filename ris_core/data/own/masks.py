"""Masks of one's own, as PNG files or COCO run lengths, as COCO `segmentation` values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from ris_core.data.images import BadImage, opened
from ris_core.data.masks import encode
from ris_core.errors import DataError, short

WITH_ALPHA = ("LA", "PA", "RGBA")  # Pillow's modes; how opaque a pixel is says nothing about the object


def read_mask(given: object, root: Path) -> dict[str, Any]:
    """Give `{"size": [height, width], "counts": ...}` of a PNG below `root` or of run lengths, which may be JSON text.

    Every pixel of a PNG that is not zero (of a palette: not the first entry) is foreground. The run lengths are not
    checked here. Raises DataError for what is neither.
    """
    if isinstance(given, dict):
        return {"size": given.get("size"), "counts": given.get("counts")}
    if not isinstance(given, str) or not given:
        raise DataError(f"a mask is the path of a PNG, or run lengths with size and counts; found {short(given)}")
    if given.lstrip().startswith("{"):
        try:
            return read_mask(json.loads(given), root)
        except (ValueError, RecursionError):
            raise DataError(f"mask {short(given)} is no JSON of run lengths") from None
    return _of_picture(given, root)


def _of_picture(given: str, root: Path) -> dict[str, Any]:
    place = (root / given).resolve()
    if not place.is_relative_to(root.resolve()):
        raise DataError(f"mask {short(given)} lies outside the dataset")
    try:
        with opened(place, given) as picture:
            if picture.format != "PNG":
                why = ", which changes masks" if picture.format == "JPEG" else ""
                raise DataError(f"mask {short(given)} is {picture.format}{why}: save it as PNG")
            pixels = np.asarray(picture)[..., : -1 if picture.mode in WITH_ALPHA else None]
    except BadImage as error:
        raise DataError(f"mask {short(given)}: {error.reason}") from None
    mask = pixels if pixels.ndim == 2 else pixels.any(axis=2)
    return {"size": list(mask.shape), "counts": encode(mask != 0)}
