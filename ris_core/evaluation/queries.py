"""What is asked: the expressions of a split under a protocol, and the controls in which they are exchanged."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ris_core.data.dataset import ShardStore
from ris_core.errors import DataError
from ris_core.evaluation.metrics import Protocol


@dataclass(frozen=True, slots=True)
class Query:
    """One expression to score: where its image is, whose mask is the truth, and the text the model is given."""

    image: int
    ref_id: int
    ann_id: int
    sent_id: int
    text: str


def queries_of(store: ShardStore, split: str, protocol: Protocol, images: Sequence[int] | None = None) -> list[Query]:
    """Give every expression of `split` (of these images only, if given), in image order; each counts exactly once."""
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
    """Give the same queries, each with a sentence of another referent: what a model scores that ignores language.

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
    """Give the same queries, each with a sentence about another object of the same image: the sharper control.

    A model that ignores language keeps its score; one that understands it marks the other object and falls to about 0.
    Queries whose image has no other referent among them are left out.
    """
    random = np.random.default_rng(seed)
    of_image = of_images(queries)
    result = []
    for query in queries:
        others = [other.text for other in of_image[query.image] if other.ref_id != query.ref_id]
        if others:
            result.append(replace(query, text=others[random.integers(len(others))]))
    return result


def of_images(queries: Iterable[Query]) -> dict[int, list[Query]]:
    """Give the queries of each image, in their order."""
    found: dict[int, list[Query]] = {}
    for query in queries:
        found.setdefault(query.image, []).append(query)
    return found


def batched(asked: Mapping[int, int], limit: int) -> Iterator[list[int]]:
    """Give runs of images that have together at most `limit` expressions, or one image that has more alone.

    asked: how many expressions each image has, in the images' order.
    """
    group: list[int] = []
    together = 0
    for image, count in asked.items():
        if group and together + count > limit:
            yield group
            group, together = [], 0
        group.append(image)
        together += count
    if group:
        yield group
