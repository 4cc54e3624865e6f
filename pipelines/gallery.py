"""Answers as pictures: what a system was scored for, drawn over the photos. A gallery shows typical hits and sure misses."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from ris_core.data.dataset import ShardStore
from ris_core.data.images import load_image
from ris_core.data.text import NONE, SEVERAL
from ris_core.evaluation.figures import captioned, grid, heat, overlay
from ris_core.evaluation.metrics import iou
from ris_core.models.answer import resized
from ris_core.options import Plain
from ris_core.predictor import Prediction, RISPredictor

KINDS = ("attribute", "size", "location", "order", "relation", SEVERAL, NONE)
PER_KIND = 2
SHOWN_SIDE = 320  # pixels to which small pictures are enlarged


@dataclass(frozen=True)
class Scene:
    """What an expression is about: a photo and its true mask."""

    photo: np.ndarray  # uint8 (H, W, 3)
    truth: np.ndarray  # bool (H, W)


@dataclass(frozen=True)
class Drawn:
    """An answer, drawn: the prediction tinted, the true outline in green, and the photo with where the system looked."""

    prediction: Prediction
    picture: Image.Image
    looked: Image.Image | None


def scenes(rows: Sequence[Plain], store: ShardStore, photos: Path) -> list[Scene]:
    """Give the scene of each row of a table of expressions."""
    places = store.places()
    found = []
    for row in rows:
        index = places[row["image_id"]]
        image = store.row(index)
        ann_id = next(ref["ann_id"] for ref in image["refs"] if ref["ref_id"] == row["ref_id"])
        found.append(Scene(load_image(photos / image["file_name"]), store.mask(index, ann_id).astype(bool)))
    return found


def answered(rows: Sequence[Plain], seen: Sequence[Scene], predictor: RISPredictor) -> Iterator[Drawn]:
    """Give a predictor's answers to the rows of a table of expressions; it should compute and read as they were scored."""
    reading = predictor.reading
    for row, scene in zip(rows, seen, strict=True):
        (prediction,) = predictor.answer(predictor.encode(scene.photo), [row["text"]])
        photo, truth = scene.photo, resized(torch.from_numpy(scene.truth)[None], reading)[0].numpy()
        if photo.shape[:2] != truth.shape:
            photo = np.asarray(Image.fromarray(photo).resize(truth.shape[::-1]))
        scale = max(1, round(SHOWN_SIDE / max(photo.shape[:2])))
        looked = None if prediction.location is None else heat(photo, prediction.location, scale)
        yield Drawn(prediction, overlay(photo, prediction.mask, truth, scale), looked)


def side_by_side(
    rows: Sequence[Plain], seen: Sequence[Scene], predictors: Iterable[tuple[str, RISPredictor]]
) -> list[Image.Image]:
    """Draw the answers of several models to each row in a line, each captioned with its name and the IoU that was scored.

    A row's `iou` has a number per name. Where predictors are made as they are asked for, one is in memory at a time.
    """
    columns = []
    for name, predictor in predictors:
        drawings = zip(answered(rows, seen, predictor), rows, strict=True)
        columns.append([captioned(drawn.picture, f"{name} {row['iou'][name]:.2f}") for drawn, row in drawings])
    return [grid(list(panel), columns=len(columns)) for panel in zip(*columns, strict=True)]


def choose(table: pa.Table, empty_union: float = 0.0) -> list[Plain]:
    """Pick rows to show: per kind of expression a typical hit (the upper quartile's IoU) and the most confident misses.

    A hit is not the very best answer, which flatters; a miss is one the model was sure of, which teaches. `empty_union` is
    the protocol's.
    """
    chosen = []
    values = iou(table["intersection"].to_numpy(), table["union"].to_numpy(), empty_union).tolist()
    scored = [{**row, "iou": value} for row, value in zip(table.to_pylist(), values, strict=True)]
    for kind in KINDS:
        rows = [row for row in scored if row["kind"] == kind]
        hits = sorted((row for row in rows if row["iou"] >= 0.5), key=lambda row: (row["iou"], row["sent_id"]))
        misses = sorted((row for row in rows if row["iou"] < 0.1), key=lambda row: (-row["score"], row["sent_id"]))
        typical = hits[3 * len(hits) // 4 :][:PER_KIND]
        chosen += [{**row, "verdict": "hit"} for row in typical]
        chosen += [{**row, "verdict": "miss"} for row in misses[:PER_KIND]]
    return chosen


def draw(rows: Sequence[Plain], predictor: RISPredictor, store: ShardStore, photos: Path, out: Path) -> list[Plain]:
    """Write one JPEG per row into `out` and return rows with file names; the predictor reads as they were scored.

    Where the system looked stands beside the mask. `answers.jpg` shows a hit of each kind, side by side.
    """
    shown: list[Plain] = []
    hits: dict[str, Image.Image] = {}
    drawings = answered(rows, scenes(rows, store, photos), predictor)
    for number, (row, drawn) in enumerate(zip(rows, drawings, strict=True)):
        name = f"{number:02d}-{row['verdict']}-{row['kind']}.jpg"
        if row["verdict"] == "hit":
            hits.setdefault(row["kind"], captioned(drawn.picture, row["text"]))
        picture = grid([drawn.picture, drawn.looked], columns=2) if drawn.looked else drawn.picture
        picture.save(out / name, quality=85)
        told = {key: row[key] for key in ("text", "kind", "verdict", "iou", "score", "sent_id")}
        shown.append({"file": name, **told})
    if hits:
        grid(list(hits.values()), columns=len(hits)).save(out / "answers.jpg", quality=85)
    return shown
