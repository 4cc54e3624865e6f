"""Expressions mean exactly one thing: checked against a second interpreter that knows no margins and no verdicts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from random import Random

import numpy as np
import pytest

from ris_core.data.shapes.expressions import (
    DIRECTIONS,
    KINDS,
    PLAIN_RELATIONS,
    Extreme,
    Noun,
    Place,
    Program,
    Rank,
    Relation,
    propose,
    solve,
)
from ris_core.data.shapes.flavours import ARTICLES, FLAVOURS, Expression, describe
from ris_core.data.shapes.scenes import Scene, Thing, sample_scene, settle
from ris_core.data.shapes.wording import (
    LOCATION_WORDS,
    SYNONYMS,
    clean,
    long_phrase,
    phrase,
    region_captions,
    scene_captions,
    typed,
)
from ris_core.data.text import expression_kind

CANVAS = 160


def thing(shape: str, colour: str, x: float, y: float, radius: float = 16, size: str = "small") -> Thing:
    return Thing(shape, colour, size, x, y, radius, 0.0, (128.0, 128.0, 128.0))


@pytest.fixture(scope="module")
def scene() -> Scene:
    """A red, a large blue and a white star in a row, and below them a red ring partly behind a green square."""
    return settle(
        CANVAS,
        CANVAS,
        [
            thing("ring", "red", 90, 112),
            thing("square", "green", 112, 120),
            thing("star", "red", 25, 40),
            thing("star", "blue", 82, 45, 28, "large"),
            thing("star", "white", 138, 38),
        ],
    )


@pytest.fixture(scope="module")
def described() -> dict[str, list[tuple[Scene, dict[int, list[Expression]]]]]:
    """120 scenes described in each flavour."""
    scenes = [sample_scene(np.random.default_rng([5, index]), CANVAS) for index in range(120)]
    return {
        name: [(s, describe(s, range(len(s.things)), flavour, (2, 3), Random(index))) for index, s in enumerate(scenes)]
        for name, flavour in FLAVOURS.items()
    }


STAR, RED, ANY = Noun(shape="star"), Noun(colour="red"), Noun()


@pytest.mark.parametrize(
    ("program", "answer"),
    [
        (Program(Noun("red", "star")), 2),
        (Program(RED), None),
        (Program(Noun("red", size="large")), None),
        (Program(Noun(shape="star", size="large")), 3),
        (Program(STAR, (Place("left"),)), 2),
        (Program(STAR, (Place("right"),)), 4),
        (Program(ANY, (Place("left"),)), 2),
        (Program(STAR, (Place("top"),)), None),  # three in a row
        (Program(RED, (Place("top left"),)), 2),
        (Program(STAR, (Place("top right"),)), None),  # the blue star leans a little to the right too
        (Program(RED, (Place("bottom"),)), 0),
        (Program(STAR, (Rank("left", 2),)), 3),
        (Program(STAR, (Rank("right", 1),)), 4),
        (Program(ANY, (Rank("left", 2),)), None),  # ring and blue star are nearly above each other
        (Program(STAR, (Extreme("largest"),)), 3),
        (Program(STAR, (Extreme("smallest"),)), None),
        (Program(RED, (Relation("behind", Noun(shape="square")),)), 0),
        (Program(ANY, (Relation("in front of", Noun(shape="ring")),)), 1),
        (Program(ANY, (Relation("overlapping", Noun("green")),)), 0),
        (Program(STAR, (Relation("next to", Noun(shape="ring")),)), 3),
        (Program(STAR, (Relation("left of", Noun("blue")),)), 2),
        (Program(ANY, (Relation("right of", Noun("blue")),)), None),  # the ring, 8 px farther right, might count
        (Program(RED, (Relation("below", Noun("blue", "star")),)), 0),
        (Program(ANY, (Relation("left of", STAR),)), None),  # three stars: no anchor
    ],
)
def test_solve_on_a_known_scene(scene: Scene, program: Program, answer: int | None) -> None:
    assert solve(program, scene) == answer


@pytest.mark.parametrize(
    ("modifier", "margin"), [(Place("left"), 0.16), (Rank("left", 1), 0.11), (Relation("left of", RED), 0.125)]
)
def test_the_margin_decides(modifier: Place | Rank | Relation, margin: float) -> None:
    """Two things closer than the margin leave the question open; farther apart they settle it."""
    for gap, answer in ((margin * CANVAS - 1, None), (margin * CANVAS + 1, 0)):
        x = 40.0 + gap
        near = settle(
            CANVAS,
            CANVAS,
            [thing("star", "blue", 40, 40), thing("star", "red", x, 41), thing("ring", "white", 130, 130)],
        )
        noun = Noun("blue", "star") if isinstance(modifier, Relation) else STAR
        assert solve(Program(noun, (modifier,)), near) == answer


class Oracle:
    """Which things a program means, by plain argmax, sorting and half-planes on arrays: no margins, no verdicts."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.x = np.array([t.x - scene.width / 2 for t in scene.things])
        self.y = np.array([t.y - scene.height / 2 for t in scene.things])
        masks = [np.zeros(scene.owner.shape, bool) for _ in scene.things]
        for mask, field in zip(masks, scene.fields, strict=True):
            mask[field.window] = field.distance <= 0
        self.areas = np.array([mask.sum() for mask in masks])
        self.on_top = np.full(scene.owner.shape, -1)
        for index, mask in enumerate(masks):
            self.on_top[mask] = index
        self.covers = np.array([[(mask & (self.on_top == j)).any() for j in range(len(masks))] for mask in masks])

    def along(self, side: str) -> np.ndarray:
        return {"left": -self.x, "right": self.x, "top": -self.y, "bottom": self.y}[side]

    def fits(self, noun: Noun) -> set[int]:
        wanted = [(key, getattr(noun, key)) for key in ("colour", "shape", "size") if getattr(noun, key)]
        return {i for i, t in enumerate(self.scene.things) if all(getattr(t, key) == value for key, value in wanted)}

    def meant(self, program: Program) -> set[int]:
        group = self.fits(program.noun)
        result = set(group)
        for modifier in program.modifiers:
            result &= self.satisfying(modifier, sorted(group))
        return result

    def satisfying(self, modifier: Place | Rank | Extreme | Relation, group: list[int]) -> set[int]:
        best = lambda values: {max(group, key=lambda i: values[i])}  # noqa: E731
        if isinstance(modifier, Rank):
            return {sorted(group, key=lambda i: -self.along(modifier.side)[i])[modifier.rank - 1]}
        if isinstance(modifier, Extreme):
            return best(self.areas if modifier.which == "largest" else -self.areas)
        if isinstance(modifier, Place):
            if modifier.where == "middle":
                return best(-np.maximum(abs(self.x), abs(self.y)))
            if " " in modifier.where:
                vertical, horizontal = modifier.where.split()
                return {i for i in group if self.along(vertical)[i] > 0 and self.along(horizontal)[i] > 0}
            return best(self.along(modifier.where))
        (anchor,) = self.fits(modifier.anchor)
        group = [i for i in group if i != anchor]
        apart = np.hypot(self.x - self.x[anchor], self.y - self.y[anchor])
        if modifier.relation in ("next to", "farthest from"):
            return best(apart if modifier.relation == "farthest from" else -apart)
        if modifier.relation in DIRECTIONS:
            along = self.along(DIRECTIONS[modifier.relation])
            return {i for i in group if along[i] - along[anchor] > 0.06 * self.scene.canvas}
        behind = {i for i in group if self.covers[i, anchor]}
        front = {i for i in group if self.covers[anchor, i]}
        return {"behind": behind, "in front of": front, "overlapping": behind | front}[modifier.relation]


