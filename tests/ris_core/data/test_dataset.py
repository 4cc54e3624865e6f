"""Training batches are a function of (seed, epoch, step) alone; a store names what is wrong with its folder."""

from __future__ import annotations

import json
import pickle
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_world import DATASET, IMAGE_SIZE, Tiny

from ris_core.data.dataset import BatchPlan, ShardStore, TrainingBatches
from ris_core.data.letterbox import letterbox_mask
from ris_core.data.shards import ShardOptions, write_manifest, write_shard
from ris_core.data.text import END_ID, START_ID, encode, pad_tokens, tokenize
from ris_core.errors import DataError

Batch = dict[str, torch.Tensor]
WORD_LEN = 12


@pytest.fixture(scope="module")
def store(tiny: Tiny) -> ShardStore:
    return tiny.store()


def tokens_of(texts: Sequence[str], length: int = WORD_LEN) -> torch.Tensor:
    return torch.from_numpy(tokenize(texts, length))


def batches(store: ShardStore, images: int = 4, k: int = 2, seed: int = 0, word_len: int = WORD_LEN, **other: int):
    return TrainingBatches(store, "train", BatchPlan(images, k, seed), partial(tokens_of, length=word_len), **other)


def epoch_of(made: TrainingBatches, epoch: int, **options: int) -> list[Batch]:
    return list(made.loader(epoch, **options))


def same(first: Iterable[Batch], second: Iterable[Batch]) -> bool:
    return all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        for a, b in zip(first, second, strict=True)
    )


def drawn_refs(made: TrainingBatches, epoch: int) -> np.ndarray:
    """Referents (index into the store's columns) of an epoch's whole batches, (groups, k)."""
    return made.epoch(epoch).groups[: len(made) * made.plan.batch_images]


