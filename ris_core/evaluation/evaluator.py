"""From a model and shards to intersections and unions per expression, at the protocol's resolution.

An image is encoded once for all of its expressions. What comes out is a table with one row per expression, from which
every score, subset or paired comparison can be recomputed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import nn

from ris_core.data import masks
from ris_core.data.dataset import ShardStore
from ris_core.data.letterbox import unletterbox
from ris_core.data.text import encode, expression_kind, pad_token_batch
from ris_core.errors import DataError
from ris_core.evaluation.metrics import Protocol
from ris_core.models.clip import normalise
from ris_core.models.systems import upsampled_map

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
        ("score", pa.float64()),
        ("right_object", pa.bool_()),
        ("random_intersection", pa.float64()),
        ("random_union", pa.float64()),
        ("random_iou", pa.float64()),
    ]
)


@dataclass(frozen=True)
class Query:
    """One expression to score: where its image is, whose mask is the truth, and the text the model is given."""

    image: int
    ref_id: int
    ann_id: int
    sent_id: int
    text: str


def queries_of(store: ShardStore, split: str, protocol: Protocol, images: Sequence[int] | None = None) -> list[Query]:
    """Every expression of `split` (of these images only, if given), in image order; each counts exactly once."""
    found = []
    for image in store.images_of(split) if images is None else images:
        for ref in store.row(int(image))["refs"]:
            if ref["split"] == split:
                chosen = ref["sentences"][: 1 if protocol.sentences == "first" else None]
                found += [
                    Query(int(image), ref["ref_id"], ref["ann_id"], s["sent_id"], s[protocol.text]) for s in chosen
                ]
    return found


def shuffled(queries: Sequence[Query], seed: int) -> list[Query]:
    """The same queries, each with a sentence of another referent: what a model scores that ignores language.

    A seeded permutation, repaired by swapping until no referent keeps a sentence of its own. Raises DataError if that
    cannot be done, because one referent has more than half of the sentences.
    """
    of_one = max(Counter(query.ref_id for query in queries).values(), default=0)
    if 2 * of_one > len(queries):
        raise DataError(f"{len(queries)} sentences cannot be shuffled among referents: {of_one} of them are of one")
    order = np.random.default_rng(seed).permutation(len(queries))
    for i in range(len(order)):
        step = 1
        while queries[order[i]].ref_id == queries[i].ref_id and step < len(order):
            j = (i + step) % len(order)
            if queries[order[j]].ref_id != queries[i].ref_id and queries[order[i]].ref_id != queries[j].ref_id:
                order[i], order[j] = order[j], order[i]
            step += 1
    return [
        Query(query.image, query.ref_id, query.ann_id, query.sent_id, queries[source].text)
        for query, source in zip(queries, order, strict=True)
    ]


def swapped(queries: Sequence[Query], seed: int) -> list[Query]:
    """The same queries, each with a sentence about another object of the same image: the sharper control.

    A model that ignores language keeps its score; one that understands it marks the other object and falls to about 0.
    Queries whose image has no other referent among them are left out.
    """
    random = np.random.default_rng(seed)
    of_image: dict[int, list[Query]] = {}
    for query in queries:
        of_image.setdefault(query.image, []).append(query)
    result = []
    for query in queries:
        others = [other.text for other in of_image[query.image] if other.ref_id != query.ref_id]
        if others:
            result.append(replace(query, text=others[random.integers(len(others))]))
    return result


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    store: ShardStore,
    queries: Sequence[Query],
    protocol: Protocol,
    *,
    word_len: int,
    split: str,
    images_per_batch: int = 8,
    with_objects: bool = True,
    answer: Literal["segment", "locate"] = "segment",
) -> pa.Table:
    """Score `queries` (grouped by image) and return a table with `TABLE_SCHEMA`.

    `answer` is the method of the model whose logits are scored: its masks, or the coarse map of a system that has one.

    `with_objects` also compares each prediction with every annotated object of its image (is the best-covered one the
    right one?) and adds the expectation of picking one of these objects at random; without it these columns are null.
    The model is left in evaluation mode.
    """
    model.eval()
    device = next(model.parameters()).device
    rows: list[dict[str, Any]] = []
    for group in _by_images(queries, images_per_batch):
        images = sorted({query.image for query in group})
        place = {image: i for i, image in enumerate(images)}
        pixels = torch.from_numpy(np.stack([store.pixels(image) for image in images])).to(device)
        features = model.encode_image(normalise(pixels.permute(0, 3, 1, 2)))  # type: ignore[operator]
        texts = [encode(query.text) for query in group]
        longest = min(word_len, max(map(len, texts)))
        tokens = torch.from_numpy(pad_token_batch(texts, longest)).to(device)
        index = torch.tensor([place[query.image] for query in group], device=device)
        inputs = (features, tokens, index)
        logits = upsampled_map(model, inputs, store.image_size) if answer == "locate" else model.segment(*inputs)  # type: ignore[operator]
        probabilities = logits.float().sigmoid()[:, 0]
        for image in images:
            chosen = [i for i, query in enumerate(group) if query.image == image]
            rows += _score_image(
                store, image, [group[i] for i in chosen], probabilities[chosen], protocol, split, with_objects
            )
    return pa.Table.from_pylist(rows, schema=TABLE_SCHEMA)


def _by_images(queries: Sequence[Query], count: int) -> Iterator[list[Query]]:
    """Consecutive runs of queries that together touch at most `count` images."""
    group: list[Query] = []
    images: set[int] = set()
    for query in queries:
        if query.image not in images and len(images) == count:
            yield group
            group, images = [], set()
        group.append(query)
        images.add(query.image)
    if group:
        yield group


def _score_image(
    store: ShardStore,
    image: int,
    queries: Sequence[Query],
    probabilities: torch.Tensor,
    protocol: Protocol,
    split: str,
    with_objects: bool,
) -> list[dict[str, Any]]:
    """Rows of one image; probabilities (N, h, w) on the model's device."""
    row = store.row(image)
    height, width = row["height"], row["width"]
    full = unletterbox(probabilities, height, width, store.image_size, store.resample, protocol.upsampling)
    wanted = {query.ann_id for query in queries}
    objects = [o for o in row["instances"] if o["ann_id"] in wanted or (with_objects and not o["iscrowd"])]
    truth = torch.from_numpy(np.stack([masks.decode(o["counts"], height, width) for o in objects])).to(full.device)
    if protocol.resolution != "original":
        size = (int(protocol.resolution), int(protocol.resolution))
        full = F.interpolate(full[None], size, mode="bilinear", align_corners=False)[0]
        truth = F.interpolate(truth[None], size, mode="nearest")[0]
    predicted, truth = (full > protocol.threshold).float().flatten(1), truth.float().flatten(1)
    overlap, covered = pairwise_overlap(predicted, truth)
    area = predicted.sum(1).long()
    confidence = (full.flatten(1) * predicted).sum(1) / area.clamp(min=1)
    among, together = pairwise_overlap(truth, truth)
    values = [tensor.cpu().numpy() for tensor in (overlap, covered, area, confidence, among, together)]
    ann_ids = [o["ann_id"] for o in objects]
    return [
        _row(query, i, ann_ids.index(query.ann_id), row["image_id"], split, values, with_objects)
        for i, query in enumerate(queries)
    ]


