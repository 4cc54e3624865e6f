"""The packaged model: what MLflow stores by its source and runs wherever `models:/...@champion` is loaded."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Hashable, Mapping, Sequence

import mlflow
import numpy as np
import pandas as pd
from mlflow import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc import PythonModel, PythonModelContext

from ris_core.data.images import ImageLike, from_base64
from ris_core.errors import ConfigError, DataError, short
from ris_core.models.answer import Reading
from ris_core.options import Plain
from ris_core.predictor import Prediction, RISPredictor

COLUMNS = ("counts", "height", "width", "score", "error")
EXPRESSIONS_AT_ONCE = 64  # about one image: bounds memory


class BadRequest(MlflowException, ConfigError):
    """A request of which no row can be answered. Servers of MLflow's tell its reason, of other errors where they were raised."""

    def __init__(self, reason: str):
        super().__init__(reason, INVALID_PARAMETER_VALUE)


class RISModel(PythonModel):
    """image + expression -> mask as COCO RLE + score.

    Input: a data frame with the columns `image` (base64 of an encoded image, also with line ends, URL-safe or as a data URI;
    raw bytes; or an array uint8 (H, W, 3)) and `text`. Output, one row per input: `counts`, `height`, `width` (compressed COCO
    RLE at the size of the image as viewers show it), `score` (how sure the system is, 0 for an empty mask) and `error`: why a row
    has no answer, else nothing. A bad row spoils no other. Parameter: `threshold` (default 0.5).

    Equal images of a request are encoded once, wherever they stand in it, and nothing of a request outlives it: servers
    call `predict` from several threads. `image` may also be a file's path where whoever loads the model says so, in
    process: `mlflow.pyfunc.load_model(uri, model_config={"allow_paths": True})`. A client never can.

    Raises BadRequest, a ConfigError, for a threshold that is no probability, and without one of the two columns.
    """

    def load_context(self, context: PythonModelContext) -> None:
        self.predictor = RISPredictor.from_folder(context.artifacts["model"])
        self.allow_paths = bool((context.model_config or {}).get("allow_paths", False))

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: Mapping[str, float] | None = None
    ) -> pd.DataFrame:
        missing = [name for name in ("image", "text") if name not in model_input]
        if missing:
            raise BadRequest(f"columns are missing: {', '.join(missing)}")
        try:
            threshold = Reading(float((params or {}).get("threshold", 0.5))).threshold
        except (TypeError, ValueError) as error:
            raise BadRequest(str(error)) from error
        images, texts = list(model_input["image"]), list(model_input["text"])
        answers = [
            {"error": None if _says(text) else f"the text must not be blank; got {short(text)}"} for text in texts
        ]
        rows_of: dict[Hashable, list[int]] = {}
        for row, image in enumerate(images):
            if _says(texts[row]):
                rows_of.setdefault(_identity(image), []).append(row)
        for rows in rows_of.values():
            found = self._about(images[rows[0]], [texts[row] for row in rows], threshold)
            for row, answer in zip(rows, found, strict=True):
                answers[row] = answer
        return _frame(answers)

    def _about(self, image: ImageLike, texts: Sequence[str], threshold: float) -> list[Plain]:
        """Give the answers about one image, or its error as often."""
        try:
            encoded = self.predictor.encode(self._image(image))
        except DataError as error:
            return [{"error": str(error)}] * len(texts)
        answers: list[Plain] = []
        for start in range(0, len(texts), EXPRESSIONS_AT_ONCE):
            some = texts[start : start + EXPRESSIONS_AT_ONCE]
            answers += [_plain(found) for found in self.predictor.answer(encoded, some, threshold)]
        return answers

    def _image(self, image: ImageLike) -> ImageLike:
        """Give what the predictor takes. Raises DataError for a text that is not base64, nor the path of a file if allowed."""
        if not isinstance(image, str) or (self.allow_paths and os.path.isfile(image)):
            return image
        try:
            return from_base64(image)
        except DataError:
            if self.allow_paths:  # then it was meant as one, and the predictor says that there is no such file
                return image
            raise


def _says(text: object) -> bool:
    return isinstance(text, str) and bool(text.strip())


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
    return {"counts": rle["counts"], "height": height, "width": width, "score": prediction.score, "error": None}


def _frame(answers: Sequence[Plain]) -> pd.DataFrame:
    """Give the answers as columns; where one is missing there is None, which JSON has, and not not-a-number."""
    columns = {name: [answer.get(name) for answer in answers] for name in COLUMNS}
    whole = all(answer["error"] is None for answer in answers)
    return pd.DataFrame(columns) if whole else pd.DataFrame(columns, dtype=object)


mlflow.models.set_model(RISModel())
