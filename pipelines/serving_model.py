"""The packaged model: what MLflow stores by its source and runs wherever `models:/...@champion` is loaded."""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Hashable, Mapping

import mlflow
import numpy as np
import pandas as pd
from mlflow.pyfunc import PythonModel, PythonModelContext

from ris_core.data.images import ImageLike
from ris_core.errors import DataError, list_problems
from ris_core.options import Plain
from ris_core.predictor import Prediction, RISPredictor

COLUMNS = ("counts", "height", "width", "score")
EXPRESSIONS_AT_ONCE = 64  # about one image: bounds memory


class RISModel(PythonModel):
    """image + expression -> mask as COCO RLE + score.

    Input: a data frame with the columns `image` (base64 of an encoded image; raw bytes; or an array uint8 (H, W, 3)) and
    `text`. Output, one row per input: `counts`, `height`, `width` (compressed COCO RLE at the image's own size) and `score`
    (how sure the system is, 0 for an empty mask). Parameter: `threshold` (default 0.5).

    Equal images of a request are encoded once, wherever they stand in it, and nothing of a request outlives it: servers
    call `predict` from several threads. `image` may also be a file's path where whoever loads the model says so, in
    process: `mlflow.pyfunc.load_model(uri, model_config={"allow_paths": True})`. A client never can.

    Raises DataError, naming all rows that cannot be answered, ConfigError for a threshold that is no probability.
    """

    def load_context(self, context: PythonModelContext) -> None:
        self.predictor = RISPredictor.from_folder(context.artifacts["model"])
        self.allow_paths = bool((context.model_config or {}).get("allow_paths", False))

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: Mapping[str, float] | None = None
    ) -> pd.DataFrame:
        threshold = float((params or {}).get("threshold", 0.5))
        images, texts = list(model_input["image"]), list(model_input["text"])
        rows_of: dict[Hashable, list[int]] = {}
        for row, image in enumerate(images):
            rows_of.setdefault(_identity(image), []).append(row)
        problems = {
            row: f"row {row}: the text must not be blank; got {text!r}"
            for row, text in enumerate(texts)
            if not isinstance(text, str) or not text.strip()
        }
        answers: dict[int, Plain] = {}
        for rows in rows_of.values():
            try:
                encoded = self.predictor.encode(self._image(images[rows[0]]))
            except DataError as error:
                problems |= {row: f"row {row}: {error}" for row in rows}
                continue
            for start in range(0, 0 if problems else len(rows), EXPRESSIONS_AT_ONCE):
                some = rows[start : start + EXPRESSIONS_AT_ONCE]
                found = self.predictor.answer(encoded, [texts[row] for row in some], threshold)
                answers |= {row: _plain(prediction) for row, prediction in zip(some, found, strict=True)}
        if problems:
            raise DataError(
                list_problems("this request cannot be answered", [problems[row] for row in sorted(problems)])
            )
        return pd.DataFrame([answers[row] for row in range(len(images))], columns=list(COLUMNS))

    def _image(self, image: ImageLike) -> ImageLike:
        """Give what the predictor takes. Raises DataError for a text that is not base64, nor the path of a file if allowed."""
        if not isinstance(image, str) or (self.allow_paths and os.path.isfile(image)):
            return image
        try:
            return base64.b64decode(image, validate=True)
        except ValueError:
            if self.allow_paths:  # then it was meant as one, and the predictor says that there is no such file
                return image
            raise DataError(f"the image text {image[:40]!r} is not base64 of an encoded image") from None


def _identity(image: object) -> Hashable:
    """Give what is equal for equal images of one request."""
    if isinstance(image, str | bytes):
        return image
    if isinstance(image, np.ndarray):
        return image.shape, image.dtype.str, hashlib.sha256(image.tobytes()).digest()
    return id(image)


def _plain(prediction: Prediction) -> Plain:
    rle = prediction.rle
    height, width = rle["size"]
    return {"counts": rle["counts"], "height": height, "width": width, "score": prediction.score}


mlflow.models.set_model(RISModel())