@pytest.mark.parametrize("name", FLAVOURS)
def test_every_expression_means_its_referent_and_nothing_else(name: str, described: dict) -> None:
    checked = 0
    for scene, expressions in described[name]:
        oracle = Oracle(scene)
        for target, said in expressions.items():
            for expression in said:
                assert oracle.meant(expression.program) == {target}, expression
                checked += 1
    assert checked > 700


@pytest.mark.parametrize("name", FLAVOURS)
def test_the_meaning_survives_a_nudge(name: str, described: dict) -> None:
    """With every centre moved by up to 3 % of the canvas, the plain reading still gives the referent."""
    rng = np.random.default_rng(0)
    touching = {"behind", "in front of", "overlapping"}
    for scene, expressions in described[name]:
        shifts = rng.uniform(-0.03, 0.03, (len(scene.things), 2)) * scene.canvas
        things = [replace(t, x=t.x + dx, y=t.y + dy) for t, (dx, dy) in zip(scene.things, shifts, strict=True)]
        oracle = Oracle(settle(scene.width, scene.height, things))
        for target, said in expressions.items():
            for expression in said:
                if not any(getattr(m, "relation", None) in touching for m in expression.program.modifiers):
                    assert oracle.meant(expression.program) == {target}, expression


@pytest.mark.parametrize("name", FLAVOURS)
def test_expressions_of_one_picture_all_differ(name: str, described: dict) -> None:
    for _, expressions in described[name]:
        essences = [tuple(t for t in e.tokens if t not in ARTICLES) for said in expressions.values() for e in said]
        assert len(essences) == len(set(essences))


