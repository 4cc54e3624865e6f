"""Behavioural tests tell systems apart: one that understands, and ones that ignore text, sides or the image."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_world import IMAGE_SIZE, Tiny

from ris_core.data import masks
from ris_core.data.dataset import ShardStore
from ris_core.data.images import BadImage
from ris_core.data.records import ImageRecord, Instance, Reference, Sentence
from ris_core.data.shards import ShardOptions, write_manifest, write_shard
from ris_core.errors import DataError
from ris_core.evaluation.behaviour import Strangers, behaviour, mask_iou, swap_sides
from ris_core.models.clip import load_saved_clip
from ris_core.models.registry import ModelInfo, build_model, export_model
from ris_core.predictor import Prediction, RISPredictor

HEIGHT, WIDTH = 24, 40
SCORE = 0.75


@dataclass(frozen=True)
class Thing:
    """An object of 8 pixels in a row at `x`, 10 rows high, and what is said of it."""

    colour: str
    shape: str
    x: int
    said: tuple[str, ...] = ()

    @property
    def mask(self) -> np.ndarray:
        area = np.zeros((HEIGHT, WIDTH), bool)
        area[5:15, self.x : self.x + 8] = True
        return area


WORLD = (
    (
        Thing("red", "star", 2, ("red star", "left star")),
        Thing("blue", "star", 30, ("blue star", "star on the right")),
        Thing("red", "ring", 14, ("red ring",)),
    ),
    (Thing("green", "cross", 3, ("green cross", "leftmost cross")), Thing("blue", "cross", 28, ("blue cross",))),
    (Thing("red", "ring", 5, ("red ring", "red one")), Thing("green", "ring", 25, ("green ring",))),
    (Thing("blue", "star", 5, ("blue star",)), Thing("blue", "cross", 25, ("blue cross",))),
)
LONELY = ((Thing("red", "star", 2, ("thing",)),),)
Mark = Callable[[Sequence[Thing], str], np.ndarray]


def union(things: Sequence[Thing]) -> np.ndarray:
    return np.any([thing.mask for thing in things], axis=0) if things else np.zeros((HEIGHT, WIDTH), bool)


def fitting(things: Sequence[Thing], text: str) -> list[Thing]:
    """Things with the colour and the shape that the text names."""
    for words in (("red", "green", "blue"), ("star", "ring", "cross")):
        named = [word for word in words if word in text.split()]
        things = [thing for thing in things if not named or {thing.colour, thing.shape} & set(named)]
    return list(things)


def perfect(things: Sequence[Thing], text: str) -> np.ndarray:
    found = sorted(fitting(things, text), key=lambda thing: thing.x)
    if "left" in text:
        return union(found[:1])
    return union(found[-1:] if "right" in text else found)


def sideless(things: Sequence[Thing], text: str) -> np.ndarray:
    return union(fitting(things, text))


def deaf(things: Sequence[Thing], text: str) -> np.ndarray:
    return things[0].mask


def mistaken(things: Sequence[Thing], text: str) -> np.ndarray:
    return union([thing for thing in things if thing not in fitting(things, text)][:1])


def blind(things: Sequence[Thing], text: str) -> np.ndarray:
    return np.broadcast_to(np.arange(WIDTH) < WIDTH // 2, (HEIGHT, WIDTH))


def silent(things: Sequence[Thing], text: str) -> np.ndarray:
    return np.zeros((HEIGHT, WIDTH), bool)


def picture(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)


class Fake:
    """Knows every picture, mirrored ones too, by its pixels; `mark` says what it makes of the things in it."""

    def __init__(self, world: Sequence[Sequence[Thing]], mark: Mark):
        self.mark, self.asked = mark, list[tuple[bytes, list[str]]]()
        self.things: dict[bytes, Sequence[Thing]] = {}
        for number, things in enumerate(world):
            self.things[picture(number).tobytes()] = things
            mirrored = [replace(thing, x=WIDTH - 8 - thing.x) for thing in things]
            self.things[picture(number)[:, ::-1].tobytes()] = mirrored

    def set_image(self, image: np.ndarray) -> None:
        assert image.flags.c_contiguous
        self.key = image.tobytes()

    def predict(self, texts: Sequence[str]) -> list[Prediction]:
        self.asked.append((self.key, list(texts)))
        found = [self.mark(self.things[self.key], text) for text in texts]
        return [Prediction(mask, SCORE if mask.any() else 0.0, mask.astype(np.float32)) for mask in found]


def build(folder: Path, world: Sequence[Sequence[Thing]]) -> ShardStore:
    """Shards of a world in `folder`/shards, its pictures in `folder`."""
    records, ann_id = [], 0
    for number, things in enumerate(world):
        Image.fromarray(picture(number)).save(folder / f"{number}.png")
        instances, refs = [], []
        for thing in things:
            ann_id += 1
            box = (float(thing.x), 5.0, 8.0, 10.0)
            instances.append(Instance(ann_id, 1, thing.shape, 0, box, 80.0, masks.encode(thing.mask)))
            sentences = tuple(Sentence(100 * ann_id + i, text, text) for i, text in enumerate(thing.said))
            refs.append(Reference(ann_id, ann_id, 1, "val", sentences))
        records.append(ImageRecord(number, f"{number}.png", HEIGHT, WIDTH, tuple(instances), tuple(refs)))
    (folder / "shards").mkdir()
    entry = write_shard(folder / "shards" / "part-0.arrow", records, folder, ShardOptions(32))
    write_manifest(folder / "shards", "made", ShardOptions(32), [entry])
    return ShardStore(folder / "shards")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ShardStore:
    return build(tmp_path_factory.mktemp("made"), WORLD)


def look(mark: Mark, store: ShardStore, images: int = 9, seed: int = 0) -> dict[str, dict[str, float | int]]:
    return behaviour(Fake(WORLD, mark), store, store.folder.parent, "val", images, seed)


def test_one_that_understands(store: ShardStore) -> None:
    assert look(perfect, store) == {
        "mirror": {"cases": 3, "iou": 1.0, "agree": 1.0, "iou_unswapped": 0.0, "cases_plain": 10, "iou_plain": 1.0},
        "swap": {"cases": 5, "moved": 1.0, "followed": 1.0, "iou": 0.0},
        "absent": {"cases": 4, "score_present": SCORE, "score_absent": 0.0, "auroc": 1.0, "empty_absent": 1.0},
    }


def test_one_that_ignores_the_text(store: ShardStore) -> None:
    assert look(deaf, store) == {
        "mirror": {"cases": 3, "iou": 1.0, "agree": 1.0, "iou_unswapped": 1.0, "cases_plain": 10, "iou_plain": 1.0},
        "swap": {"cases": 5, "moved": 0.0, "followed": 0.0, "iou": 1.0},
        "absent": {"cases": 4, "score_present": SCORE, "score_absent": SCORE, "auroc": 0.5, "empty_absent": 0.0},
    }


def test_one_that_ignores_sides_is_betrayed_by_the_control(store: ShardStore) -> None:
    found = look(sideless, store)
    assert found["mirror"]["iou"] == found["mirror"]["iou_unswapped"] == 1.0
    assert found["swap"] == look(perfect, store)["swap"]


def test_one_that_mistakes_the_object_moves_but_does_not_follow(store: ShardStore) -> None:
    assert look(mistaken, store)["swap"] == {"cases": 5, "moved": 1.0, "followed": 0.0, "iou": 0.0}


def test_one_that_always_gives_the_same_answer(store: ShardStore) -> None:
    found = look(blind, store)
    assert found["mirror"] == {
        "cases": 3,
        "iou": 0.0,
        "agree": 0.0,
        "iou_unswapped": 0.0,
        "cases_plain": 10,
        "iou_plain": 0.0,
    }
    assert found["swap"] == {"cases": 5, "moved": 0.0, "followed": 0.0, "iou": 1.0}
    assert found["absent"]["auroc"] == 0.5


def test_one_that_never_answers_agrees_with_itself(store: ShardStore) -> None:
    found = look(silent, store)
    assert (found["mirror"]["iou"], found["mirror"]["iou_plain"]) == (1.0, 1.0)
    assert found["swap"] == {"cases": 5, "moved": 0.0, "followed": 0.0, "iou": 1.0}
    assert found["absent"] == {"cases": 4, "score_present": 0, "score_absent": 0, "auroc": 0.5, "empty_absent": 1.0}


def test_each_image_is_set_once_per_orientation_and_asked_at_once(store: ShardStore) -> None:
    fake = Fake(WORLD, perfect)
    behaviour(fake, store, store.folder.parent, "val", 9, 0)
    keys = [key for key, _ in fake.asked]
    assert sorted(keys) == sorted(fake.things)
    questions = dict(fake.asked)
    assert all(len(texts) == len(set(texts)) for texts in questions.values())
    mirrored = questions[picture(1)[:, ::-1].tobytes()]
    assert mirrored == ["green cross", "leftmost cross", "blue cross", "rightmost cross"]
    assert questions[picture(1).tobytes()][:-1] == ["green cross", "leftmost cross", "blue cross"]


def test_the_absent_names_a_category_that_is_not_there(store: ShardStore) -> None:
    """ "red one" is said of a ring, but fits a red thing of any kind: it is never used."""
    asked: dict[int, set[str]] = {1: set(), 3: set()}
    for seed in range(20):
        fake = Fake(WORLD, perfect)
        behaviour(fake, store, store.folder.parent, "val", 9, seed)
        for number, texts in asked.items():
            texts.add(dict(fake.asked)[picture(number).tobytes()][-1])
    assert asked == {1: {"red star", "blue star", "red ring", "green ring"}, 3: {"red ring", "green ring"}}
    assert {text for _, text in Strangers(store, "val").sentences}.isdisjoint({"red one"})


def test_a_seed_decides_what_is_seen(store: ShardStore) -> None:
    seen = []
    for seed in (0, 0, 1, 2, 3, 4):
        fake = Fake(WORLD, perfect)
        assert behaviour(fake, store, store.folder.parent, "val", 1, seed)["mirror"]["cases_plain"] in (2, 3)
        seen.append(fake.asked)
        assert len(fake.asked) == 2
    assert seen[0] == seen[1]
    assert any(other != seen[0] for other in seen)


def test_where_nothing_applies_there_are_no_numbers(tmp_path: Path) -> None:
    store = build(tmp_path, LONELY)
    assert behaviour(Fake(LONELY, deaf), store, tmp_path, "val", 5, 0) == {
        "mirror": {"cases": 0, "cases_plain": 1, "iou_plain": 1.0},
        "swap": {"cases": 0},
        "absent": {"cases": 0},
    }


def test_only_sides_leave_nothing_plain(tmp_path: Path) -> None:
    world = ((Thing("red", "star", 2, ("left",)),),)
    found = behaviour(Fake(world, deaf), build(tmp_path, world), tmp_path, "val", 1, 0)
    assert found["mirror"] == {"cases": 1, "iou": 1.0, "agree": 1.0, "iou_unswapped": 1.0, "cases_plain": 0}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("star to the left of the right ring", "star to the right of the left ring"),
        ("second leftmost, far RIGHT", "second rightmost, far LEFT"),
        ("Left-most box. Right", "Right-most box. Left"),
        ("righty, leftest, right-hand righthand", "lefty, rightest, left-hand lefthand"),
        ("bright leftovers upright rightly", "bright leftovers upright rightly"),
        ("the highest one in the middle", "the highest one in the middle"),
    ],
)
def test_sides_are_exchanged(text: str, expected: str) -> None:
    assert swap_sides(text) == expected
    assert swap_sides(expected) == text


def test_overlap_of_two_masks() -> None:
    one, other = np.array([[1, 1, 0]], bool), np.array([[0, 1, 1]], bool)
    assert mask_iou(one, other) == pytest.approx(1 / 3)
    assert mask_iou(one, one) == mask_iou(one & other & False, one & False) == 1.0
    assert mask_iou(one, one & False) == 0.0


def test_errors_are_told(store: ShardStore, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="behaviour of 0 images says nothing: ask for 1 or more"):
        look(perfect, store, images=0)
    with pytest.raises(DataError, match="has no split 'train'; it has val"):
        behaviour(Fake(WORLD, perfect), store, store.folder.parent, "train", 1, 0)
    with pytest.raises(BadImage, match=r"\.png cannot be used: No such file"):
        behaviour(Fake(WORLD, perfect), store, tmp_path, "val", 1, 0)


def test_a_real_model_can_be_asked(tiny: Tiny, tmp_path: Path) -> None:
    torch.manual_seed(3)
    config = tiny.params().of("cris").model
    model = build_model("cris", config, load_saved_clip(tiny.clip))
    with torch.no_grad():  # spread the answers of the untrained model around the threshold
        model.get_parameter("proj.txt.weight").mul_(4)
    export_model(tmp_path, "cris", model.state_dict(), config, tiny.clip, ModelInfo(IMAGE_SIZE, word_len=12))
    predictor = RISPredictor.from_folder(tmp_path)
    found, again = (behaviour(predictor, tiny.store(), tiny.raw, "train", 8, 1) for _ in range(2))
    assert found == again
    assert all(group["cases"] > 0 for group in found.values())
    numbers = [v for group in found.values() for name, v in group.items() if not name.startswith("cases")]
    assert len(numbers) == 11
    assert all(math.isfinite(number) and 0 <= number <= 1 for number in numbers)
