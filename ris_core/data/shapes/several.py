"""Expressions that mean several things of a scene, or none: their meaning, and choosing what to say.

    several   "all red things", "the two stars on the left", "every ring but the blue one", "the red circle and the square"
    none      "the purple star", where there are purple things and stars, but none that is both; "star on the left", where
              all of them are on the right; "all stars above the ring", where they are below it

As with expressions that mean one thing, nobody may be in doubt: a set is said only if each thing of the scene plainly
belongs to it or plainly does not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from ris_core.data.shapes.expressions import (
    DIRECTIONS,
    TOWARDS,
    Extreme,
    Noun,
    Program,
    Rank,
    Relation,
    Side,
    Verdict,
    propose_relation,
    solve,
)
from ris_core.data.shapes.scenes import COLOURS, SHAPES, Scene
from ris_core.data.text import NONE, SEVERAL

# Of the expressions of gRefCOCO 80,022 of 278,232 mean several objects, 32,202 none (Liu, Ding and Jiang, CVPR 2023).
SHARES = {SEVERAL: 80_022 / 278_232, NONE: 32_202 / 278_232}

_OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


@dataclass(frozen=True, slots=True)
class Several:
    """All things that one program fits, but for the one among them that the noun `but` fits; or one thing of each of several."""

    parts: tuple[Program, ...]
    but: Noun | None = None


def meaning(said: Several, scene: Scene) -> frozenset[int] | None:
    """Give the indices of the things that are meant, of which there may be none; None if it is a matter of opinion."""
    if len(said.parts) > 1:
        found = [solve(part, scene) for part in said.parts]
        named = frozenset(index for index in found if index is not None)
        return named if len(named) == len(found) else None
    (program,) = said.parts
    group = program.noun.group(scene)
    verdicts = {index: program.judge(scene, group, index) for index in group}
    if Verdict.UNSURE in verdicts.values():
        return None
    fitting = frozenset(index for index, verdict in verdicts.items() if verdict is Verdict.YES)
    if said.but is None:
        return fitting
    left_out = fitting.intersection(said.but.group(scene))
    return fitting - left_out if len(left_out) == 1 else None


def propose_several(scene: Scene, rng: Random) -> Several | None:
    """Draw what might mean several things of a scene; None where the lot drawn cannot. `meaning` decides."""
    ways: tuple[Callable[[Scene, Random], Several | None], ...] = (_alike, _at_a_side, _beyond, _all_but, _joined)
    return rng.choices(ways, (4, 2, 2, 2, 4))[0](scene, rng)


def propose_none(scene: Scene, rng: Random) -> Several | None:
    """Draw what might mean nothing in a scene, though it speaks of what is there; None where the lot drawn cannot.

    Most are colours and shapes of the scene, exchanged; some a thing that is there, said to be where it is not.
    """
    thing, other = rng.choice(scene.things), rng.choice(scene.things)
    way = rng.choices(("exchanged", "other", "side", "relation"), (6, 2, 2, 2))[0]
    if way == "exchanged":
        return Several((Program(Noun(thing.colour, other.shape)),))
    if way == "other":
        nouns = (Noun(thing.colour, rng.choice(SHAPES)), Noun(rng.choice(tuple(COLOURS)), thing.shape))
        return Several((Program(rng.choice(nouns)),))
    noun = Noun(rng.choice((None, thing.colour)), thing.shape)
    if way == "side":
        return Several((Program(noun, (Side(rng.choice(tuple(TOWARDS))),)),))
    relation = propose_relation(scene, scene.things.index(thing), noun, tuple(DIRECTIONS), rng)
    if relation is None:
        return None
    # All of them have to be plainly on the other side, not just not on this one.
    there = meaning(Several((Program(noun, (relation,)),)), scene)
    if there is None or len(there) < len(noun.group(scene)):
        return None
    return Several((Program(noun, (Relation(_OPPOSITE[relation.relation], relation.anchor),)),))


def _nouns(scene: Scene, rng: Random) -> list[Noun]:
    """List nouns that fit several things of a scene, in random order."""
    thing = rng.choice(scene.things)
    nouns = [
        Noun(colour, shape, size)
        for colour in (None, thing.colour)
        for shape in (None, thing.shape)
        for size in (None, thing.size)
    ]
    fitting = [noun for noun in nouns if len(noun.group(scene)) > 1]
    return rng.sample(fitting, len(fitting))


def _alike(scene: Scene, rng: Random) -> Several | None:
    nouns = [noun for noun in _nouns(scene, rng) if noun != Noun()]
    return Several((Program(nouns[0]),)) if nouns else None


def _at_a_side(scene: Scene, rng: Random) -> Several | None:
    noun = rng.choice((Noun(), _nouns(scene, rng)[0]))
    return Several((Program(noun, (Side(rng.choice(tuple(TOWARDS))),)),))


def _beyond(scene: Scene, rng: Random) -> Several | None:
    noun = _nouns(scene, rng)[0]
    relation = propose_relation(scene, rng.choice(noun.group(scene)), noun, tuple(DIRECTIONS), rng)
    return Several((Program(noun, (relation,)),)) if relation else None


def _all_but(scene: Scene, rng: Random) -> Several | None:
    """Draw a noun that fits three things or more, and what tells one of them from the others."""
    noun = next((noun for noun in _nouns(scene, rng) if not noun.size and len(noun.group(scene)) > 2), None)
    if noun is None:
        return None
    thing = scene.things[rng.choice(noun.group(scene))]
    but = Noun(None if noun.colour else thing.colour, None if noun.shape else thing.shape)
    return Several((Program(noun),), but) if but != Noun() else None


def _joined(scene: Scene, rng: Random) -> Several | None:
    """Draw two things, sometimes three, each with what singles it out in few words."""
    parts = []
    for index in rng.sample(range(len(scene.things)), rng.choice((2, 2, 2, 3))):
        thing = scene.things[index]
        noun = Noun(rng.choice((None, thing.colour, thing.colour)), thing.shape)
        sides = [Program(noun, (Rank(side, 1),)) for side in TOWARDS]
        extremes = [Program(noun, (Extreme(which),)) for which in ("largest", "smallest")]
        plain = len(noun.group(scene)) == 1
        ways: Sequence[Program] = [Program(noun)] if plain else [*sides, *extremes]
        fitting = [program for program in ways if solve(program, scene) == index]
        if not fitting:
            return None
        parts.append(rng.choice(fitting))
    return Several(tuple(parts))