def test_most_referents_have_two_or_three_expressions_of_different_kinds(described: dict) -> None:
    said = [said for pages in described.values() for _, expressions in pages for said in expressions.values()]
    counts = Counter(len(expressions) for expressions in said)
    assert set(counts) <= {1, 2, 3}
    assert counts[1] < 0.05 * counts.total()
    assert counts[3] > 0.25 * counts.total()
    assert np.mean([len({e.kind for e in expressions}) > 1 for expressions in said]) > 0.7


def test_most_things_are_described_and_pictures_alone_do_not_tell_which(described: dict) -> None:
    for pages in described.values():
        assert sum(len(expressions) for _, expressions in pages) > 0.85 * sum(len(scene.things) for scene, _ in pages)
        assert np.mean([len(expressions) >= 2 for _, expressions in pages]) > 0.97
        assert min(len(expressions) for _, expressions in pages) >= 1


def test_kinds_are_mixed(described: dict) -> None:
    shares = {}
    for name, pages in described.items():
        kinds = Counter(e.kind for _, expressions in pages for said in expressions.values() for e in said)
        shares[name] = {kind: kinds[kind] / kinds.total() for kind in KINDS}
    assert 0.22 < shares["shapes"]["attribute"] < 0.36
    assert shares["shapesg"]["attribute"] < 0.4
    assert shares["shapes+"]["attribute"] < 0.5
    for name in ("shapes", "shapesg"):
        assert min(shares[name][kind] for kind in ("location", "order", "relation")) > 0.11
        assert shares[name]["size"] > 0.05
    assert shares["shapes+"]["relation"] > 0.25
    assert shares["shapes+"]["location"] == shares["shapes+"]["order"] == 0


def test_the_modifier_is_needed(described: dict) -> None:
    """Expressions other than attributes use a noun that fits several things."""
    for scene, expressions in described["shapes"]:
        for said in expressions.values():
            for expression in said:
                noun = replace(expression.program.noun, size=None)
                needed = expression.kind != "attribute"
                assert (len(Oracle(scene).fits(noun)) > 1) == needed, expression


def test_location_free_flavour_has_no_location_words(described: dict) -> None:
    words = {
        token
        for _, expressions in described["shapes+"]
        for said in expressions.values()
        for e in said
        for token in e.tokens
    }
    assert not words & LOCATION_WORDS
    programs = [e.program for _, expressions in described["shapes+"] for said in expressions.values() for e in said]
    relations = {m.relation for p in programs for m in p.modifiers if isinstance(m, Relation)}
    assert relations == set(PLAIN_RELATIONS)
    located = {
        token
        for _, expressions in described["shapes"]
        for said in expressions.values()
        for e in said
        for token in e.tokens
    }
    assert {"left", "right", "top", "bottom", "second"} <= located & LOCATION_WORDS


def test_long_flavour_is_long(described: dict) -> None:
    for _, expressions in described["shapesg"]:
        for said in expressions.values():
            assert all(8 <= len(e.tokens) <= 15 for e in said)
    short = [len(e.tokens) for _, expressions in described["shapes"] for said in expressions.values() for e in said]
    assert np.mean(short) < 5


