"""How the images of a batch are answered, in whichever process: each is decoded and encoded once for all its expressions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from pipelines.transport import Place
from ris_core.data.images import BadImage
from ris_core.errors import DataError
from ris_core.options import Plain
from ris_core.predictor import EncodedImage, RISPredictor

EXPRESSIONS_AT_ONCE = 64
PIXELS_AT_ONCE = 64_000_000  # of all answers in memory together: each has a probability for every pixel
SHOWN = 300  # characters of an error

# What a row has beside what it was asked. Of a row with an error all else is null.
ANSWERS = pa.schema(
    [
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("counts", pa.string()),  # COCO compressed run lengths
        ("score", pa.float64()),
        ("cut", pa.bool_()),
        ("error", pa.string()),
    ]
)
ROW = "row"  # its number among all that is asked
FOUND = pa.schema([(ROW, pa.int64()), *ANSWERS])


def answer_image(predictor: RISPredictor, path: Path | None, problem: str, texts: Sequence[str | None]) -> list[Plain]:
    """Answer all texts about an image file, one entry of `ANSWERS` each; what is wrong with one spoils no other.

    `problem` tells why there is no file, where `path` is None.
    """
    good = [place for place, text in enumerate(texts) if text is not None and text.strip()]
    answers: list[Plain] = [{"error": "the text is blank"} for _ in texts]
    encoded: EncodedImage | None = None
    if path is not None and good:
        try:
            encoded = predictor.encode(path)
        except BadImage as error:
            problem = f"the image cannot be used: {error.reason}"
        except DataError as error:
            problem = f"the image cannot be read: {error}"
    if problem:
        told = " ".join(problem.split())[:SHOWN]
        for answer in answers:
            answer["error"] = told
    if encoded is not None:
        step = max(1, min(EXPRESSIONS_AT_ONCE, PIXELS_AT_ONCE // (encoded.height * encoded.width)))
        for first in range(0, len(good), step):
            some = good[first : first + step]
            for place, found in zip(some, predictor.answer(encoded, [str(texts[i]) for i in some]), strict=True):
                height, width = found.mask.shape
                answers[place] = {
                    "height": height,
                    "width": width,
                    "counts": found.rle["counts"],
                    "score": found.score,
                    "cut": found.cut,
                }
    return answers


class Answerer:
    """A Ray Data actor: the model is opened once, then units come in, one at a time.

    A unit is JSON: `photos`, a folder as `transport.Place` tells it, and `images`, of each its `file` in there or the
    `problem` that it has, its `rows` and their `texts`. It gives a table of `FOUND`.
    """

    def __init__(self, model: Place, threshold: float):
        self.predictor = RISPredictor.from_folder(model.local(), threshold=threshold)

    def __call__(self, batch: pa.Table) -> pa.Table:
        rows: list[Plain] = []
        for unit in map(json.loads, batch["unit"].to_pylist()):
            photos = Place.of(unit["photos"]).local()
            for image in unit["images"]:
                path = None if image["file"] is None else photos / image["file"]
                answers = answer_image(self.predictor, path, image["problem"], image["texts"])
                rows += [{ROW: row, **answer} for row, answer in zip(image["rows"], answers, strict=True)]
        return pa.Table.from_pylist(rows, FOUND)
