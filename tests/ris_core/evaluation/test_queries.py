"""What is asked: every expression of a split once, and controls in which each gets a sentence that is not its own."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from tiny_world import Tiny

from ris_core.data.dataset import ShardStore
from ris_core.errors import DataError
from ris_core.evaluation.metrics import PROTOCOLS
from ris_core.evaluation.queries import Query, by_images, queries_of, shuffled, swapped

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


@pytest.mark.parametrize("count", [1, 2, 4, 100])
def test_groups_hold_whole_images_and_no_more_than_wanted(count: int, store: ShardStore) -> None:
    queries = queries_of(store, "val", OURS)
    groups = list(by_images(queries, count))
    assert [query for group in groups for query in group] == queries
    images = [list(dict.fromkeys(query.image for query in group)) for group in groups]
    assert all(len(some) == count for some in images[:-1])
    assert 1 <= len(images[-1]) <= count
    assert len({image for some in images for image in some}) == sum(map(len, images))
    assert list(by_images([], count)) == []


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
