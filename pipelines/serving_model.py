"""The packaged model: what MLflow stores by its source and runs wherever `models:/...@champion` is loaded."""

from __future__ import annotations

import base64
import os
from typing import Any

import mlflow
import pandas as pd
from mlflow.pyfunc import PythonModel, PythonModelContext


class RISModel(PythonModel):
    """image + expression -> mask as COCO RLE + score.

    Input: a data frame with the columns `image` (base64 of an encoded image; raw bytes; an array uint8 (H, W, 3); or, with
    the parameter allow_paths, a file path) and `text`. Output, one row per input: `counts`, `height`, `width` (compressed
    COCO RLE at the image's own size) and `score` (how sure the system is, 0 for an empty mask).
    Parameters: `threshold` (default 0.5), `allow_paths` (default false: a served model must not read files for clients).
    """

    def load_context(self, context: PythonModelContext) -> None:
        from ris_core.predictor import RISPredictor

        self.predictor = RISPredictor.from_folder(context.artifacts["model"])

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        options = {"threshold": 0.5, "allow_paths": False, **(params or {})}
        rows: list[dict[str, Any]] = []
        previous: Any = None
        for image, text in zip(model_input["image"], model_input["text"], strict=True):
            if image is not previous:  # consecutive rows about one image share its encoding
                self.predictor.set_image(self._image(image, bool(options["allow_paths"])))
                previous = image
            (prediction,) = self.predictor.predict([text], threshold=float(options["threshold"]))
            rle = prediction.rle
            height, width = rle["size"]
            rows.append({"counts": rle["counts"], "height": height, "width": width, "score": prediction.score})
        return pd.DataFrame(rows, columns=["counts", "height", "width", "score"])

    @staticmethod
    def _image(image: Any, allow_paths: bool) -> Any:
        from ris_core.errors import DataError

        if not isinstance(image, str) or (allow_paths and os.path.isfile(image)):
            return image
        try:
            return base64.b64decode(image, validate=True)
        except ValueError:
            if allow_paths:  # then it was meant as one, and the predictor says that there is no such file
                return image
            raise DataError(
                f"the image text {image[:40]!r} is not base64; file paths are read only with params={{'allow_paths': True}}"
            ) from None


mlflow.models.set_model(RISModel())
