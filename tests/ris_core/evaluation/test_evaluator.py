"""The evaluator measures what it says: a model that knows the truth scores full, one that errs scores nothing."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pytest
import torch
from tiny_world import DATASET, Tiny
from torch import nn

from ris_core.data import masks
from ris_core.data.dataset import ShardStore
from ris_core.data.letterbox import letterbox_mask, unletterbox
from ris_core.data.records import ImageRecord
from ris_core.data.shards import ShardOptions, write_manifest, write_shard
from ris_core.data.text import END_ID, encode, expression_kind
from ris_core.errors import ConfigError
from ris_core.evaluation.answers import MapAnswers
from ris_core.evaluation.evaluator import COUNTS, TABLE_SCHEMA, Job, evaluate, evaluate_all
from ris_core.evaluation.metrics import PROTOCOLS, Protocol, scores
from ris_core.evaluation.queries import queries_of, shuffled, swapped
from ris_core.models.clip import load_saved_clip, normalise
from ris_core.models.contract import MapSystem, Role, SystemConfig
from ris_core.models.losses import LossParams
from ris_core.models.registry import build_model

OURS = PROTOCOLS["ours"]
FINE = 320  # four times the pictures' own size, so that a mask survives the way there and back
WORD_LEN = 22
Features = TypeVar("Features")


def write_store(folder: Path, records: list[ImageRecord], raw: Path, size: int) -> ShardStore:
    folder.mkdir()
    options = ShardOptions(size)
    write_manifest(folder, DATASET, options, [write_shard(folder / "part-0.arrow", records, raw, options)])
    return ShardStore(folder)


@pytest.fixture(scope="module")
def store(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> ShardStore:
    """The validation images, letterboxed finely; an object that nobody refers to is declared a crowd."""
    records = [record for record in tiny.records() if record.refs[0].split == "val"]
    busy = max(records, key=lambda record: len(record.instances) - len(record.refs))
    named = {ref.ann_id for ref in busy.refs}
    lonely = next(item for item in busy.instances if item.ann_id not in named)
    crowded = tuple(replace(item, iscrowd=int(item is lonely)) for item in busy.instances)
    records[records.index(busy)] = replace(busy, instances=crowded)
    return write_store(tmp_path_factory.mktemp("fine") / "shards", records, tiny.raw, FINE)


class Untrained(MapSystem[Features, torch.Tensor]):
    """What systems that are only asked have in common."""

    stride = 4

    def __init__(self) -> None:
        super().__init__(None, SystemConfig())
        self.anchor = nn.Parameter(torch.zeros(1))

    def forward(
        self, images: torch.Tensor, tokens: torch.Tensor, image_index: torch.Tensor | None = None
    ) -> torch.Tensor:
        raise NotImplementedError

    def loss(self, output: torch.Tensor, target: torch.Tensor, params: LossParams) -> torch.Tensor:
        raise NotImplementedError

    def role(self, name: str) -> Role:
        return "head"


class Oracle(Untrained[list[int]]):
    """Knows every image by its pixels and every expression by its tokens; marks the object that `choose` says."""

    def __init__(self, store: ShardStore, wrong: bool = False):
        super().__init__()
        self.store, self.wrong = store, wrong
        self.images = {self.key(store.pixels(i)): i for i in range(len(store))}
        self.encoded: list[int] = []

    @staticmethod
    def key(pixels: np.ndarray) -> bytes:
        whole = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None]
        return normalise(whole).contiguous().numpy().tobytes()

    def encode_image(self, images: torch.Tensor) -> list[int]:
        found = [self.images[image[None].contiguous().numpy().tobytes()] for image in images]
        self.encoded.append(len(found))
        return found

    def segment(
        self, features: list[int], tokens: torch.Tensor, image_index: torch.Tensor | None = None
    ) -> torch.Tensor:
        assert image_index is not None
        maps = [self.map(features[i], row.tolist()) for i, row in zip(image_index.tolist(), tokens, strict=True)]
        return torch.from_numpy(np.stack(maps))[:, None]

    def map(self, image: int, tokens: list[int]) -> np.ndarray:
        said = [token for token in tokens if token]
        row = self.store.row(image)
        right = {ref["ann_id"] for ref in row["refs"] for s in ref["sentences"] if encode(s["sent"]) == said}
        assert len(right) == 1
        marked = next(o["ann_id"] for o in row["instances"] if (o["ann_id"] in right) != self.wrong)
        soft = letterbox_mask(self.store.mask(image, marked), FINE) / 255
        return np.clip(np.log(soft + 1e-4) - np.log(1 - soft + 1e-4), -9, 9).astype(np.float32)


class Constant(Untrained[int]):
    """The same probability everywhere; remembers what it was given."""

    def __init__(self, probability: float = 0.4):
        super().__init__()
        self.logit = math.log(probability / (1 - probability))
        self.tokens: list[list[int]] = []
        self.shapes: list[tuple[int, ...]] = []

    def encode_image(self, images: torch.Tensor) -> int:
        return len(images)

    def segment(self, features: int, tokens: torch.Tensor, image_index: torch.Tensor | None = None) -> torch.Tensor:
        self.tokens += tokens.tolist()
        self.shapes.append(tuple(tokens.shape))
        return torch.full((len(tokens), 1, 80, 80), self.logit)


def table_of(model: MapSystem, store: ShardStore, protocol: Protocol = OURS, **options: Any) -> pa.Table:
    queries = queries_of(store, "val", protocol)
    return evaluate(MapAnswers(model, WORD_LEN), store, queries, protocol, split="val", **options)


def totals(table: pa.Table) -> dict[str, float]:
    return scores(table["intersection"].to_numpy(), table["union"].to_numpy())


def test_one_who_knows_the_truth_scores_full(store: ShardStore) -> None:
    table = table_of(Oracle(store), store)
    found = totals(table)
    assert found["mIoU"] > 0.98
    assert found["oIoU"] > 0.98
    assert found["Pr@0.9"] == 1.0
    assert table["right_object"].to_pylist() == [True] * len(table)
    assert min(table["score"].to_pylist()) > 0.85


def test_masks_are_compared_at_the_original_size(store: ShardStore) -> None:
    table = table_of(Oracle(store), store)
    areas: dict[int, int] = {}
    for image in range(len(store)):
        row = store.row(image)
        areas |= {ref["ref_id"]: int(store.mask(image, ref["ann_id"]).sum()) for ref in row["refs"]}
    for row in table.to_pylist():
        truth = areas[row["ref_id"]]
        assert row["union"] == truth + row["area"] - row["intersection"]
        assert abs(row["area"] - truth) <= 0.05 * truth


def test_one_who_marks_another_object_scores_nothing(store: ShardStore) -> None:
    table = table_of(Oracle(store, wrong=True), store)
    assert totals(table)["mIoU"] < 0.01
    assert not any(table["right_object"].to_pylist())


def test_each_image_is_encoded_once_whatever_is_asked_about_it(store: ShardStore) -> None:
    images = len(store.images_of("val"))
    for per_batch, least in ((1, images), (20, 2), (1000, 1)):
        oracle = Oracle(store)
        table = table_of(oracle, store, expressions_per_batch=per_batch)
        assert len(table) > 3 * images
        assert sum(oracle.encoded) == images
        assert len(oracle.encoded) >= least


def test_batches_change_nothing(store: ShardStore) -> None:
    one = table_of(Oracle(store), store, expressions_per_batch=1)
    for per_batch in (9, 20, 1000):
        assert table_of(Oracle(store), store, expressions_per_batch=per_batch).equals(one)


class Counting(Oracle):
    """Counts the expressions of each pass."""

    def __init__(self, store: ShardStore) -> None:
        super().__init__(store)
        self.asked: list[int] = []

    def segment(
        self, features: list[int], tokens: torch.Tensor, image_index: torch.Tensor | None = None
    ) -> torch.Tensor:
        self.asked.append(len(tokens))
        return super().segment(features, tokens, image_index)


def test_jobs_on_the_same_images_share_what_is_computed_of_them(store: ShardStore) -> None:
    queries = queries_of(store, "val", OURS)
    fixed = replace(PROTOCOLS["lavt"], text="sent")  # an oracle knows no other
    jobs = [
        Job("ours", OURS, "val", queries),
        *(Job(each.name, each, "val", queries_of(store, "val", each)) for each in (PROTOCOLS["cris_val"], fixed)),
        Job("swapped", OURS, "val", swapped(queries, 0)),
    ]
    model = Counting(store)
    tables = evaluate_all(MapAnswers(model, WORD_LEN), store, jobs, expressions_per_batch=20)
    assert list(tables) == [job.name for job in jobs]
    assert sum(model.encoded) == len(store.images_of("val"))
    different = {(query.image, tuple(encode(query.text))) for job in jobs for query in job.queries}
    assert sum(model.asked) == len(different) < sum(len(job.queries) for job in jobs)
    assert max(model.asked) <= 20
    for job in jobs:
        alone = evaluate(MapAnswers(Oracle(store), WORD_LEN), store, job.queries, job.protocol, split="val")
        assert tables[job.name].equals(alone), job.name


def test_an_image_with_more_expressions_than_a_batch_takes_several(store: ShardStore) -> None:
    model = Counting(store)
    table = evaluate(
        MapAnswers(model, WORD_LEN, at_once=3),
        store,
        queries_of(store, "val", OURS),
        OURS,
        split="val",
        expressions_per_batch=3,
    )
    assert max(model.asked) == 3
    assert table.equals(table_of(Oracle(store), store))


def test_masks_are_kept_where_they_are_wanted(store: ShardStore) -> None:
    queries = queries_of(store, "val", OURS)
    answer = MapAnswers(Oracle(store), WORD_LEN)
    table = evaluate_all(answer, store, [Job("", OURS, "val", queries)], with_counts=True)[""]
    assert table.drop_columns([COUNTS]).equals(table_of(Oracle(store), store))
    for query, counts in zip(queries, table[COUNTS].to_pylist(), strict=True):
        row = store.row(query.image)
        expected = answer(store, [query], OURS)[query.image].masks[0].numpy()
        assert np.array_equal(masks.decode(counts, row["height"], row["width"]), expected)


class Listening(Constant):
    """Remembers how precisely it is asked to multiply."""

    def __init__(self) -> None:
        super().__init__()
        self.precisions: list[torch.dtype] = []

    def encode_image(self, images: torch.Tensor) -> int:
        self.precisions.append((torch.ones(2, 2) @ torch.ones(2, 2)).dtype)
        return super().encode_image(images)

    def segment(self, features: int, tokens: torch.Tensor, image_index: torch.Tensor | None = None) -> torch.Tensor:
        self.precisions.append((torch.ones(2, 2) @ torch.ones(2, 2)).dtype)
        return super().segment(features, tokens, image_index)


def test_a_model_is_asked_in_the_precision_that_is_named(store: ShardStore) -> None:
    queries = queries_of(store, "val", OURS)[:1]
    for name, dtype in (("fp32", torch.float32), ("auto", torch.float32), ("bf16", torch.bfloat16)):
        model = Listening()
        evaluate(MapAnswers(model, WORD_LEN, precision=name), store, queries, OURS, split="val")
        assert model.precisions == [dtype, dtype], name
    with pytest.raises(ConfigError, match="precision fp16 needs a GPU"):
        MapAnswers(Listening(), WORD_LEN, precision="fp16")(store, queries, OURS)


def test_lower_precision_answers_nearly_the_same(tiny: Tiny) -> None:
    torch.manual_seed(0)
    model = build_model("cris", tiny.params().of("cris").model, load_saved_clip(tiny.clip))
    assert isinstance(model, MapSystem)
    store, queries = tiny.store(), queries_of(tiny.store(), "val", OURS)
    fine, rough = (
        MapAnswers(model, WORD_LEN, precision=name)(store, queries, OURS)[queries[0].image] for name in ("fp32", "bf16")
    )
    assert fine.masks.any()
    assert rough.scores.dtype == torch.float32
    assert (fine.masks == rough.masks).float().mean() > 0.9


def test_a_real_model_answers_alike_in_any_batch(tiny: Tiny) -> None:
    torch.manual_seed(0)
    model = build_model("cris", tiny.params().of("cris").model, load_saved_clip(tiny.clip))
    assert isinstance(model, MapSystem)
    tables = [table_of(model, tiny.store(), expressions_per_batch=count).to_pylist() for count in (1, 60)]
    assert not model.training
    for one, other in zip(*tables, strict=True):
        assert all(one[name] == other[name] for name in ("image_id", "sent_id", "text", "random_union"))
        assert one["score"] == pytest.approx(other["score"], abs=2e-3)
        assert abs(one["area"] - other["area"]) <= 8, "only pixels at the threshold may differ"


class Coarse(Oracle):
    """Marks the right object in its masks and everything in its map."""

    locates = True

    def locate(
        self, features: list[int], tokens: torch.Tensor, image_index: torch.Tensor | None = None
    ) -> torch.Tensor:
        return torch.full((len(tokens), 1, 4, 4), 5.0)


def test_a_coarse_map_is_scored_like_a_mask(store: ShardStore) -> None:
    model, queries = Coarse(store), queries_of(store, "val", OURS)
    found = evaluate(MapAnswers(model, WORD_LEN, "locate"), store, queries, OURS, split="val")
    assert totals(table_of(model, store))["mIoU"] > 0.98
    sizes = {store.row(i)["image_id"]: store.row(i)["height"] * store.row(i)["width"] for i in range(len(store))}
    for row in found.to_pylist():
        assert row["area"] > 0.9 * sizes[row["image_id"]]
    assert found["sent_id"].to_pylist() == [query.sent_id for query in queries]


def test_every_expression_counts_exactly_once(store: ShardStore) -> None:
    expected = [
        (row["image_id"], ref["ref_id"], s["sent_id"], s["sent"])
        for row in map(store.row, range(len(store)))
        for ref in row["refs"]
        for s in ref["sentences"]
    ]
    table = table_of(Oracle(store), store, expressions_per_batch=20)
    assert table.schema.equals(TABLE_SCHEMA)
    found = zip(*(table[name].to_pylist() for name in ("image_id", "ref_id", "sent_id", "text")), strict=True)
    assert list(found) == expected
    assert set(table["split"].to_pylist()) == {"val"}
    assert table["kind"].to_pylist() == [expression_kind(text) for *_, text in expected]


def test_the_first_sentence_alone(store: ShardStore) -> None:
    table = table_of(Constant(), store, PROTOCOLS["cris_val"])
    refs = [ref for i in range(len(store)) for ref in store.row(i)["refs"]]
    assert table["sent_id"].to_pylist() == [ref["sentences"][0]["sent_id"] for ref in refs]


def test_no_queries_give_an_empty_table(store: ShardStore) -> None:
    empty = evaluate(MapAnswers(Constant(), WORD_LEN), store, [], OURS, split="val")
    assert empty.num_rows == 0
    assert empty.schema.equals(TABLE_SCHEMA)


def test_the_threshold_is_the_protocols(store: ShardStore) -> None:
    sizes = {store.row(i)["image_id"]: store.row(i)["height"] * store.row(i)["width"] for i in range(len(store))}
    for name, share in (("cris", 1.0), ("ours", 0.0)):
        for row in table_of(Constant(0.4), store, PROTOCOLS[name]).to_pylist():
            assert row["area"] / sizes[row["image_id"]] == pytest.approx(share, abs=0.06)
            assert row["score"] == pytest.approx(0.4 * share, abs=0.01)
            if not share:
                assert (row["intersection"], row["right_object"]) == (0, False)


def test_small_answers_say_that_nothing_is_there(store: ShardStore) -> None:
    """Under `grefcoco`: fewer than 50 pixels, beside the same answers under a protocol that takes them as they are."""
    table = table_of(Oracle(store), store)
    areas = np.sort(table["area"].to_numpy())
    least = int(areas[len(areas) // 2])
    cut = table_of(Oracle(store), store, replace(OURS, least_area=least))
    small = table["area"].to_numpy() < least
    assert 0 < small.sum() < len(small)
    assert (cut["area"].to_numpy()[small] == 0).all()
    assert (cut["intersection"].to_numpy()[small] == 0).all()
    shares = np.rint(cut["object_share"].to_numpy() * 1e9)
    assert np.array_equal(shares, np.rint(table["object_share"].to_numpy() * 1e9))
    for name in ("area", "intersection", "union", "score"):
        assert np.array_equal(cut[name].to_numpy()[~small], table[name].to_numpy()[~small])


def test_lavt_compares_at_480_with_nearest_ground_truth(store: ShardStore) -> None:
    protocol = PROTOCOLS["lavt"]
    queries = queries_of(store, "val", protocol)
    assert [query.text for query in queries] == [
        s["raw"] for i in range(len(store)) for ref in store.row(i)["refs"] for s in ref["sentences"]
    ]
    asked = [replace(q, text=own.text) for q, own in zip(queries, queries_of(store, "val", OURS), strict=True)]
    oracle = Oracle(store)
    table = evaluate(MapAnswers(oracle, WORD_LEN), store, asked, protocol, split="val")
    assert totals(table)["mIoU"] > 0.9
    for query, row in zip(asked, table.to_pylist(), strict=True):
        truth = store.mask(query.image, query.ann_id)
        height, width = truth.shape
        grid = np.arange(480)
        enlarged = truth[(grid * height // 480)[:, None], grid * width // 480] > 0
        logits = torch.from_numpy(oracle.map(query.image, encode(query.text)))[None]
        full = unletterbox(logits.sigmoid(), height, width, FINE, upsampling="grid")
        smooth = nn.functional.interpolate(full[None], (480, 480), mode="bilinear", align_corners=False)[0, 0]
        predicted = smooth.numpy() > 0.5
        assert row["area"] == predicted.sum()
        assert row["intersection"] == (predicted & enlarged).sum()
        assert row["union"] == (predicted | enlarged).sum()


def test_random_objects_are_the_mean_over_the_images_objects(store: ShardStore) -> None:
    """By brute force: the referent compared with every object of its image that is no crowd, itself included."""
    table = table_of(Constant(), store)
    crowds = 0
    for query, row in zip(queries_of(store, "val", OURS), table.to_pylist(), strict=True):
        annotated = store.row(query.image)
        own = store.mask(query.image, query.ann_id) > 0
        sums = []
        for item in annotated["instances"]:
            if item["iscrowd"]:
                crowds += 1
                continue
            other = masks.decode(item["counts"], annotated["height"], annotated["width"]) > 0
            overlap, together = (own & other).sum(), (own | other).sum()
            sums.append((overlap, together, overlap / together))
        expected = np.mean(np.array(sums, float), 0)
        found = [row[f"random_{name}"] for name in ("intersection", "union", "iou")]
        assert found == pytest.approx(expected.tolist(), rel=1e-6)
    assert crowds
    guessing = np.mean(table["random_iou"].to_pylist())
    assert 0.2 < guessing < 0.45, "three to five objects an image"


def test_without_objects_the_scores_are_the_same(store: ShardStore) -> None:
    full, bare = table_of(Oracle(store), store), table_of(Oracle(store), store, with_objects=False)
    extra = ["right_object", "random_intersection", "random_union", "random_iou"]
    assert bare.drop_columns(extra).equals(full.drop_columns(extra))
    assert all(bare[name].null_count == len(bare) for name in extra)


def test_tokens_are_no_longer_than_needed_and_cut_at_the_word_length(store: ShardStore) -> None:
    def asked(*texts: str, word_len: int) -> Constant:
        model = Constant()
        first = queries_of(store, "val", OURS)[0]
        queries = [replace(first, text=text) for text in texts]
        evaluate(MapAnswers(model, word_len), store, queries, OURS, split="val")
        return model

    short = asked("ring", "the red ring", word_len=22)
    assert short.shapes == [(2, len(encode("the red ring")))]
    assert short.tokens[0] == [*encode("ring"), 0, 0]
    cut = asked("the large red ring in the middle", word_len=6)
    assert cut.tokens == [[*encode("the large red ring in the middle")[:5], END_ID]]
    odd = asked("wow!?.", word_len=22)  # its "!" is id 0, which elsewhere is padding
    assert 0 in encode("wow!?.")
    assert odd.tokens == [encode("wow!?.")]


def test_shards_resampled_exactly_are_read_so(store: ShardStore, monkeypatch: pytest.MonkeyPatch) -> None:
    before = table_of(Oracle(store), store)
    modes: list[str] = []

    def watched(maps: torch.Tensor, height: int, width: int, size: int, mode: str, upsampling: str) -> torch.Tensor:
        modes.append(mode)
        return unletterbox(maps, height, width, size, mode, upsampling)  # type: ignore[arg-type]

    monkeypatch.setattr("ris_core.models.answer.unletterbox", watched)
    monkeypatch.setattr(store, "resample", "exact")
    assert table_of(Oracle(store), store).num_rows == before.num_rows
    assert set(modes) == {"exact"}


def test_shuffled_sentences_are_what_the_model_hears(store: ShardStore) -> None:
    model, queries = Constant(), queries_of(store, "val", OURS)
    mixed = shuffled(queries, 0)
    table = evaluate(MapAnswers(model, WORD_LEN), store, mixed, OURS, split="val")
    assert table["text"].to_pylist() == [query.text for query in mixed]
    assert table["sent_id"].to_pylist() == [query.sent_id for query in queries]
    assert [[token for token in row if token] for row in model.tokens] == [encode(query.text) for query in mixed]
