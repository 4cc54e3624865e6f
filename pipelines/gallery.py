"""Pictures of an evaluation: best hits and worst misses of each kind of expression, with masks drawn."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa
    from PIL import Image

    from ris_core.data.dataset import ShardStore

KINDS = ("attribute", "size", "location", "order", "relation")
PER_KIND = 2


def choose(table: pa.Table) -> list[dict[str, Any]]:
    """Rows to show: per kind of expression a typical hit (the upper quartile's IoU) and the most confident misses.

    A hit is not the very best answer, which flatters; a miss is one the model was sure of, which teaches.
    """
    chosen = []
    for kind in KINDS:
        rows = [
            {**row, "iou": row["intersection"] / max(1, row["union"])}
            for row in table.to_pylist()
            if row["kind"] == kind
        ]
        hits = sorted((row for row in rows if row["iou"] >= 0.5), key=lambda row: (row["iou"], row["sent_id"]))
        misses = sorted((row for row in rows if row["iou"] < 0.1), key=lambda row: (-row["score"], row["sent_id"]))
        typical = hits[3 * len(hits) // 4 :][:PER_KIND]
        chosen += [{**row, "verdict": "hit"} for row in typical]
        chosen += [{**row, "verdict": "miss"} for row in misses[:PER_KIND]]
    return chosen


def draw(
    rows: list[dict[str, Any]], model: Path, threshold: float, store: ShardStore, image_root: Path, out: Path
) -> list[dict[str, Any]]:
    """Write one JPEG per row into `out` (prediction tinted, true outline in green) and return rows with file names.

    The coarse map of a system that has one stands beside the mask.
    `answers.jpg` shows a hit of each kind, side by side. `threshold` is that of the protocol the rows were scored with,
    so that the pictures show what was scored.
    """
    from ris_core.data.shards import load_image
    from ris_core.evaluation.figures import captioned, grid, heat, overlay
    from ris_core.predictor import RISPredictor

    predictor = RISPredictor.from_folder(model, threshold=threshold)
    place = {store.row(i)["image_id"]: i for i in range(len(store))}
    shown: list[dict[str, Any]] = []
    hits: dict[str, Image.Image] = {}
    for number, row in enumerate(rows):
        index = place[row["image_id"]]
        image = store.row(index)
        ann_id = next(ref["ann_id"] for ref in image["refs"] if ref["ref_id"] == row["ref_id"])
        pixels = load_image(image_root / image["file_name"])
        predictor.set_image(pixels)
        (prediction,) = predictor.predict([row["text"]])
        scale = max(1, round(320 / max(pixels.shape[:2])))
        name = f"{number:02d}-{row['verdict']}-{row['kind']}.jpg"
        picture = overlay(pixels, prediction.mask, store.mask(index, ann_id).astype(bool), scale)
        if row["verdict"] == "hit":
            hits.setdefault(row["kind"], captioned(picture, row["text"]))
        if prediction.location is not None:
            picture = grid([picture, heat(pixels, prediction.location, scale)], columns=2)
        picture.save(out / name, quality=85)
        shown.append(
            {"file": name, **{key: row[key] for key in ("text", "kind", "verdict", "iou", "score", "sent_id")}}
        )
    if hits:
        grid(list(hits.values()), columns=len(hits)).save(out / "answers.jpg", quality=85)
    return shown
