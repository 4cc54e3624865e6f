"""From answers to intersections and unions per expression, at the protocol's resolution.

What comes out is a table with one row per expression, from which every score, subset or paired comparison can be
recomputed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from ris_core.data import masks
from ris_core.data.dataset import ShardStore
from ris_core.data.text import NONE, SEVERAL, expression_kind
from ris_core.evaluation.answers import Answerer, Answers, pairwise_overlap
from ris_core.evaluation.metrics import Protocol
from ris_core.evaluation.queries import Query, by_images
from ris_core.models.answer import resized

TABLE_SCHEMA = pa.schema(
    [
        ("image_id", pa.int64()),
        ("ref_id", pa.int64()),
        ("sent_id", pa.int64()),
        ("split", pa.string()),
        ("text", pa.string()),
        ("kind", pa.string()),
        ("intersection", pa.int64()),
        ("union", pa.int64()),
        ("area", pa.int64()),
        ("object_share", pa.float64()),
        ("score", pa.float64()),
        ("found", pa.bool_()),
        ("right_object", pa.bool_()),
        ("random_intersection", pa.float64()),
        ("random_union", pa.float64()),
        ("random_iou", pa.float64()),
    ]
)


@torch.inference_mode()
def evaluate(
    answer: Answerer,
    store: ShardStore,
    queries: Sequence[Query],
    protocol: Protocol,
    *,
    split: str,
    images_per_batch: int = 8,
    with_objects: bool = True,
) -> pa.Table:
    """Score the answers to `queries` (grouped by image) and return a table with `TABLE_SCHEMA`.

    `area` is the answer's in pixels, `object_share` the true object's share of the image, `found` whether there was
    anything to choose from. `with_objects` also compares each answer with every annotated object of its image (is the
    best-covered one the right one?) and adds the expectation of picking one of these objects at random; without it
    these columns are null. `kind` is `several` or `none` where not exactly one object is meant. The target of a referent
    that has not exactly one is no object that other answers are compared with.
    """
    rows: list[dict[str, Any]] = []
    for group in by_images(queries, images_per_batch):
        for image, answers in answer(store, group, protocol).items():
            asked = [query for query in group if query.image == image]
            rows += _score_image(store, image, asked, answers, protocol, split, with_objects)
    return pa.Table.from_pylist(rows, schema=TABLE_SCHEMA)


def _score_image(
    store: ShardStore,
    image: int,
    queries: Sequence[Query],
    answers: Answers,
    protocol: Protocol,
    split: str,
    with_objects: bool,
) -> list[dict[str, Any]]:
    """Give the rows of one image."""
    row = store.row(image)
    wanted = {query.ann_id for query in queries}
    objects = [o for o in row["instances"] if o["ann_id"] in wanted or (with_objects and not o["iscrowd"])]
    decoded = np.stack([masks.decode(o["counts"], row["height"], row["width"]) for o in objects])
    truth = resized(torch.from_numpy(decoded).to(answers.masks.device), protocol.reading)
    given = answers.masks
    if protocol.least_area:
        given = given & (given.flatten(1).sum(1) >= protocol.least_area)[:, None, None]
    overlap, covered = pairwise_overlap(given, truth)
    among, together = pairwise_overlap(truth, truth)
    area = given.flatten(1).sum(1)
    values = [tensor.cpu().numpy() for tensor in (overlap, covered, area, answers.scores, among, together)]
    ann_ids = [o["ann_id"] for o in objects]
    common = {"image_id": row["image_id"], "split": split, "found": answers.found}
    pixels = truth[0].numel()
    real = np.array([number >= 0 for number in ann_ids])
    found = []
    for i, query in enumerate(queries):
        own = ann_ids.index(query.ann_id)
        kind = expression_kind(query.text) if real[own] else SEVERAL if decoded[own].any() else NONE
        found.append({**common, "kind": kind, **_row(query, i, own, pixels, values, real, with_objects)})
    return found


def _row(
    query: Query, i: int, own: int, pixels: int, values: list[np.ndarray], real: np.ndarray, with_objects: bool
) -> dict[str, Any]:
    """Give the row of one query; `real`, bool (M,), tells which of the masks compared are objects, and no targets."""
    overlap, covered, area, score, among, together = values
    result = {
        "ref_id": query.ref_id,
        "sent_id": query.sent_id,
        "text": query.text,
        "intersection": int(overlap[i, own]),
        "union": int(covered[i, own]),
        "area": int(area[i]),
        "object_share": float(among[own, own] / pixels),
        "score": float(score[i]),
    }
    if with_objects:
        rivals = real | (np.arange(len(real)) == own)
        cover = np.where(rivals, overlap[i] / np.maximum(covered[i], 1), 0)
        result["right_object"] = bool(cover.any() and np.argmax(cover) == own)
        # Where no object is annotated there is none to pick: the answer is empty then.
        shared, joint = (among[own, real], together[own, real]) if real.any() else (np.zeros(1), among[[own], own])
        result["random_intersection"] = float(shared.mean())
        result["random_union"] = float(joint.mean())
        result["random_iou"] = float((shared / np.maximum(joint, 1)).mean())
    return result
