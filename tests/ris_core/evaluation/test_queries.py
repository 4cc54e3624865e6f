"""What is asked: every expression of a split once, and controls in which each gets a sentence that is not its own."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from tiny_world import Tiny

from ris_core.data.dataset import ShardStore
from ris_core.errors import DataError
from ris_core.evaluation.metrics import PROTOCOLS
from ris_core.evaluation.queries import Query, batched, of_images, queries_of, shuffled, swapped

OURS = PROTOCOLS["ours"]


@pytest.fixture
def store(tiny: Tiny) -> ShardStore:
    return tiny.store()


def test_every_expression_of_a_split_is_asked_once_in_the_protocols_words(store: ShardStore) -> None:
    for protocol in (OURS, PROTOCOLS["lavt"], PROTOCOLS["cris_val"]):
        for split in ("val", "testA"):
            expected = [
                Query(image, ref["ref_id"], ref["ann_id"], sentence["sent_id"], sentence[protocol.text])
                for image in range(len(store))
                for ref in store.row(image)["refs"]
                for sentence in ref["sentences"][: 1 if protocol.sentences == "first" else None]
                if ref["split"] == split
            ]
            assert queries_of(store, split, protocol) == expected != []


def test_some_images_only(store: ShardStore) -> None:
    images = store.images_of("val")[[4, 1]].tolist()
    assert {query.image for query in queries_of(store, "val", OURS, images)} == set(images)
    assert queries_of(store, "val", OURS, []) == []
    assert {query.image for query in queries_of(store, "testA", OURS)} == set(store.images_of("testA").tolist())
    with pytest.raises(DataError, match="shapes has no split 'test'; it has testA, testB, train, val"):
        queries_of(store, "test", OURS)


@pytest.mark.parametrize("limit", [1, 7, 20, 1000])
def test_batches_hold_whole_images_and_no_more_expressions_than_wanted(limit: int, store: ShardStore) -> None:
    counts = {image: len(asked) for image, asked in of_images(queries_of(store, "val", OURS)).items()}
    groups = list(batched(counts, limit))
    assert [image for group in groups for image in group] == list(counts)
    together = [sum(counts[image] for image in group) for group in groups]
    assert all(count <= limit or len(group) == 1 for count, group in zip(together, groups, strict=True))
    follows = zip(together, groups[1:], strict=False)
    assert all(count + counts[group[0]] > limit for count, group in follows), "none ends before it is full"
    assert list(batched({}, limit)) == []


def test_shuffling_gives_no_referent_its_own_sentence(tiny: Tiny) -> None:
    whole = tiny.store()
    for split in ("val", "testA"):
        queries = queries_of(whole, split, OURS)
        own: dict[int, set[str]] = {}
        origin = {query.sent_id: query.ref_id for query in queries}
        for query in queries:
            own.setdefault(query.ref_id, set()).add(query.text)
        marked = [replace(query, text=str(query.sent_id)) for query in queries]  # to see whose sentence it is
        for seed in range(20):
            mixed = shuffled(marked, seed)
            assert [replace(query, text="") for query in mixed] == [replace(query, text="") for query in marked]
            assert Counter(query.text for query in mixed) == Counter(query.text for query in marked)
            assert all(origin[int(query.text)] != query.ref_id for query in mixed)


def query(ref: int, sentence: int) -> Query:
    return Query(0, ref, ref, sentence, f"{ref}:{sentence}")


def test_shuffling_works_up_to_half_of_the_sentences_of_one_referent() -> None:
    even = [query(0, 0), query(0, 1), query(0, 2), query(1, 3), query(1, 4), query(2, 5)]
    for seed in range(50):
        mixed = shuffled(even, seed)
        assert all(not one.text.startswith(f"{one.ref_id}:") for one in mixed)
    with pytest.raises(DataError, match="3 sentences cannot be shuffled among referents: 2 of them are of one"):
        shuffled([query(0, 0), query(0, 1), query(1, 2)], seed=0)
    assert shuffled([], seed=0) == []


def test_shuffling_depends_on_the_seed_alone(store: ShardStore) -> None:
    queries = queries_of(store, "val", OURS)
    assert shuffled(queries, 1) == shuffled(queries, 1)
    assert shuffled(queries, 1) != shuffled(queries, 2)


def test_swapped_sentences_are_of_another_object_of_the_same_image(store: ShardStore) -> None:
    queries = queries_of(store, "val", OURS)
    mixed = swapped(queries, 0)
    own = {(query.image, query.ref_id, query.sent_id): query for query in queries}
    said = {(query.image, query.text, query.ref_id) for query in queries}
    assert len(mixed) > 0.9 * len(queries)
    for query in mixed:
        before = own[query.image, query.ref_id, query.sent_id]
        assert replace(query, text=before.text) == before
        assert any(image == query.image and text == query.text and ref != query.ref_id for image, text, ref in said)
    assert mixed == swapped(queries, 0) != swapped(queries, 1)
    alone = [query for query in queries if query.ref_id == queries[0].ref_id]
    assert swapped(alone, 0) == []
