"""Putting into words what means several things of a scene, or none, the way people type it."""

from __future__ import annotations

from random import Random

from ris_core.data.shapes.expressions import DIRECTIONS, Noun, Program, Relation, Side
from ris_core.data.shapes.several import Several
from ris_core.data.shapes.wording import phrase, say

NUMBERS = {2: "two", 3: "three", 4: "four", 5: "five"}
PLURALS = {"box": "boxes", "cross": "crosses", "plus": "pluses"}  # of all others with an s


def phrase_several(said: Several, count: int, rng: Random) -> str:
    """Write an expression for `count` things, two or more: "both red stars", "all things left of the ring"."""
    if len(said.parts) > 1:
        return _joined(said, rng)
    (program,) = said.parts
    if said.but is not None:
        return _all(program, None, rng) + f" {rng.choice(('but', 'except', 'except for'))} {_exception(said, rng)}"
    return _all(program, count, rng)


def phrase_none(said: Several, rng: Random) -> str:
    """Write an expression that sounds as if there were one such thing, or sometimes several."""
    (program,) = said.parts
    if rng.random() < 0.25:
        return _all(program, None, rng)
    if not program.modifiers:
        return phrase(program, rng)
    return rng.choice(("", "", "the ")) + _words(program.noun, 1, rng) + _whereabouts(program, rng)


def _joined(said: Several, rng: Random) -> str:
    """Write "the red circle and the blue square"; without articles only where no colour could be meant for both."""
    parts = [phrase(part, rng).removeprefix("the ") for part in said.parts]
    if any(part.noun.colour is None for part in said.parts) or rng.random() < 0.6:
        parts = [f"the {part}" for part in parts]
    return ", ".join(parts[:-1]) + f" and {parts[-1]}"


def _all(program: Program, count: int | None, rng: Random) -> str:
    """Write "all red stars on the left". A `count`, which only what is there has, may be told."""
    noun, where = program.noun, _whereabouts(program, rng)
    if noun == Noun() and rng.random() < 0.5:
        return f"everything{where}"
    several = _words(noun, 2, rng) + where
    forms = [f"all {several}", f"all the {several}", f"{rng.choice(('every', 'each'))} {_words(noun, 1, rng)}{where}"]
    if count is not None:
        number = NUMBERS[count]
        forms += [f"the {several}", several, f"the {number} {several}", f"{number} {several}"]
        forms += [f"both {several}"] * 2 if count == 2 else [f"all {number} {several}"]
    return rng.choice(forms)


def _words(noun: Noun, count: int, rng: Random) -> str:
    words = [say(word, rng) for word in (noun.size, noun.colour) if word]
    anything = ("one", "thing", "object", "shape") if words else ("thing", "object", "shape")
    last = say(noun.shape, rng) if noun.shape else rng.choice(anything)
    return " ".join([*words, last if count == 1 else PLURALS.get(last, f"{last}s")])


def _whereabouts(program: Program, rng: Random) -> str:
    if not program.modifiers:
        return ""
    (modifier,) = program.modifiers
    if isinstance(modifier, Side):
        if modifier.where in ("left", "right"):
            return rng.choice((f" on the {modifier.where}", f" on the {modifier.where} side", f" on {modifier.where}"))
        return rng.choice(
            (f" at the {modifier.where}", f" in the {'upper' if modifier.where == 'top' else 'lower'} half")
        )
    assert isinstance(modifier, Relation)
    assert modifier.relation in DIRECTIONS
    return f" {say(modifier.relation, rng)} the {_words(modifier.anchor, 1, rng)}"


def _exception(said: Several, rng: Random) -> str:
    """Name what is left out by what the others have not: "the red one", where all are stars."""
    assert said.but is not None
    noun = said.but
    if noun.shape is None and noun.colour is not None:
        return f"the {say(noun.colour, rng)} one"
    return f"the {_words(noun, 1, rng)}"
