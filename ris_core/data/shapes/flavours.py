"""The embedded flavours, and choosing what to say about each thing of a scene.

`shapes` allows location words as refcoco does, `shapes+` none as refcoco+, on the same pictures, and `shapesg` has long
sentences as refcocog, on pictures of its own. `shapes*` is to `shapes` what gRefCOCO is to RefCOCO: the same pictures, where
expressions may also mean several things or none.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from random import Random

from ris_core.data.shapes.expressions import (
    DIRECTIONS,
    PLAIN_RELATIONS,
    Place,
    Program,
    Rank,
    Relation,
    Verdict,
    likely_places,
    propose,
    propose_relation,
    solve,
)
from ris_core.data.shapes.scenes import ROUND, SHAPES, Scene
from ris_core.data.shapes.several import SHARES, Several, meaning, propose_none, propose_several
from ris_core.data.shapes.several_words import phrase_none, phrase_several
from ris_core.data.shapes.wording import clean, long_phrase, phrase, typed
from ris_core.data.text import NONE, SEVERAL

LONG_WORDS = (8, 15)  # least and most words of a long expression
# The shapes of a split's refs; those of the other splits are any.
FOCUS = {"testA": ROUND, "testB": tuple(shape for shape in SHAPES if shape not in ROUND)}

ARTICLES = ("a", "an", "the")  # two expressions that differ by these only are alike

_ROUNDS = 5  # how often each kind is come back to while a target lacks sentences
_TRIES = 6  # lots drawn each time
_SET_TRIES = 60  # lots drawn for the sets of a scene, for each expression wanted


@dataclass(frozen=True, slots=True)
class Flavour:
    """What sets one dataset apart. Flavours of one family share their pictures; kinds are weights of a lottery.

    The weights are tuned, not the shares that come out: many things have no order or size to speak of, all have a look.
    """

    name: str
    split_by: str
    splits: tuple[str, ...]
    family: int
    relations: tuple[str, ...]
    kinds: dict[str, float]
    long: bool = False
    generalised: bool = False


_UNC = ("train", "val", "testA", "testB")
_UMD = ("train", "val", "test")
_ALL = (*DIRECTIONS, *PLAIN_RELATIONS)
_SHAPES_KINDS = {"attribute": 1.0, "size": 0.7, "location": 1.1, "order": 0.3, "relation": 1.8}
_PLUS_KINDS = {"attribute": 0.5, "size": 1.2, "relation": 3.0}
_LONG_KINDS = {"attribute": 0.25, "size": 0.5, "location": 1.0, "order": 0.45, "relation": 2.5}
FLAVOURS = {
    "shapes": Flavour("shapes", "unc", _UNC, 1, _ALL, _SHAPES_KINDS),
    "shapes+": Flavour("shapes+", "unc", _UNC, 1, PLAIN_RELATIONS, _PLUS_KINDS),
    "shapesg": Flavour("shapesg", "umd", _UMD, 2, _ALL, _LONG_KINDS, long=True),
    "shapes*": Flavour("shapes*", "unc", _UNC, 1, _ALL, _SHAPES_KINDS, generalised=True),
}


@dataclass(frozen=True, slots=True)
class Expression:
    """A program, what singles out the one thing of its scene that it means (kind), and its words.

    What means several things or none is of the kind `several` or `none`.
    raw is the text as typed, tokens what is left of it after cleaning.
    """

    program: Program | Several
    kind: str
    raw: str
    tokens: tuple[str, ...]

    @property
    def essence(self) -> tuple[str, ...]:
        """Give what tells expressions apart."""
        return tuple(token for token in self.tokens if token not in ARTICLES)


def describe(
    scene: Scene, targets: Iterable[int], flavour: Flavour, counts: tuple[int, int], rng: Random
) -> dict[int, list[Expression]]:
    """Give each target between counts[0] and counts[1] expressions, of different kinds while there are any.

    No two in a scene are alike, also between targets. A target of which little can be said has fewer; one of which
    nothing can be said without doubt is left out.
    """
    used: set[tuple[str, ...]] = set()
    described = {}
    for target in targets:
        wanted = rng.randint(*counts)
        kinds = sorted(flavour.kinds, key=lambda kind: rng.random() ** (1 / flavour.kinds[kind]), reverse=True)
        found: list[Expression] = []
        for kind in kinds * _ROUNDS:
            if len(found) == wanted:
                break
            expression = _express(kind, scene, target, flavour, rng)
            if expression and expression.essence not in used:
                used.add(expression.essence)
                found.append(expression)
        if found:
            described[target] = found
    return described


def describe_sets(
    scene: Scene, single: Iterable[Expression], most: int, rng: Random
) -> list[tuple[tuple[int, ...], list[Expression]]]:
    """Give sets of things of a scene, at last the empty one, each with 1 to `most` expressions, or more about nothing.

    There are as many as gRefCOCO has for so many `single` expressions, on average; none says the same as another one or as
    one of those.
    """
    used = {expression.essence for expression in single}
    wanted = {kind: len(used) * share / (1 - sum(SHARES.values())) for kind, share in SHARES.items()}
    found: dict[frozenset[int], list[Expression]] = {}
    for kind, number in ((SEVERAL, wanted[SEVERAL]), (NONE, wanted[NONE])):
        waiting = int(number + rng.random())
        for _ in range(_SET_TRIES * waiting):
            if not waiting:
                break
            said = propose_several(scene, rng) if kind == SEVERAL else propose_none(scene, rng)
            meant = None if said is None else meaning(said, scene)
            if said is None or meant is None or (len(meant) < 2 if kind == SEVERAL else meant):
                continue
            text = phrase_several(said, len(meant), rng) if kind == SEVERAL else phrase_none(said, rng)
            raw = typed(text, rng)
            expression = Expression(said, kind, raw, tuple(clean(raw)))
            about = found.setdefault(meant, [])
            if expression.essence not in used and (kind == NONE or len(about) < most):
                used.add(expression.essence)
                about.append(expression)
                waiting -= 1
    return [(tuple(sorted(meant)), said) for meant, said in found.items() if said]


def _express(kind: str, scene: Scene, target: int, flavour: Flavour, rng: Random) -> Expression | None:
    for _ in range(_TRIES):
        program = propose(kind, scene, target, flavour.relations, rng)
        if program is None or solve(program, scene) != target:
            continue
        if not flavour.long:
            raw = typed(phrase(program, rng), rng)
            return Expression(program, kind, raw, tuple(clean(raw)))
        program = _elaborate(program, scene, target, flavour, rng)
        raw = typed(long_phrase(program, rng), rng, finished=True)
        tokens = tuple(clean(raw, keep_commas=True))
        if LONG_WORDS[0] <= len(tokens) <= LONG_WORDS[1]:
            return Expression(program, kind, raw, tokens)
    return None


def _elaborate(program: Program, scene: Scene, target: int, flavour: Flavour, rng: Random) -> Program:
    """Add to a program that singles out its target up to two places or relations that hold of the target too."""
    modifiers = program.modifiers
    anchors = [modifier.anchor.group(scene) for modifier in modifiers if isinstance(modifier, Relation)]
    relation = propose_relation(scene, target, program.noun, flavour.relations, rng)
    if relation and relation.anchor.group(scene) not in anchors:
        modifiers += (relation,)
    placed = any(isinstance(modifier, Place | Rank) for modifier in modifiers)
    if not placed and (relation is None or rng.random() < 0.4):
        place = Place(rng.choice(likely_places(scene, target)))
        holds = place.judge(scene, program.noun.group(scene), target) is Verdict.YES
        modifiers += (place,) if holds else ()
    return Program(program.noun, modifiers)