def _row(
    query: Query, i: int, own: int, image_id: int, split: str, values: list[np.ndarray], with_objects: bool
) -> dict[str, Any]:
    overlap, covered, area, confidence, among, together = values
    result = {
        "image_id": image_id,
        "ref_id": query.ref_id,
        "sent_id": query.sent_id,
        "split": split,
        "text": query.text,
        "kind": expression_kind(query.text),
        "intersection": int(overlap[i, own]),
        "union": int(covered[i, own]),
        "area": int(area[i]),
        "score": float(confidence[i]),
    }
    if with_objects:
        result["right_object"] = bool(overlap[i].any() and np.argmax(overlap[i] / np.maximum(covered[i], 1)) == own)
        result["random_intersection"] = float(among[own].mean())
        result["random_union"] = float(together[own].mean())
        result["random_iou"] = float((among[own] / np.maximum(together[own], 1)).mean())
    return result


def pairwise_overlap(first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Intersections and unions, int64 (N, M), of two stacks of masks of 0 and 1, (N, ...) and (M, ...) of equal size."""
    a, b = first.flatten(1).float(), second.flatten(1).float()
    intersection = (a @ b.T).round().long()  # exact: pixel counts stay far below 2^24
    return intersection, a.sum(1).long()[:, None] + b.sum(1).long()[None] - intersection
