"""From answers to intersections and unions per expression, at the protocol's resolution.

What comes out is a table with one row per expression, from which every score, subset or paired comparison can be
recomputed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from tqdm import tqdm

from ris_core.data import masks
from ris_core.data.dataset import ShardStore
from ris_core.data.text import NONE, SEVERAL, expression_kind
from ris_core.evaluation.answers import Answerer, Answers
from ris_core.evaluation.metrics import Protocol
from ris_core.evaluation.overlap import areas, packed, pairwise_overlap
from ris_core.evaluation.params import EXPRESSIONS_PER_BATCH
from ris_core.evaluation.queries import Query, batched, of_images
from ris_core.models.answer import Reading, resized

COUNTS = "counts"  # a column that tables have beside TABLE_SCHEMA where masks are kept: their run lengths
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


@dataclass(frozen=True)
class Job:
    """What is to be scored in one go: queries grouped by image, their images ascending, under a protocol."""

    name: str
    protocol: Protocol
    split: str
    queries: Sequence[Query]


def evaluate(
    answer: Answerer,
    store: ShardStore,
    queries: Sequence[Query],
    protocol: Protocol,
    *,
    split: str,
    expressions_per_batch: int = EXPRESSIONS_PER_BATCH,
    with_objects: bool = True,
    progress: str | None = None,
) -> pa.Table:
    """Score the answers to `queries` under one protocol and return a table with `TABLE_SCHEMA`; see `evaluate_all`."""
    job = Job("", protocol, split, queries)
    tables = evaluate_all(
        answer,
        store,
        [job],
        expressions_per_batch=expressions_per_batch,
        with_objects=with_objects,
        progress=progress,
    )
    return tables[""]


@torch.inference_mode()
def evaluate_all(
    answer: Answerer,
    store: ShardStore,
    jobs: Sequence[Job],
    *,
    expressions_per_batch: int = EXPRESSIONS_PER_BATCH,
    with_objects: bool = True,
    with_counts: bool = False,
    progress: str | None = None,
) -> dict[str, pa.Table]:
    """Score the answers to several jobs and return for each, by name, a table with `TABLE_SCHEMA`, rows as its queries.

    Each image is encoded once for all of them, and a sentence that several ask about it is answered once. The images of a
    forward pass have together at most `expressions_per_batch` different sentences, or it is one image alone.

    `area` is the answer's in pixels, `object_share` the true object's share of the image, `found` whether there was
    anything to choose from. `with_objects` also compares each answer with every annotated object of its image (is the
    best-covered one the right one?) and adds the expectation of picking one of these objects at random; without it
    these columns are null. `kind` is `several` or `none` where not exactly one object is meant. The target of a referent
    that has not exactly one is no object that other answers are compared with. `with_counts` adds the answers' masks, as
    run lengths, in a column COUNTS. `progress` is the title of a bar on a terminal.
    """
    asked = [of_images(job.queries) for job in jobs]
    schema = TABLE_SCHEMA.append(pa.field(COUNTS, pa.string())) if with_counts else TABLE_SCHEMA
    found: list[dict[str, list[Any]]] = [{name: [] for name in schema.names} for _ in jobs]
    texts: dict[int, set[str]] = {}
    for image in sorted({image for each in asked for image in each}):
        texts[image] = {query.text for each in asked for query in each.get(image, ())}
    bar = tqdm(total=len(texts), desc=progress, unit="img", disable=None if progress else True, leave=False)
    for images in batched({image: len(said) for image, said in texts.items()}, expressions_per_batch):
        told = answer.about(store, [query for image in images for each in asked for query in each.get(image, ())])
        for image in images:
            meter = _Meter(store, image, with_objects)
            for job, each, columns in zip(jobs, asked, found, strict=True):
                if queries := each.get(image):
                    answers = told(store, queries, job.protocol)[image]
                    for name, values in meter.columns(queries, answers, job).items():
                        columns[name] += values
                    if with_counts:
                        columns[COUNTS] += [masks.encode(mask) for mask in answers.masks.cpu().numpy()]
            bar.update()
    bar.close()
    return {job.name: _table(columns, schema) for job, columns in zip(jobs, found, strict=True)}


def _table(columns: dict[str, list[Any]], schema: pa.Schema) -> pa.Table:
    """Make a table of columns; one that stayed empty beside others is null."""
    count = len(columns["text"])
    return pa.table({name: values or [None] * count for name, values in columns.items()}, schema=schema)


class _Meter:
    """Compares answers about one image with what is annotated in it, which is decoded once for all protocols."""

    def __init__(self, store: ShardStore, image: int, with_objects: bool):
        self.row, self.with_objects = store.row(image), with_objects
        self.counts = {o["ann_id"]: o["counts"] for o in self.row["instances"]}
        self.packed: dict[tuple[int, str | int], np.ndarray] = {}

    def columns(self, queries: Sequence[Query], answers: Answers, job: Job) -> dict[str, list[Any]]:
        """Give the columns of `TABLE_SCHEMA` of a job's queries about the image."""
        wanted = {query.ann_id for query in queries}
        objects = [
            o["ann_id"]
            for o in self.row["instances"]
            if o["ann_id"] in wanted or (self.with_objects and not o["iscrowd"])
        ]
        place = {ann_id: i for i, ann_id in enumerate(objects)}
        truth = np.stack([self._truth(ann_id, job.protocol.reading) for ann_id in objects])
        given = packed(answers.masks)
        given[areas(given) < job.protocol.least_area] = 0
        own = np.array([place[query.ann_id] for query in queries])
        each = np.arange(len(queries))
        overlap, covered = pairwise_overlap(given, truth)
        result = {
            "image_id": [self.row["image_id"]] * len(queries),
            "ref_id": [query.ref_id for query in queries],
            "sent_id": [query.sent_id for query in queries],
            "split": [job.split] * len(queries),
            "text": [query.text for query in queries],
            "kind": [self._kind(query) for query in queries],
            "intersection": overlap[each, own].tolist(),
            "union": covered[each, own].tolist(),
            "area": areas(given).tolist(),
            "object_share": (areas(truth)[own] / answers.masks[0].numel()).tolist(),
            "score": answers.scores.tolist(),
            "found": [answers.found] * len(queries),
        }
        if self.with_objects:
            real = np.array([ann_id >= 0 for ann_id in objects])
            among, together = pairwise_overlap(truth[own], truth)
            result["right_object"] = _chosen_rightly(overlap / np.maximum(covered, 1), own, real).tolist()
            # Where no object is annotated there is none to pick: the answer is empty then.
            shared = among[:, real] if real.any() else np.zeros((len(own), 1))
            joint = together[:, real] if real.any() else among[each, own][:, None]
            result["random_intersection"] = shared.mean(axis=1).tolist()
            result["random_union"] = joint.mean(axis=1).tolist()
            result["random_iou"] = (shared / np.maximum(joint, 1)).mean(axis=1).tolist()
        return result

    def _kind(self, query: Query) -> str:
        if query.ann_id >= 0:
            return expression_kind(query.text)
        return SEVERAL if masks.area(self.counts[query.ann_id], self.row["height"], self.row["width"]) else NONE

    def _truth(self, ann_id: int, reading: Reading) -> np.ndarray:
        """Give the true mask of an annotation at a reading's resolution, packed: uint64 (words,)."""
        key = ann_id, reading.resolution
        if key not in self.packed:
            mask = masks.decode(self.counts[ann_id], self.row["height"], self.row["width"])
            self.packed[key] = packed(resized(torch.from_numpy(mask)[None], reading))[0]
        return self.packed[key]


def _chosen_rightly(iou: np.ndarray, own: np.ndarray, real: np.ndarray) -> np.ndarray:
    """Tell, bool (N,), whether of all objects each answer covers its own best; `own` (N,) says which of iou's M that is.

    Of what is no real object, bool (M,), the own target alone is compared.
    """
    rivals = real[None] | (np.arange(len(real))[None] == own[:, None])
    cover = np.where(rivals, iou, 0)
    return np.asarray(cover.any(axis=1) & (cover.argmax(axis=1) == own))
