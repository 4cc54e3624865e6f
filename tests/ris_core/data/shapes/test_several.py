"""Sets are what their words say: checked against a reader of English that knows neither programs nor margins."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from random import Random

import numpy as np
import pytest

from ris_core.data.shapes.expressions import Noun, Program, Relation, Side
from ris_core.data.shapes.flavours import ARTICLES, FLAVOURS, Expression, describe, describe_sets
from ris_core.data.shapes.scenes import COLOURS, SHAPES, SIZES, Scene, Thing, sample_scene, settle
from ris_core.data.shapes.several import SHARES, Several, meaning
from ris_core.data.shapes.several_words import NUMBERS, PLURALS, phrase_none, phrase_several
from ris_core.data.shapes.wording import SYNONYMS
from ris_core.data.text import NONE, SEVERAL

CANVAS = 160
Described = list[tuple[Scene, list[Expression], list[tuple[tuple[int, ...], list[Expression]]]]]


def thing(shape: str, colour: str, x: float, y: float, radius: float = 16, size: str = "small") -> Thing:
    return Thing(shape, colour, size, x, y, radius, 0.0, (128.0, 128.0, 128.0))


@pytest.fixture(scope="module")
def scene() -> Scene:
    """A red, a large blue and a white star in a row, and below them a red ring and a green square."""
    things = [
        thing("ring", "red", 40, 120),
        thing("square", "green", 112, 120),
        thing("star", "red", 25, 40),
        thing("star", "blue", 82, 45, 28, "large"),
        thing("star", "white", 138, 38),
    ]
    return settle(CANVAS, CANVAS, things)


STAR, RED = Noun(shape="star"), Noun(colour="red")


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        (Several((Program(RED),)), {0, 2}),
        (Several((Program(STAR),)), {2, 3, 4}),
        (Several((Program(Noun(size="small")),)), {0, 1, 2, 4}),
        (Several((Program(Noun("red", "square")),)), set()),
        (Several((Program(Noun(), (Side("left"),)),)), None),  # the blue star is in the middle
        (Several((Program(Noun(size="small"), (Side("left"),)),)), {0, 2}),
        (Several((Program(Noun(), (Side("bottom"),)),)), {0, 1}),
        (Several((Program(Noun("green"), (Side("top"),)),)), set()),
        (Several((Program(STAR),), RED), {3, 4}),
        (Several((Program(STAR),), Noun("green")), None),  # no star is green
        (Several((Program(Noun()),), STAR), None),  # which one?
        (Several((Program(STAR, (Relation("above", Noun(shape="square")),)),)), None),  # the red one, far to the left?
        (Several((Program(RED, (Relation("left of", Noun("green")),)),)), {0, 2}),
        (Several((Program(STAR, (Relation("below", Noun("green")),)),)), set()),
        (Several((Program(Noun("red", "ring")), Program(Noun("green")))), {0, 1}),
        (Several((Program(RED), Program(Noun("green")))), None),  # two red things
        (Several((Program(Noun("green")), Program(Noun(shape="square")))), None),  # the same thing twice
    ],
)
def test_meaning_on_a_known_scene(scene: Scene, said: Several, meant: set[int] | None) -> None:
    assert meaning(said, scene) == meant


@pytest.fixture(scope="module")
def described() -> Described:
    """200 scenes with single expressions and sets."""
    found: Described = []
    for index in range(200):
        scene, rng = sample_scene(np.random.default_rng([6, index]), CANVAS), Random(index)
        told = describe(scene, range(len(scene.things)), FLAVOURS["shapes*"], (2, 3), rng)
        single = [expression for said in told.values() for expression in said]
        found.append((scene, single, describe_sets(scene, single, 3, rng)))
    return found


COUNTED = {word: number for number, word in NUMBERS.items()} | {"both": 2}
SIDES = {"left": "left", "right": "right", "top": "top", "upper": "top", "bottom": "bottom", "lower": "bottom"}
OUTERMOST = {"leftmost": "left", "rightmost": "right", "highest": "top", "lowest": "bottom"}
LINKS = {text: plain for plain in ("above", "below", "left of", "right of") for text in SYNONYMS[plain]}


class Reader:
    """Which things of a scene English words mean, word by word; half-planes and sorting decide where things lie."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.plain = {text: word for word, texts in SYNONYMS.items() for text in texts}
        self.plain |= {PLURALS.get(text, f"{text}s"): self.plain[text] for shape in SHAPES for text in SYNONYMS[shape]}
        self.x = np.array([t.x - scene.width / 2 for t in scene.things])
        self.y = np.array([t.y - scene.height / 2 for t in scene.things])

    def along(self, side: str) -> np.ndarray:
        return {"left": -self.x, "right": self.x, "top": -self.y, "bottom": self.y}[side]

    def read(self, text: str) -> set[int]:
        words = text.removeprefix("all ") if " and " not in text else text
        for link in (" except for ", " except ", " but "):
            if link in words:
                group, but = words.split(link)
                everything = self.group(group)
                (left_out,) = [i for i in everything if i in self.group(but)]
                return everything - {left_out}
        if " and " in words:
            parts = [part for piece in words.split(" and ") for part in piece.split(", ")]
            found = [self.group(part) for part in parts]
            assert all(len(each) == 1 for each in found), text
            return set().union(*found)
        found = self.group(words)
        assert [COUNTED[word] for word in words.split() if word in COUNTED] in ([], [len(found)]), text
        return found

    def group(self, words: str) -> set[int]:
        """Read one noun with where it is."""
        for link in sorted(LINKS, key=len, reverse=True):
            head, found, anchor = f" {words}".partition(f" {link} the ")
            if found:
                (point,) = self.group(anchor)
                along = self.along({"above": "top", "below": "bottom"}.get(LINKS[link]) or link.split()[-2])
                return {i for i in self.group(head) if along[i] - along[point] > 0.06 * self.scene.canvas} - {point}
        tokens = words.split()
        found = {i for i in range(len(self.scene.things)) if self.fits(self.scene.things[i], tokens)}
        if "first" in tokens or "farthest" in tokens or "far" in tokens:
            along = self.along(next(SIDES[token] for token in tokens if token in SIDES))
            return {max(found, key=lambda i: along[i])}
        for token in tokens:
            if token in OUTERMOST:
                return {max(found, key=lambda i: self.along(OUTERMOST[token])[i])}
            if self.plain.get(token) in ("largest", "smallest"):
                sign = 1 if self.plain[token] == "largest" else -1
                return {max(found, key=lambda i: sign * self.scene.areas[i])}
        sides = [SIDES[token] for token in tokens if token in SIDES]
        return {i for i in found if all(self.along(side)[i] > 0 for side in sides)}

    def fits(self, each: Thing, tokens: list[str]) -> bool:
        named = [self.plain.get(token, token) for token in tokens]
        colours, shapes, sizes = ([word for word in named if word in words] for words in (COLOURS, SHAPES, SIZES))
        return colours in ([], [each.colour]) and shapes in ([], [each.shape]) and sizes in ([], [each.size])