@pytest.mark.parametrize("speak", [phrase, long_phrase])
def test_words_say_what_the_program_says(speak: Callable[[Program, Random], str], described: dict) -> None:
    """Every property, side, rank, superlative and relation of a program is among its words, in one of its synonyms."""
    rng = Random(1)
    sides: dict[str, tuple[str, ...]] = {"left": ("left", "leftmost"), "right": ("right", "rightmost")}
    sides |= {"top": ("top", "upper", "highest"), "bottom": ("bottom", "lower", "lowest")}
    for scene, _ in described["shapes"]:
        for kind in KINDS:
            target = rng.randrange(len(scene.things))
            program = propose(kind, scene, target, FLAVOURS["shapes"].relations, rng)
            if program is None:
                continue
            text = f" {speak(program, rng)} "
            says = lambda *words: any(f" {word}" in text.replace(",", " ") for word in words)  # noqa: E731, B023
            nouns = [program.noun]
            for modifier in program.modifiers:
                if isinstance(modifier, Relation):
                    nouns.append(modifier.anchor)
                    assert says(*SYNONYMS[modifier.relation]), text
                if isinstance(modifier, Extreme):
                    assert says(*SYNONYMS[modifier.which]), text
                if isinstance(modifier, Rank):
                    assert says(*sides[modifier.side]), text
                    assert modifier.rank == 1 or says(("second", "third", "fourth")[modifier.rank - 2]), text
                if isinstance(modifier, Place):
                    places = modifier.where.split()
                    assert all(says(*sides.get(place, ("middle", "center"))) for place in places), text
            for noun in nouns:
                for word in (noun.colour, noun.shape, noun.size):
                    assert word is None or says(*SYNONYMS.get(word, (word,))), text


def test_no_word_stands_for_two_things() -> None:
    words = [word for synonyms in SYNONYMS.values() for word in synonyms]
    assert len(words) == len(set(words))
    assert all(synonyms[0] == plain for plain, synonyms in SYNONYMS.items())
    plain_words = {word for relation in PLAIN_RELATIONS for text in SYNONYMS[relation] for word in text.split()}
    assert not plain_words & LOCATION_WORDS


def test_clean_follows_refer() -> None:
    assert clean("2nd Star, from the RIGHT.") == ["second", "star", "from", "the", "right"]
    assert " ".join(clean("The box, by the 1st ring.", keep_commas=True)) == "the box , by the first ring"


def test_typed_text_is_sometimes_unclean_and_mostly_legible() -> None:
    rng = Random(0)
    texts = [typed("second star from the left", rng) for _ in range(3000)]
    cleaned = Counter(" ".join(clean(text)) for text in texts)
    assert 0.95 < cleaned["second star from the left"] / 3000 < 0.995
    assert len(cleaned) > 5
    assert any("2nd" in text for text in texts)
    assert any(text.isupper() for text in texts)
    assert any(text.endswith(".") for text in texts)


def test_scene_captions_name_everything(described: dict) -> None:
    """Each caption mentions as many shapes and colours as there are things, no "a star" without its colour."""
    shapes = {
        word: plain for plain in ("circle", "square", "triangle", "star", "ring", "cross") for word in SYNONYMS[plain]
    }
    colours = {"red": "red", "green": "green", "blue": "blue", "yellow": "yellow", "white": "white"}
    colours |= dict.fromkeys(SYNONYMS["purple"], "purple")
    ordered = 0
    for index, (scene, _) in enumerate(described["shapes"]):
        looks = {(t.colour, t.shape) for t in scene.things}
        for caption in scene_captions(scene, Random(index)):
            words = caption.replace(",", " ").split()
            pairs = [(colours.get(a), shapes[b]) for a, b in zip(["", *words], words, strict=False) if b in shapes]
            assert set(pairs) == looks, caption
            assert len(scene.things) <= len(pairs) <= len(scene.things) + 1, caption
            if caption.startswith("from"):
                start = words[1] if words[1] != "the" else words[2]
                from_start = np.argsort(-Oracle(scene).along(start))
                assert pairs == [(scene.things[i].colour, scene.things[i].shape) for i in from_start], caption
                ordered += 1
    assert ordered > 10


def test_captions_of_order_and_relation_are_of_one_thing_alone(described: dict) -> None:
    """There are many of either kind, and none is said of two things of a scene."""
    found: Counter[str] = Counter()
    for index, (scene, _) in enumerate(described["shapes"]):
        rng = Random(index)
        said = Counter(
            caption
            for i in range(len(scene.things))
            for caption in set(region_captions(scene, i, rng))
            if expression_kind(caption) in ("order", "relation")
        )
        assert set(said.values()) <= {1}, said
        found.update(map(expression_kind, said))
    assert min(found["order"], found["relation"]) > 100
