"""Answers to expressions that mean none or several objects: what they are compared with, and which tests ask about them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_world import IMAGE_SIZE, Tiny

from ris_core.data.dataset import ShardStore
from ris_core.data.refer.audit import prepare
from ris_core.data.shapes.synthetic import SyntheticSpec, write_dataset
from ris_core.data.shards import ShardOptions, write_manifest, write_shard
from ris_core.data.text import NONE, SEVERAL, expression_kind
from ris_core.evaluation.answers import Answerer, Answers
from ris_core.evaluation.behaviour import Strangers, behaviour
from ris_core.evaluation.evaluator import evaluate
from ris_core.evaluation.finished import Finished, tables
from ris_core.evaluation.metrics import PROTOCOLS, Protocol, generalised, scores, suited
from ris_core.evaluation.queries import Query, queries_of, swapped
from ris_core.predictor import Prediction

STAR = "shapes*"
SPLIT = "train"  # which has the most
GREFCOCO, OURS = PROTOCOLS["grefcoco"], PROTOCOLS["ours"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ShardStore:
    root = tmp_path_factory.mktemp("star")
    write_dataset(root, STAR, SyntheticSpec(seed=5, canvas=80, train=30, val=1, test=1), progress=False)
    records, _ = prepare(root, STAR, on_bad="error", strict=True, exclude={}, check_images=False, workers=1)
    options = ShardOptions(IMAGE_SIZE)
    (root / "shards").mkdir()
    entry = write_shard(root / "shards/part-0.arrow", records, root, options)
    write_manifest(root / "shards", STAR, options, [entry])
    return ShardStore(root / "shards")


def truth(store: ShardStore, query: Query) -> np.ndarray:
    return store.mask(query.image, query.ann_id) > 0


def silence(store: ShardStore, query: Query) -> np.ndarray:
    return np.zeros_like(truth(store, query))


def everything(store: ShardStore, query: Query) -> np.ndarray:
    return np.ones_like(truth(store, query))


class Answering(Answerer):
    """An answerer made of a function."""

    def __init__(self, answer=truth):
        self.answer = answer

    def __call__(self, store: ShardStore, queries: Sequence[Query], protocol: Protocol) -> dict[int, Answers]:
        found = {}
        for image in dict.fromkeys(query.image for query in queries):
            asked = [query for query in queries if query.image == image]
            masks = torch.from_numpy(np.stack([self.answer(store, query) for query in asked]))
            found[image] = Answers(masks, torch.ones(len(asked)))
        return found


def columns(store: ShardStore, answer=truth, protocol: Protocol = GREFCOCO) -> dict[str, np.ndarray]:
    table = evaluate(Answering(answer), store, queries_of(store, SPLIT, protocol), protocol, split=SPLIT)
    return {name: np.array(table[name].to_pylist()) for name in table.column_names}


def scored(found: dict[str, np.ndarray]) -> dict[str, float]:
    sums = found["intersection"], found["union"]
    told = scores(*sums, empty_union=GREFCOCO.empty_union)
    return told | generalised(*sums, found["area"], found["object_share"] > 0)


def test_data_say_themselves_whether_they_are_generalised(store: ShardStore, tiny: Tiny) -> None:
    assert store.is_generalised
    assert not tiny.store().is_generalised


def test_grefcoco_stands_first_where_it_must() -> None:
    named = lambda names, generalised: [protocol.name for protocol in suited(names, generalised)]  # noqa: E731
    assert named(["ours", "cris"], False) == ["ours", "cris"]
    assert named(["ours", "cris"], True) == ["grefcoco", "ours", "cris"]
    assert named(["ours", "grefcoco"], True) == ["ours", "grefcoco"]  # whoever names it chooses its place


def test_who_knows_the_truth_scores_full(store: ShardStore) -> None:
    found = columns(store)
    told = scored(found)
    assert [told[name] for name in ("mIoU", "oIoU", "N_acc", "T_acc", "Pr@0.9")] == [1.0] * 5
    assert found["right_object"].tolist() == (found["kind"] != NONE).tolist()
    assert scores(*(columns(store, protocol=OURS)[name] for name in ("intersection", "union")))["mIoU"] < 0.95


def test_who_says_nothing_or_marks_everything(store: ShardStore) -> None:
    nothing = scored(columns(store, silence))
    share = nothing["no_target"] / len(queries_of(store, SPLIT, GREFCOCO))
    assert 0.05 < share < 0.2
    assert (nothing["mIoU"], nothing["oIoU"]) == (pytest.approx(share), 0.0)
    assert (nothing["N_acc"], nothing["T_acc"]) == (1.0, 0.0)
    marked = scored(columns(store, everything))
    assert (marked["N_acc"], marked["T_acc"]) == (0.0, 1.0)


@pytest.mark.parametrize("answer", [truth, silence])
def test_kinds_tell_how_many_are_meant(store: ShardStore, answer) -> None:
    found = columns(store, answer)
    for query, kind in zip(queries_of(store, SPLIT, GREFCOCO), found["kind"], strict=True):
        if query.ann_id >= 0:
            assert kind == expression_kind(query.text)
        else:
            assert kind == (SEVERAL if truth(store, query).any() else NONE)
    assert {SEVERAL, NONE, "attribute", "relation"} <= set(found["kind"])


def test_a_random_object_is_a_real_one(store: ShardStore) -> None:
    """By brute force over the annotated objects; no target is one, asked about or not."""
    found = columns(store)
    for i, query in enumerate(queries_of(store, SPLIT, GREFCOCO)):
        own = truth(store, query)
        real = [item["ann_id"] for item in store.row(query.image)["instances"] if item["ann_id"] >= 0]
        assert 3 <= len(real) <= 5
        masks = [store.mask(query.image, number) > 0 for number in real]
        ious = [(own & mask).sum() / (own | mask).sum() for mask in masks]
        assert found["random_iou"][i] == pytest.approx(np.mean(ious))
        assert found["random_intersection"][i] == pytest.approx(np.mean([(own & mask).sum() for mask in masks]))
        assert found["random_union"][i] == pytest.approx(np.mean([(own | mask).sum() for mask in masks]))


def test_answers_are_not_compared_with_what_other_expressions_mean(store: ShardStore) -> None:
    """Who marks every object of a set but one is right about the set, though another expression may mean just those."""
    asked = queries_of(store, SPLIT, GREFCOCO)
    several = [query for query in asked if query.ann_id < 0 and truth(store, query).any()]
    row = {query.image: store.row(query.image) for query in several}

    def nearly(store: ShardStore, query: Query) -> np.ndarray:
        parts = [store.mask(query.image, o["ann_id"]) > 0 for o in row[query.image]["instances"] if o["ann_id"] >= 0]
        inside = sorted((part for part in parts if (part & truth(store, query)).any()), key=np.sum)
        return np.any(inside[1:], axis=0)

    several = [query for query in several if len(nearly(store, query).ravel()) and nearly(store, query).sum() > 0]
    table = evaluate(Answering(nearly), store, several, GREFCOCO, split=SPLIT)
    for query, right in zip(several, table["right_object"].to_pylist(), strict=True):
        parts = [o["ann_id"] for o in row[query.image]["instances"] if o["ann_id"] >= 0]
        given = nearly(store, query)
        overlap = lambda mask, given=given: (mask & given).sum() / (mask | given).sum()  # noqa: E731
        best = max(overlap(store.mask(query.image, number) > 0) for number in parts)
        assert right == (overlap(truth(store, query)) > best)


def test_finished_masks_are_of_the_same_kinds(store: ShardStore) -> None:
    given = {(q.ref_id, q.sent_id): Finished(None) for q in queries_of(store, SPLIT, OURS)}
    found = tables(given, store, SPLIT, [OURS, GREFCOCO])
    for protocol in (OURS, GREFCOCO):
        assert found[protocol.name]["kind"].to_pylist() == columns(store, silence, protocol)["kind"].tolist()


def test_sentences_about_the_same_picture_can_be_exchanged(store: ShardStore) -> None:
    """The control asks each referent's image about another referent: also one that means nothing, or a part of the same."""
    asked = queries_of(store, SPLIT, GREFCOCO)
    control = swapped(asked, seed=0)
    assert len(control) == len(asked)
    own = {(query.ref_id, query.text) for query in asked}
    assert sum((query.ref_id, query.text) in own for query in control) < 0.02 * len(control)


