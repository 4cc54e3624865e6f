"""Files of predictions: what an evaluation writes gives its own figures again, whoever's file is read with distrust."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from tiny_world import DATASET, Tiny

from ris_core.data import masks
from ris_core.data.dataset import ShardStore
from ris_core.errors import DataError
from ris_core.evaluation import finished, matching
from ris_core.evaluation.answers import Answerer, Answers
from ris_core.evaluation.evaluator import COUNTS, TABLE_SCHEMA, Job, evaluate, evaluate_all
from ris_core.evaluation.metrics import PROTOCOLS, Protocol
from ris_core.evaluation.predictions import entry_of, read_predictions, write_predictions
from ris_core.evaluation.queries import Query, queries_of, swapped

SPLIT = "val"
Plain = dict[str, Any]


@pytest.fixture(scope="module")
def store(tiny: Tiny) -> ShardStore:
    return tiny.store()


class Noisy(Answerer):
    """Answers each text about an image with the same boxes at the protocol's resolution; the last image has none."""

    def __init__(self, store: ShardStore):
        self.without = int(store.images_of(SPLIT)[-1])

    def __call__(self, store: ShardStore, queries: Sequence[Query], protocol: Protocol) -> dict[int, Answers]:
        return {image: self.of_image(store, image, queries, protocol) for image in {q.image: 0 for q in queries}}

    def of_image(self, store: ShardStore, image: int, queries: Sequence[Query], protocol: Protocol) -> Answers:
        row, side = store.row(image), protocol.resolution
        height, width = (row["height"], row["width"]) if isinstance(side, str) else (side, side)
        texts = [query.text for query in queries if query.image == image]
        found = torch.zeros(len(texts), height, width, dtype=torch.bool)
        for mask, text in zip(found, texts, strict=True):
            draw = random.Random(f"{image} {text}")
            if image != self.without and draw.random() > 0.1:  # some are empty
                top, left = draw.randrange(height // 2), draw.randrange(width // 2)
                mask[top : top + height // 2, left : left + width // 2] = True
        scores = torch.tensor([random.Random(text).random() for text in texts])
        return Answers(found, scores, found=image != self.without)


def entries_of(table: pa.Table, counts: list[str], store: ShardStore, protocol: Protocol) -> list[Plain]:
    places = store.places()
    made = []
    for row, text in zip(table.to_pylist(), counts, strict=True):
        image = store.row(places[row["image_id"]])
        side = protocol.resolution
        size = (image["height"], image["width"]) if isinstance(side, str) else (side, side)
        made.append(entry_of(row, 0, size, text))
    return made


@pytest.mark.parametrize("name", PROTOCOLS)
def test_what_was_written_under_a_protocol_gives_its_figures_again(
    name: str, store: ShardStore, tmp_path: Path
) -> None:
    protocol = PROTOCOLS[name]
    job = Job(name, protocol, SPLIT, queries_of(store, SPLIT, protocol))
    written = evaluate_all(Noisy(store), store, [job], expressions_per_batch=9, with_counts=True)[name]
    assert len(set(written["found"].to_pylist())) == 2
    entries = entries_of(written, written[COUNTS].to_pylist(), store, protocol)
    random.Random(0).shuffle(entries)
    write_predictions(tmp_path / "some.json", {"dataset": DATASET, "split": SPLIT}, protocol, entries)
    given = matching.read(tmp_path / "some.json", store, DATASET, SPLIT)
    assert (given.missing, given.elsewhere) == (0, {})
    again = finished.tables(given.given, store, SPLIT, [protocol], given.header.side)[name]
    assert again.schema == TABLE_SCHEMA
    for column in TABLE_SCHEMA.names:
        if column == "score":
            assert again[column].to_pylist() == pytest.approx(written[column].to_pylist(), abs=1e-5)
        else:
            assert again[column].equals(written[column]), column


def test_protocols_are_scored_at_once_as_one_by_one(store: ShardStore) -> None:
    given = perfect(store)
    protocols = [PROTOCOLS[name] for name in ("cris_val", "lavt", "ours")]
    together = finished.tables(given, store, SPLIT, protocols)
    assert list(together) == ["cris_val", "lavt", "ours"]
    for protocol in protocols:
        alone = evaluate(
            finished.FinishedAnswers(given), store, queries_of(store, SPLIT, protocol), protocol, split=SPLIT
        )
        assert together[protocol.name].equals(alone)
    assert together["ours"]["intersection"].equals(together["ours"]["union"])


def test_the_control_within_an_image_needs_no_model(store: ShardStore) -> None:
    """A sentence about another object was asked, too: its mask is what the model would answer again."""
    protocol = PROTOCOLS["ours"]
    queries = queries_of(store, SPLIT, protocol)
    kept = evaluate_all(Noisy(store), store, [Job("", protocol, SPLIT, queries)], with_counts=True)[""]
    counts = kept[COUNTS].to_pylist()
    given = {(q.ref_id, q.sent_id): finished.Finished(c) for q, c in zip(queries, counts, strict=True)}
    expected = evaluate(Noisy(store), store, swapped(queries, 3), protocol, split=SPLIT)
    found = finished.swapped_table(given, store, SPLIT, protocol, seed=3)
    for column in ("sent_id", "text", "intersection", "union", "area"):
        assert found[column].equals(expected[column]), column
    assert found.num_rows > 0


def expressions(store: ShardStore, split: str = SPLIT) -> list[Plain]:
    """All expressions of a split: their image's row, referent, sentence, its place, and the true mask."""
    found = []
    for image in store.images_of(split):
        row = store.row(int(image))
        for ref in row["refs"]:
            for index, sentence in enumerate(ref["sentences"]):
                mask = store.mask(int(image), ref["ann_id"])
                found.append({"row": row, "ref": ref, "index": index, "sentence": sentence, "mask": mask})
    return found


def perfect(store: ShardStore) -> dict[finished.Key, finished.Finished]:
    return {
        (each["ref"]["ref_id"], each["sentence"]["sent_id"]): finished.Finished(masks.encode(each["mask"]))
        for each in expressions(store)
    }


def runs(mask: np.ndarray) -> list[int]:
    """Uncompressed run lengths, background first."""
    flat = mask.T.ravel()
    ends = np.flatnonzero(np.diff(flat)) + 1
    lengths = np.diff([0, *ends.tolist(), flat.size]).tolist()
    return [0, *lengths] if flat[0] else lengths


def rle(each: Plain) -> Plain:
    return {"size": list(each["mask"].shape), "counts": masks.encode(each["mask"])}


SEGMENTATIONS: dict[str, Callable[[Plain], Any]] = {
    "compressed": rle,
    "uncompressed": lambda each: {"size": list(each["mask"].shape), "counts": runs(each["mask"])},
    "parts": lambda each: [
        {**rle(each), "size": [float(side) for side in each["mask"].shape]},
        {"size": list(each["mask"].shape), "counts": [each["mask"].size]},
    ],
}
KEYS: dict[str, Callable[[Plain], Plain]] = {
    "sent_id": lambda each: {"sent_id": each["sentence"]["sent_id"]},
    "all": lambda each: {
        "sent_id": each["sentence"]["sent_id"],
        "ref_id": each["ref"]["ref_id"],
        "image_id": each["row"]["image_id"],
        "sentence_index": each["index"],
        "text": each["sentence"]["raw"],
        "category_id": 1,
        "bbox": "ignored",
    },
    "index": lambda each: {"ref_id": each["ref"]["ref_id"], "sentence_index": each["index"]},
    "text": lambda each: {"ref_id": each["ref"]["ref_id"], "text": f" {each['sentence']['sent'].upper()} "},
}


def save(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("form", SEGMENTATIONS)
@pytest.mark.parametrize("keys", KEYS)
def test_entries_are_read_in_every_form_and_order(form: str, keys: str, store: ShardStore, tmp_path: Path) -> None:
    entries = [{**KEYS[keys](each), "segmentation": SEGMENTATIONS[form](each)} for each in expressions(store)]
    random.Random(1).shuffle(entries)
    wrapped = {"annotations": entries, "info": {"year": 2026}} if keys == "text" else entries
    given = matching.read(save(tmp_path / "some.json", wrapped), store, DATASET, SPLIT)
    assert given.given == perfect(store)


def test_polygons_are_read_and_an_empty_list_is_an_empty_mask(store: ShardStore, tmp_path: Path) -> None:
    first, second, *others = expressions(store)
    entries = [{**KEYS["all"](each), "segmentation": None, "score": 0.25} for each in others]
    entries.append({**KEYS["all"](first), "segmentation": [[2, 3, 12, 3, 12, 9, 2, 9]]})
    entries.append({**KEYS["all"](second), "segmentation": []})
    given = matching.read(save(tmp_path / "some.json", entries), store, DATASET, SPLIT).given
    height, width = first["mask"].shape
    box = np.zeros((height, width), np.uint8)
    box[3:9, 2:12] = 1
    found = [given[each["ref"]["ref_id"], each["sentence"]["sent_id"]] for each in (first, second, others[0])]
    assert found[0].counts is not None
    assert np.array_equal(masks.decode(found[0].counts, height, width), box)
    assert found[1].counts == masks.encode(np.zeros(second["mask"].shape, np.uint8))
    assert found[2] == finished.Finished(None, 0.25)


def test_equal_sentences_of_a_referent_are_answered_in_turn_or_by_one(store: ShardStore, tmp_path: Path) -> None:
    """As in RefCOCO, where a referent has the same sentence twice more often than not."""

    class Doubled(ShardStore):
        def _row(self, index: int) -> Plain:
            row = super()._row(index)
            for ref in row["refs"]:
                ref["sentences"] = [{**ref["sentences"][0], "sent_id": 10 * ref["ref_id"] + i} for i in range(3)]
            return row

    doubled = Doubled(store.folder)
    asked = expressions(doubled)
    blank = {"size": list(asked[0]["mask"].shape), "counts": [asked[0]["mask"].size]}
    by_text = [{**KEYS["text"](each), "segmentation": rle(each)} for each in asked[::3]]
    by_text.insert(0, {**by_text[0], "segmentation": blank})
    given = matching.read(save(tmp_path / "some.json", by_text), doubled, DATASET, SPLIT).given
    truth = perfect(doubled)
    assert len(given) == len(truth)
    differing = [key for key in truth if given[key] != truth[key]]
    assert differing == [(asked[0]["ref"]["ref_id"], asked[0]["sentence"]["sent_id"])]
    crowd = save(tmp_path / "crowd.json", [*by_text, by_text[1], by_text[1]])
    with pytest.raises(DataError, match=f"entry {len(by_text) + 1} .* is about the same expression as entry"):
        matching.read(crowd, doubled, DATASET, SPLIT)


def test_all_that_is_wrong_is_told_at_once(store: ShardStore, tmp_path: Path) -> None:
    asked = expressions(store)
    height, width = asked[0]["mask"].shape
    good = [{**KEYS["all"](each), "segmentation": rle(each)} for each in asked]
    ids = [each["sentence"]["sent_id"] for each in asked]
    entries = [
        *good[8:],
        {**good[0], "segmentation": {"size": [width + 1, height], "counts": "x"}},
        {**good[1], "segmentation": {"size": [height, width], "counts": "~~~"}},
        {**good[2], "segmentation": {"size": [height, width], "counts": [1, 2]}},
        {**good[3], "text": "something else", "ref_id": 10**6},
        {"sent_id": 10**9, "segmentation": []},
        good[9],
        {"ref_id": asked[5]["ref"]["ref_id"], "sentence_index": 77, "segmentation": []},
        {"sent_id": "7", "segmentation": []},
        {"segmentation": []},
        {**good[6], "score": float("nan")},
        {"sent_id": ids[7]},
        17,
    ]
    path = save(tmp_path / "some.json", {"info": {"dataset": "refcoco_unc", "split": "testA"}, "annotations": entries})
    with pytest.raises(DataError) as told:
        matching.read(path, store, DATASET, SPLIT)
    message = str(told.value)
    last = len(good) - 8
    for part in (
        "info: its dataset is 'refcoco_unc', and it is scored on shapes",
        "info: its split is 'testA', and it is scored on val",
        f"entry {last} (sent_id {ids[0]}): part 1 of 1: run lengths are of size [{width + 1}, {height}]",
        f"entry {last + 1} (sent_id {ids[1]}): part 1 of 1: run-length text does not describe {height}x{width} pixels",
        f"entry {last + 2} (sent_id {ids[2]}): part 1 of 1: uncompressed run lengths do not sum to {height}x{width}",
        f"entry {last + 3} (sent_id {ids[3]}): its ref_id is 1000000, not ",
        "its text is 'something else', not ",
        f"entry {last + 4} (sent_id 1000000000): shapes has no such expression, in no split",
        f"entry {last + 5} (sent_id {ids[9]}) is about the same expression as entry 1 (sent_id {ids[9]})",
        "'sentence_index' is 77, and its ref has ",
        "'sent_id' must be int, found str '7'",
        "no 'sent_id' and no 'ref_id'",
        "'score' is out of range: nan",
        "no 'segmentation'",
        "and 1 more that cannot be read",
        f"5 of {len(asked)} expressions of val are missing: sent_id {', '.join(map(str, ids[3:7]))} and 1 more",
        "See docs/comparing.md",
    ):
        assert part in message, (part, message)
    assert message.startswith(f"{path} cannot be scored on shapes val (")


def test_what_is_missing_may_count_as_nothing(store: ShardStore, tmp_path: Path) -> None:
    asked = expressions(store)
    others = expressions(store, "testA")
    entries = [{**KEYS["sent_id"](each), "segmentation": rle(each)} for each in [*asked[3:], *others]]
    path = save(tmp_path / "some.json", entries)
    with pytest.raises(DataError, match=rf"3 of {len(asked)} expressions of val are missing") as told:
        matching.read(path, store, DATASET, SPLIT)
    assert "--missing zero" in str(told.value)
    given = matching.read(path, store, DATASET, SPLIT, missing_as_empty=True)
    assert (given.missing, given.elsewhere) == (3, {"testA": len(others)})
    truth = perfect(store)
    lost = [(each["ref"]["ref_id"], each["sentence"]["sent_id"]) for each in asked[:3]]
    for key, one in given.given.items():
        assert one == (
            finished.Finished(masks.encode(np.zeros(asked[0]["mask"].shape, np.uint8)), 0.0)
            if key in lost
            else truth[key]
        )
    table = finished.tables(given.given, store, SPLIT, [PROTOCOLS["global_local"]])["global_local"]
    assert table["found"].to_pylist() == [True] * len(asked)  # an empty answer is one


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"<html>gone</html>", "is an HTML or XML page"),
        (b"PK\x03\x04....", "is a zip archive"),
        (b"[{", "is damaged, cut short or no JSON at all"),
        (b"[" * 100_000, "is damaged, cut short or no JSON at all"),
        (b"7", "is neither a list of predictions nor has it one as 'annotations'"),
        (b'{"predictions": []}', "its keys are 'predictions'"),
        (b'{"info": 3, "annotations": []}', "info: expected a dict, found 3"),
        (b'{"info": {"split": 3}, "annotations": []}', "info: 'split' must be str, found int 3"),
        (b'{"info": {"protocol": "mine"}, "annotations": []}', "there is no protocol 'mine'; there are ours, cris"),
        (b'{"info": {"protocol": [1]}, "annotations": []}', "info.protocol: expected a name or a dict"),
        (b'{"info": {"protocol": {"resolution": 65000}}, "annotations": []}', "'resolution' is 65000, and protocols"),
        (
            b'{"info": {"protocol": {"resolution": true}}, "annotations": []}',
            "'resolution' must be str or int, found bool",
        ),
        (b'{"info": {"protocol": {"threshold": "a"}}, "annotations": []}', "'threshold' must be int or float"),
        (b'[{"sent_id": 1, "segmentation": [], "score": 1e999}]', "'score' is out of range"),
        (b'[{"sent_id": 99999999999999999999, "segmentation": []}]', "'sent_id' is out of range"),
        (b'[{"sent_id": 1, "text": "\\ud800", "segmentation": []}]', "'text' is not valid Unicode"),
        (b'[{"sent_id": ' + b"9" * 5000 + b', "segmentation": []}]', "is damaged, cut short or no JSON at all"),
    ],
)
def test_files_that_are_something_else(content: bytes, message: str, store: ShardStore, tmp_path: Path) -> None:
    path = tmp_path / "some.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message.replace("[", r"\[")) as told:
        matching.read(path, store, DATASET, SPLIT)
    assert len(str(told.value)) < 2000


@pytest.mark.parametrize(
    "segmentation",
    [
        {"size": [80, 64], "counts": [5120]},
        {"size": [64, 80], "counts": "0" * 7},
        {"size": [64, 80], "counts": [5119, True]},
        {"size": [64, 80], "counts": [-1, 5121]},
        {"size": [64, 80]},
        {"size": "80", "counts": []},
        {"size": [10**9, 10**9], "counts": [10**18]},
        [[1, 2, 3, 4]],
        [[1e300, 2, 3, 4, 5, 6]],
        [[1, 2, 3, 4, 5, "6"]],
        [7],
        "some text",
        3.5,
        True,
    ],
)
def test_damaged_masks_are_told_and_nothing_else_happens(segmentation: Any, store: ShardStore, tmp_path: Path) -> None:
    first, *others = expressions(store)
    assert first["mask"].shape == (64, 80)
    entries = [{**KEYS["sent_id"](each), "segmentation": rle(each)} for each in others]
    path = save(tmp_path / "some.json", [{**KEYS["sent_id"](first), "segmentation": segmentation}, *entries])
    with pytest.raises(DataError) as told:
        matching.read(path, store, DATASET, SPLIT)
    lines = str(told.value).splitlines()
    assert len(lines) == 3
    assert lines[1].startswith(f"  - entry 0 (sent_id {first['sentence']['sent_id']}): ")


def test_mutated_files_are_read_or_refused(store: ShardStore, tmp_path: Path) -> None:
    entries = [{**KEYS["all"](each), "segmentation": rle(each)} for each in expressions(store)]
    whole = json.dumps({"info": {"split": SPLIT, "protocol": {"threshold": 0.5}}, "annotations": entries}).encode()
    draw, told = random.Random(5), []
    for _ in range(200):
        content = bytearray(whole)
        for _ in range(draw.randrange(1, 4)):
            content[draw.randrange(len(content))] = draw.choice(b'0123456789-."[]{}:,eE~ nt\\')
        (tmp_path / "some.json").write_bytes(content)
        try:
            matching.read(tmp_path / "some.json", store, DATASET, SPLIT)
        except DataError as error:
            told.append(len(str(error)))
    assert 100 < len(told) < 200
    assert max(told) < 5000


def test_a_file_without_its_end_is_never_there(store: ShardStore, tmp_path: Path) -> None:
    def breaking() -> Any:
        yield {"sent_id": 1}
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_predictions(tmp_path / "some.json", {}, PROTOCOLS["ours"], breaking())
    assert list(tmp_path.iterdir()) == []
    write_predictions(tmp_path / "none.json", {}, PROTOCOLS["cris_val"], [])
    header, entries, problems = read_predictions(tmp_path / "none.json")
    assert (header.protocol["name"], header.only_first, header.side, entries, problems) == (
        "cris_val",
        True,
        None,
        [],
        [],
    )
