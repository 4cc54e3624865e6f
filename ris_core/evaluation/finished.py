"""Finished masks as answers: anybody's, scored as if they were given now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch

from ris_core.data import masks
from ris_core.data.dataset import ShardStore
from ris_core.data.text import NONE, SEVERAL, expression_kind
from ris_core.evaluation.answers import Answerer, Answers
from ris_core.evaluation.evaluator import evaluate
from ris_core.evaluation.metrics import Protocol
from ris_core.evaluation.queries import Query, of_images, queries_of, swapped
from ris_core.models.answer import resized

Key = tuple[int, int]  # ref_id and sent_id: which expression


@dataclass(frozen=True, slots=True)
class Finished:
    """A mask as COCO run lengths, None where there was nothing to choose from; and how sure the system was of it."""

    counts: str | None
    score: float = 1.0


@dataclass(frozen=True)
class FinishedAnswers(Answerer):
    """An answerer that gives finished masks, at the protocol's resolution; without one for an expression it is empty.

    side: they are squares of so many pixels a side, None where they are of their images' sizes.
    """

    given: Mapping[Key, Finished]
    side: int | None = None

    def __call__(self, store: ShardStore, queries: Sequence[Query], protocol: Protocol) -> dict[int, Answers]:
        return {image: self._of_image(store, asked, protocol) for image, asked in of_images(queries).items()}

    def _of_image(self, store: ShardStore, queries: Sequence[Query], protocol: Protocol) -> Answers:
        row = store.row(queries[0].image)
        size = (row["height"], row["width"]) if self.side is None else (self.side, self.side)
        given = [self.given[query.ref_id, query.sent_id] for query in queries]
        found = np.stack(
            [np.zeros(size, np.uint8) if g.counts is None else masks.decode(g.counts, *size) for g in given]
        )
        scores = torch.tensor([each.score for each in given], dtype=torch.float64)
        return Answers(resized(torch.from_numpy(found), protocol.reading), scores)


def tables(
    given: Mapping[Key, Finished],
    store: ShardStore,
    split: str,
    protocols: Sequence[Protocol],
    side: int | None = None,
    progress: str | None = None,
) -> dict[str, pa.Table]:
    """Score finished masks under each protocol: tables of `evaluator.TABLE_SCHEMA` by its name, rows in the data's order.

    They are compared once for each resolution and least area: the rest of a protocol chooses among rows, or says how they
    are counted.
    `given` has every expression that a protocol asks about. `progress` is the title of a bar on a terminal.
    """
    scored: dict[tuple[str | int, int], tuple[pa.Table, dict[Key, int]]] = {}
    found = {}
    for protocol in sorted(protocols, key=lambda each: each.sentences != "all"):  # those that ask about all first
        queries = queries_of(store, split, protocol)
        seen = protocol.resolution, protocol.least_area
        if seen not in scored:
            table = evaluate(FinishedAnswers(given, side), store, queries, protocol, split=split, progress=progress)
            scored[seen] = table, {(q.ref_id, q.sent_id): i for i, q in enumerate(queries)}
        table, rows = scored[seen]
        found[protocol.name] = _as_asked(table.take([rows[q.ref_id, q.sent_id] for q in queries]), queries, given)
    return {protocol.name: found[protocol.name] for protocol in protocols}


def _as_asked(table: pa.Table, queries: Sequence[Query], given: Mapping[Key, Finished]) -> pa.Table:
    """Put into rows the texts that a protocol reads, and which expressions had anything to choose from."""
    texts = [query.text for query in queries]
    kinds = table["kind"].to_pylist()
    columns = {
        "text": texts,
        "kind": [
            kind if kind in (SEVERAL, NONE) else expression_kind(text) for kind, text in zip(kinds, texts, strict=True)
        ],
        "found": [given[query.ref_id, query.sent_id].counts is not None for query in queries],
    }
    for name, values in columns.items():
        place = table.schema.get_field_index(name)
        table = table.set_column(place, table.schema.field(name), pa.array(values, table.schema.field(name).type))
    return table


def swapped_table(
    given: Mapping[Key, Finished], store: ShardStore, split: str, protocol: Protocol, seed: int, side: int | None = None
) -> pa.Table:
    """Score each referent with the mask that was given to a sentence about another object of the same image.

    That is what asking the system again would give, as the sentence was asked about this image already: the control
    `queries.swapped` without the system. The columns about other objects are null.
    """
    queries = queries_of(store, split, protocol)
    answers: dict[tuple[int, str], Finished] = {}
    for query in queries:
        answers.setdefault((query.image, query.text), given[query.ref_id, query.sent_id])
    asked = swapped(queries, seed)
    exchanged = {(query.ref_id, query.sent_id): answers[query.image, query.text] for query in asked}
    return evaluate(FinishedAnswers(exchanged, side), store, asked, protocol, split=split, with_objects=False)