class Asked:
    """Answers everything with nothing, and remembers what it was asked."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def set_image(self, image: np.ndarray) -> None:
        self.size = image.shape[:2]

    def predict(self, texts: Sequence[str]) -> list[Prediction]:
        self.texts += texts
        return [Prediction(np.zeros(self.size, bool), 0.0, np.zeros(self.size, np.float32)) for _ in texts]


def test_behaviour_asks_about_single_objects_where_it_needs_them(store: ShardStore, tmp_path: Path) -> None:
    single = {query.text for query in queries_of(store, SPLIT, OURS) if query.ann_id >= 0}
    strangers = Strangers(store, SPLIT)
    assert strangers.sentences
    assert {text for _, text in strangers.sentences} <= single
    assert {category for category, _ in strangers.sentences} <= {
        "circle",
        "square",
        "triangle",
        "star",
        "ring",
        "cross",
    }
    asked = Asked()
    found = behaviour(asked, store, store.folder.parent, SPLIT, images=30, seed=0)
    assert found["absent"]["cases"] > 5
    assert found["absent"]["empty_absent"] == 1.0
    assert found["mirror"]["cases"] > 20
    none = {query.text for query in queries_of(store, SPLIT, OURS) if query.ann_id < 0}
    assert none & set(asked.texts)  # mirrored they should mean nothing again