def test_a_batch_has_the_promised_form(store: ShardStore) -> None:
    batch = batches(store).epoch(0)[0]
    assert {name: tensor.dtype for name, tensor in batch.items()} == {
        "image": torch.uint8,
        "tokens": torch.int64,
        "image_index": torch.int64,
        "target": torch.uint8,
    }
    assert batch["image"].shape == (4, 3, IMAGE_SIZE, IMAGE_SIZE)
    assert batch["target"].shape == (8, 1, IMAGE_SIZE // 4, IMAGE_SIZE // 4)
    assert batch["image_index"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert len(batch["tokens"]) == 8
    assert (batch["tokens"][:, -1] != 0).any(), "no longer than the longest sentence"


def test_a_batch_holds_images_sentences_and_masks_that_belong_together(store: ShardStore) -> None:
    made = batches(store)
    drawn = made.epoch(3)
    for step in range(len(made)):
        batch = drawn[step]
        for n, ref in enumerate(drawn.groups[4 * step : 4 * step + 4].ravel()):
            image = int(store.ref_image[ref])
            row = store.row(image)
            entry = row["refs"][store.ref_position[ref]]
            pixels = batch["image"][batch["image_index"][n]].permute(1, 2, 0).numpy()
            assert (pixels == store.pixels(image)).all()
            sentence = [token for token in batch["tokens"][n].tolist() if token]
            said = [encode(s["sent"]) for s in entry["sentences"]]
            assert sentence in [pad_tokens(ids, WORD_LEN)[: len(ids)].tolist() for ids in said]
            warped = letterbox_mask(store.mask(image, entry["ann_id"]), IMAGE_SIZE)
            assert (batch["target"][n, 0].numpy() == warped[::4, ::4]).all()


@pytest.mark.parametrize("stride", [1, 8, 16])
def test_targets_are_as_coarse_as_the_model_wants(stride: int, store: ShardStore) -> None:
    made, quarter = batches(store, stride=stride), batches(store)
    batch, other = made.epoch(0)[0], quarter.epoch(0)[0]
    assert batch["target"].shape == (8, 1, IMAGE_SIZE // stride, IMAGE_SIZE // stride)
    assert all(torch.equal(batch[name], other[name]) for name in ("image", "tokens", "image_index"))
    for target, ref in zip(batch["target"], made.epoch(0).groups[:4].ravel(), strict=True):
        image = int(store.ref_image[ref])
        ann_id = store.row(image)["refs"][store.ref_position[ref]]["ann_id"]
        warped = letterbox_mask(store.mask(image, ann_id), IMAGE_SIZE)
        assert (target[0].numpy() == warped[::stride, ::stride]).all()


def test_batches_are_a_function_of_seed_epoch_and_step(store: ShardStore) -> None:
    first, again = batches(store), batches(store)
    epoch_two = epoch_of(first, 2)
    epoch_of(again, 7)  # whatever was asked for before
    assert same(epoch_two, epoch_of(again, 2))
    assert same(epoch_two[3:], epoch_of(again, 2, first_step=3))
    assert not same(epoch_two, epoch_of(first, 3))
    assert not same(epoch_two, epoch_of(batches(store, seed=1), 2))


def test_sentences_change_from_epoch_to_epoch(store: ShardStore) -> None:
    made = batches(store, k=1)
    seen: dict[int, set[str]] = {}
    for epoch in range(8):
        drawn = made.epoch(epoch)
        for step in range(len(made)):
            for ref, tokens in zip(drawn.groups[4 * step : 4 * step + 4, 0], drawn[step]["tokens"], strict=True):
                seen.setdefault(int(ref), set()).add(str([token for token in tokens.tolist() if token]))
    refs = [ref for image in range(len(store)) for ref in store.row(image)["refs"]]
    several = [len(texts) for ref, texts in seen.items() if len(refs[ref]["sentences"]) > 1]
    assert np.mean(several) > 1.5


def test_one_expression_per_image_is_every_referent_exactly_once(store: ShardStore) -> None:
    made = batches(store, images=5, k=1)  # 70 referents in 14 batches
    for epoch in range(3):
        drawn = Counter(drawn_refs(made, epoch).ravel().tolist())
        assert sorted(drawn) == store.refs_of("train").tolist()
        assert set(drawn.values()) == {1}


def test_every_referent_comes_at_least_once_when_groups_divide_evenly(store: ShardStore) -> None:
    made = batches(store, images=1, k=2)
    assert len(made) == len(made.epoch(0).groups)
    for epoch in range(3):
        groups = drawn_refs(made, epoch)
        assert set(groups.ravel()) == set(store.refs_of("train"))
        images = store.ref_image[groups]
        assert (images == images[:, :1]).all(), "a group is about one image"


def test_groups_are_filled_up_where_an_image_has_too_few_referents(store: ShardStore) -> None:
    made = batches(store, images=2, k=8)
    for group in drawn_refs(made, 0):
        members = {ref for ref in store.refs_of("train") if store.ref_image[ref] == store.ref_image[group[0]]}
        assert set(group) == members
        counts = Counter(group.tolist()).values()
        assert max(counts) - min(counts) <= 1


def test_the_halves_of_two_ranks_are_the_whole_batch(store: ShardStore) -> None:
    whole = epoch_of(batches(store), 1)
    halves = [epoch_of(batches(store, rank=rank, world=2), 1) for rank in (0, 1)]
    for one, first, second in zip(whole, *halves, strict=True):
        length = one["tokens"].shape[1]
        assert max(first["tokens"].shape[1], second["tokens"].shape[1]) == length
        pair = [torch.nn.functional.pad(b["tokens"], (0, length - b["tokens"].shape[1])) for b in (first, second)]
        assert torch.equal(torch.cat(pair), one["tokens"])
        for name in ("image", "target"):
            assert torch.equal(torch.cat([first[name], second[name]]), one[name])
        assert torch.equal(torch.cat([first["image_index"], second["image_index"] + 2]), one["image_index"])


def test_batches_made_ahead_by_a_worker_are_the_same(store: ShardStore) -> None:
    made = batches(store)
    assert same(epoch_of(made, 4, first_step=2), epoch_of(made, 4, first_step=2, threads=1))


def test_long_sentences_are_cut_at_the_word_length(store: ShardStore) -> None:
    long = [
        len(encode(sentence["sent"])) > 5
        for i in range(len(store))
        for ref in store.row(i)["refs"]
        for sentence in ref["sentences"]
    ]
    assert 0 < sum(long) < len(long)
    tokens = torch.cat([batch["tokens"] for batch in epoch_of(batches(store, word_len=5), 0)])
    assert tokens.shape[1] == 5
    assert (tokens[:, 0] == START_ID).all()
    assert ((tokens == END_ID).sum(1) == 1).all()
    assert ((tokens == END_ID).float().argmax(1) == (tokens != 0).sum(1) - 1).all()


def test_an_epoch_can_be_shortened(store: ShardStore) -> None:
    full = batches(store)
    short = TrainingBatches(store, "train", BatchPlan(4, 2, 0, steps_per_epoch=3), tokens_of)
    assert len(full) > len(short) == 3
    assert same(epoch_of(short, 1), epoch_of(full, 1)[:3])


def test_what_cannot_be_drawn_is_said(store: ShardStore) -> None:
    with pytest.raises(DataError, match="a global batch of 4 images does not divide over 3 workers"):
        batches(store, world=3)
    with pytest.raises(DataError, match="shapes has no split 'test'; it has testA, testB, train, val"):
        TrainingBatches(store, "test", BatchPlan(4, 2, 0), tokens_of)
    with pytest.raises(DataError, match="than one batch of 500 images: lower train"):
        batches(store, images=500)


def test_images_of_a_split(store: ShardStore, tiny: Tiny) -> None:
    records = tiny.records()
    for split in ("train", "val", "testA", "testB"):
        wanted = [i for i, record in enumerate(records) if any(ref.split == split for ref in record.refs)]
        assert store.images_of(split).tolist() == wanted
    with pytest.raises(DataError, match="shapes has no split 'dev'"):
        store.images_of("dev")


@pytest.fixture(scope="module")
def uneven(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> ShardStore:
    """Images with 0 to 8 referents, in turns of one split and another, in shards of which one holds no referent, one no
    image, and one a single image.
    """
    folder, options = tmp_path_factory.mktemp("uneven"), ShardOptions(IMAGE_SIZE, storage="jpeg")
    splits = ("train", "train", "val", "train")
    records = []
    for i, record in enumerate(tiny.records()):
        own = [record.refs[n % len(record.refs)] for n in range(i % 9)]
        records.append(replace(record, refs=tuple(replace(ref, split=splits[n % 4]) for n, ref in enumerate(own))))
    bare = [replace(record, refs=()) for record in records[:3]]
    missing = [replace(records[0], file_name="nowhere.jpg")]
    parts = [records[:9], bare, records[9:20], missing, records[20:21], records[21:]]
    entries = [write_shard(folder / f"{i}.arrow", part, tiny.raw, options) for i, part in enumerate(parts)]
    write_manifest(folder, DATASET, options, entries)
    return ShardStore(folder)


def plainly(store: ShardStore, split: str, plan: BatchPlan, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """Groups and uniform numbers of an epoch as one would write them down, image by image."""
    rows = [(image, ref["split"]) for image in range(len(store)) for ref in store.row(image)["refs"]]
    random = np.random.default_rng([plan.seed, epoch])
    drawn = random.permutation(np.array([number for number, (_, of) in enumerate(rows) if of == split]))
    k = plan.expressions_per_image
    if k == 1:
        groups = drawn[:, None]
    else:
        members: dict[int, list[int]] = {}
        for number in drawn.tolist():
            members.setdefault(rows[number][0], []).append(number)
        taken = [np.resize(members[image], -(-len(members[image]) // k) * k) for image in sorted(members)]
        groups = random.permutation(np.concatenate([each.reshape(-1, k) for each in taken]))
    return groups, random.random(groups.shape)


def plain_batches(store: ShardStore, split: str, plan: BatchPlan, epoch: int) -> list[Batch]:
    """The whole batches of an epoch, of `plainly`'s groups."""
    places = [(image, ref) for image in range(len(store)) for ref in store.row(image)["refs"]]
    groups, uniform = plainly(store, split, plan, epoch)
    found = []
    for start in range(0, len(groups) - plan.batch_images + 1, plan.batch_images):
        images, index, texts, targets = [], [], [], []
        for n, group in enumerate(groups[start : start + plan.batch_images]):
            images.append(store.pixels(places[group[0]][0]).transpose(2, 0, 1))
            for member, number in zip(group, uniform[start + n], strict=True):
                image, ref = places[member]
                texts.append(ref["sentences"][int(number * len(ref["sentences"]))]["sent"])
                targets.append(letterbox_mask(store.mask(image, ref["ann_id"]), IMAGE_SIZE)[None, ::4, ::4])
                index.append(n)
        arrays = {"image": np.stack(images), "image_index": np.array(index), "target": np.stack(targets)}
        found.append({name: torch.from_numpy(a) for name, a in arrays.items()} | {"tokens": tokens_of(texts)})
    return found


@pytest.mark.parametrize("k", [1, 2, 3, 4, 7, 20])
@pytest.mark.parametrize("split", ["train", "val"])
def test_groups_and_choices_are_those_of_a_plain_implementation(split: str, k: int, uneven: ShardStore) -> None:
    counts = Counter(uneven.ref_image[uneven.refs_of(split)].tolist()).values()
    assert {1, max(counts)} <= set(counts)
    for seed in (0, 1, 2**40):
        plan = BatchPlan(1, k, seed)
        made = TrainingBatches(uneven, split, plan, tokens_of)
        for epoch in (0, 1, 2, 49):
            groups, uniform = plainly(uneven, split, plan, epoch)
            drawn = made.epoch(epoch)
            assert len(made) == len(groups)
            assert drawn.groups.tolist() == groups.tolist()
            assert drawn.choice(0, len(groups)).tobytes() == uniform.tobytes()
            for first in range(0, len(groups), 3):  # entered anywhere, in any order
                assert drawn.choice(first, first + 3).tolist()[: len(groups) - first] == uniform[first:][:3].tolist()


@pytest.mark.parametrize(("images", "k"), [(5, 1), (4, 2), (3, 4)])
def test_batches_are_those_of_a_plain_implementation(images: int, k: int, uneven: ShardStore) -> None:
    made = batches(uneven, images=images, k=k, seed=3)
    for epoch in (0, 5):
        wanted = plain_batches(uneven, "train", made.plan, epoch)
        assert len(wanted) > 2
        assert same(epoch_of(made, epoch), wanted)


def test_the_index_of_referents_agrees_with_the_rows(store: ShardStore, uneven: ShardStore) -> None:
    for each in (store, uneven):
        expected = [
            (image, position, ref["split"])
            for image in range(len(each))
            for position, ref in enumerate(each.row(image)["refs"])
        ]
        splits = [each.splits[number] for number in each.ref_split]
        assert list(zip(each.ref_image.tolist(), each.ref_position.tolist(), splits, strict=True)) == expected
        assert len(each) == each.manifest["images"]


def test_the_index_is_a_few_bytes_a_referent(store: ShardStore) -> None:
    for column in (store.ref_image, store.ref_position, store.ref_split):
        assert column.dtype == np.uint8  # of 38 images; four bytes for the image where there are millions


def test_more_shards_than_are_kept_open_give_the_same(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ris_core.data.dataset.OPEN_SHARDS", 1)
    few, many = ShardStore(tiny.shards), tiny.store()
    order = np.random.default_rng(0).permutation(len(many)).tolist()
    seen = [few.pixels(image) for image in order]  # views outlive the shard that was closed
    assert few._shard.cache_info().currsize == 1
    assert all((pixels == many.pixels(image)).all() for pixels, image in zip(seen, order, strict=True))
    assert [few.row(image) for image in order] == [many.row(image) for image in order]
    assert few.places() == many.places()


def test_a_store_can_be_sent_to_a_process_that_is_no_copy_of_this_one(store: ShardStore) -> None:
    made = batches(store)
    again = pickle.loads(pickle.dumps(made))
    assert same(epoch_of(made, 0), epoch_of(again, 0))


def target_of(made: TrainingBatches, ref: int) -> np.ndarray:
    store = made.store
    return made._target(*store.place(int(store.ref_image[ref])), int(store.ref_position[ref]))


def exact_mask(store: ShardStore, ref: int) -> np.ndarray:
    image = int(store.ref_image[ref])
    return store.mask(image, store.row(image)["refs"][store.ref_position[ref]]["ann_id"])


def test_targets_follow_the_shards_resampling(tiny: Tiny, tmp_path: Path) -> None:
    options = ShardOptions(60, resample="exact")  # 80 to 60 pixels: steps of 4/3, which OpenCV 4 rounds to a 32nd
    entry = write_shard(tmp_path / "part-0.arrow", tiny.records(), tiny.raw, options)
    write_manifest(tmp_path, DATASET, options, [entry])
    made = batches(ShardStore(tmp_path))
    differing = 0
    for ref in made.refs:
        mask = exact_mask(made.store, ref)
        assert (target_of(made, ref) == letterbox_mask(mask, 60, 4, "exact")).all()
        differing += int((target_of(made, ref) != letterbox_mask(mask, 60, 4)).any())
    assert differing


@pytest.mark.parametrize("stride", [2, 4, 8, 16])
def test_targets_of_any_stride_are_those_of_the_exact_masks(stride: int, store: ShardStore) -> None:
    made = batches(store, stride=stride)
    for ref in made.refs:
        assert (target_of(made, ref) == letterbox_mask(exact_mask(store, ref), IMAGE_SIZE, stride)).all()
    assert made.epoch(0)[0]["target"].shape[2:] == (IMAGE_SIZE // stride, IMAGE_SIZE // stride)


def test_a_folder_without_a_manifest_is_no_finished_dataset(tiny: Tiny, tmp_path: Path) -> None:
    shutil.copytree(tiny.shards, tmp_path / "shards", ignore=shutil.ignore_patterns("manifest.json"))
    with pytest.raises(DataError, match=r"manifest\.json does not exist: run the preprocess stage"):
        ShardStore(tmp_path / "shards")


def test_another_schema_version_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    shutil.copytree(tiny.shards, folder)
    content = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**content, "schema_version": 99}))
    with pytest.raises(DataError, match=r"shard schema 99, this code reads 3: run `ris preprocess --dataset shapes`"):
        ShardStore(folder)


@pytest.mark.parametrize("size", [None, 0, 3000])
def test_a_missing_or_damaged_shard_is_named(size: int | None, tiny: Tiny, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    shutil.copytree(tiny.shards, folder)
    shard = folder / "part-00001.arrow"
    if size is None:
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:size])
    message = "is named in the manifest but missing" if size is None else "is damaged"
    with pytest.raises(DataError, match=rf"part-00001\.arrow {message}"):
        ShardStore(folder)


def test_tokens_can_come_from_the_raw_text(tiny: Tiny, tmp_path: Path) -> None:
    record = tiny.records()[0]
    sentence = replace(record.refs[0].sentences[0], sent="red star", raw="The RED thing, please")
    said = replace(record, refs=(replace(record.refs[0], split="train", sentences=(sentence,)),))
    options = ShardOptions(IMAGE_SIZE)
    write_manifest(tmp_path, DATASET, options, [write_shard(tmp_path / "x.arrow", [said], tiny.raw, options)])
    store = ShardStore(tmp_path)
    cleaned, typed = (
        TrainingBatches(store, "train", BatchPlan(1, 1, 0, text=text), tokens_of).epoch(0)[0]["tokens"].tolist()
        for text in ("sent", "raw")
    )
    assert cleaned == [encode("red star")]
    assert typed == [encode("The RED thing, please")]


def test_the_tokens_are_those_of_whoever_asks(store: ShardStore) -> None:
    """Shards know of no tokenizer: a batch holds what the given one makes of its sentences."""
    heard: list[str] = []

    def lengths(texts: Sequence[str]) -> torch.Tensor:
        heard.extend(texts)
        return torch.tensor([[len(text)] for text in texts])

    batch = TrainingBatches(store, "train", BatchPlan(4, 2, 0), lengths).epoch(0)[1]
    assert batch["tokens"].tolist() == [[len(text)] for text in heard]
    assert len(heard) == 8