def test_every_set_is_what_its_words_say(described: Described) -> None:
    checked = Counter[str]()
    for index, (scene, _, sets) in enumerate(described):
        reader, rng = Reader(scene), Random(index)
        for things, said in sets:
            for expression in said:
                program = expression.program
                assert isinstance(program, Several)
                for _ in range(3):  # without slips of the keyboard, which nobody could read
                    text = phrase_several(program, len(things), rng) if things else phrase_none(program, rng)
                    assert reader.read(text) == set(things), text
                checked[expression.kind] += 1
    assert checked[SEVERAL] > 700
    assert checked[NONE] > 280


def test_the_meaning_survives_a_nudge(described: Described) -> None:
    """With every centre moved by up to 3 % of the canvas, the words still mean the same things."""
    random = np.random.default_rng(0)
    for index, (scene, _, sets) in enumerate(described):
        shifts = random.uniform(-0.03, 0.03, (len(scene.things), 2)) * scene.canvas
        moved = [replace(t, x=t.x + dx, y=t.y + dy) for t, (dx, dy) in zip(scene.things, shifts, strict=True)]
        reader, rng = Reader(settle(scene.width, scene.height, moved)), Random(index)
        for things, said in sets:
            for expression in said:
                program = expression.program
                assert isinstance(program, Several)
                text = phrase_several(program, len(things), rng) if things else phrase_none(program, rng)
                assert reader.read(text) == set(things), text


def test_nothing_is_spoken_of_that_has_nothing_to_do_with_the_picture(described: Described) -> None:
    """Each expression about nothing names a colour or a shape of its scene, and most both."""
    both = []
    for scene, _, sets in described:
        for things, said in sets:
            for expression in said if not things else ():
                assert isinstance(expression.program, Several)
                noun = expression.program.parts[0].noun
                here = [noun.colour in {t.colour for t in scene.things}, noun.shape in {t.shape for t in scene.things}]
                assert any(here), expression
                both.append(all(here))
    assert np.mean(both) > 0.5


def test_shares_are_near_those_of_grefcoco(described: Described) -> None:
    kinds = Counter(e.kind for _, _, sets in described for _, said in sets for e in said)
    total = kinds.total() + sum(len(single) for _, single, _ in described)
    for kind, share in SHARES.items():
        assert kinds[kind] / total == pytest.approx(share, abs=0.015)
    sizes = Counter(len(things) for _, _, sets in described for things, _ in sets if things)
    assert sizes[2] > sizes[3] > sizes[4] > 10


def test_expressions_of_one_picture_all_differ(described: Described) -> None:
    for _, single, sets in described:
        everything = [*single, *(expression for _, said in sets for expression in said)]
        essences = [tuple(t for t in e.tokens if t not in ARTICLES) for e in everything]
        assert len(essences) == len(set(essences))
        assert all(len(said) <= 3 for things, said in sets if things)
        assert len({things for things, _ in sets}) == len(sets)


def test_there_are_many_ways_to_say_it(described: Described) -> None:
    texts = [" ".join(e.tokens) for _, _, sets in described for _, said in sets for e in said]
    for word in ("all", "every", "both", "three", "everything", "but", "except", "and", "left", "upper", "above"):
        assert sum(word in text.split() for text in texts) > 5, word
