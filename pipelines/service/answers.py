"""A prediction as JSON."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
from PIL import Image

from pipelines.service.schema import MaskForm
from ris_core.predictor import Prediction

LOCATION_SIDE = 256  # pixels: these maps are coarse


def plain(index: int, prediction: Prediction, masks: MaskForm, location: bool) -> dict[str, Any]:
    """Give a prediction as `schema.Answer` has it, of Python's own types."""
    answer: dict[str, Any] = {
        "index": index,
        "score": float(prediction.score),
        "area": int(np.count_nonzero(prediction.mask)),
        "cut": prediction.cut,
        "mask": _mask(prediction, masks),
    }
    if location:
        answer["location"] = None if prediction.location is None else _location(prediction.location)
    return answer


def _mask(prediction: Prediction, masks: MaskForm) -> dict[str, Any]:
    size = list(prediction.mask.shape)
    if masks == "rle":
        return {"size": size, "counts": prediction.rle["counts"]}
    if masks == "polygons":
        return {"size": size, "polygons": prediction.polygons}
    return {"size": size, "png": base64.b64encode(prediction.png).decode()}


def _location(location: np.ndarray) -> dict[str, Any]:
    """Give a map (H, W) of 0..1 as a grey PNG, its longer side at most LOCATION_SIDE pixels."""
    picture = Image.fromarray((location * 255).round().astype(np.uint8))
    picture.thumbnail((LOCATION_SIDE, LOCATION_SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return {"size": [picture.height, picture.width], "png": base64.b64encode(buffer.getvalue()).decode()}
