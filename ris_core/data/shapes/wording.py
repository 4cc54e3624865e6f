"""Putting programs into words, the way people type them, and captions that tell what a scene shows.

`phrase` writes short expressions as on RefCOCO and RefCOCO+, `long_phrase` full ones as on RefCOCOg; `typed` adds the
capitals, digits, dots and slips of the keyboard of REFER's `raw` field; `clean` makes the tokens of `sent` of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from random import Random

from ris_core.data.shapes.expressions import (
    DIRECTIONS,
    ORDER_MARGIN,
    PLAIN_RELATIONS,
    TOWARDS,
    Extreme,
    Noun,
    Place,
    Program,
    Rank,
    Relation,
    likely_places,
    propose,
    propose_relation,
    solve,
)
from ris_core.data.shapes.scenes import Scene

# The first word is the plain one; the others are drawn one time in four.
SYNONYMS = {
    "circle": ("circle", "ball", "disc"),
    "square": ("square", "box"),
    "triangle": ("triangle",),
    "star": ("star",),
    "ring": ("ring", "donut"),
    "cross": ("cross", "plus"),
    "purple": ("purple", "violet"),
    "small": ("small", "little"),
    "large": ("large", "big"),
    "smallest": ("smallest", "tiniest"),
    "largest": ("largest", "biggest"),
    "middle": ("middle", "center"),
    "above": ("above", "over"),
    "below": ("below", "under", "beneath"),
    "left of": ("left of", "to the left of", "on the left of"),
    "right of": ("right of", "to the right of", "on the right of"),
    "next to": ("next to", "closest to", "beside", "near"),
    "farthest from": ("farthest from", "furthest from"),
    "overlapping": ("overlapping",),
    "behind": ("behind", "partly behind", "partly hidden by"),
    "in front of": ("in front of", "covering"),
}
ORDINALS = ("first", "second", "third", "fourth", "fifth")
DIGITS = {"1st": "first", "2nd": "second", "3rd": "third", "4th": "fourth", "5th": "fifth"}
_SIDE_WORDS = (
    "left right top bottom middle center centre upper lower up down above below over under beneath corner side edge"
)
_ORDER_WORDS = "leftmost rightmost topmost highest lowest first second third fourth fifth last"
# What no expression of the flavour without location words may contain.
LOCATION_WORDS = frozenset(f"{_SIDE_WORDS} {_ORDER_WORDS}".split())

_OUTERMOST = {"left": "leftmost", "right": "rightmost", "top": "highest", "bottom": "lowest"}
_SYNONYM_SHARE = 0.25
_SLIP_SHARE = 0.025
_LOTS = 4  # drawn for a caption that tells a thing from its like


def phrase(program: Program, rng: Random) -> str:
    """Write a short expression, few articles: "left red star", "2nd ring from the left", "star next to the blue box"."""
    noun = _noun(program.noun, rng)
    if not program.modifiers:
        return rng.choice((noun, noun, f"the {noun}"))
    modifier = program.modifiers[0]
    if isinstance(modifier, Place):
        return _place(modifier.where, program.noun, noun, rng)
    if isinstance(modifier, Rank):
        return _rank(modifier, program.noun, noun, rng)
    if isinstance(modifier, Extreme):
        return rng.choice(("", "", "the ")) + f"{say(modifier.which, rng)} {noun}"
    assert isinstance(modifier, Relation)  # sides are of sets alone
    the = rng.choice(("", "the ", "the "))
    return rng.choice(("", "", "", "the ")) + f"{noun} {say(modifier.relation, rng)} {the}{_noun(modifier.anchor, rng)}"


def long_phrase(program: Program, rng: Random) -> str:
    """Write a full expression: "the red star in the top left corner of the picture that is above the ring"."""
    front: list[str] = []
    places: list[str] = []
    relations: list[str] = []
    for modifier in program.modifiers:
        if isinstance(modifier, Extreme):
            front.append(say(modifier.which, rng))
        elif isinstance(modifier, Rank):
            front.append(ORDINALS[modifier.rank - 1])
            places.append(f"from the {modifier.side}" + rng.choice((" side of the picture", " of the image", "")))
        elif isinstance(modifier, Place):
            places.append(rng.choice(("", "", "located ", "that is ")) + _full_place(modifier.where, rng))
        elif isinstance(modifier, Relation):
            anchor = _with_article(_noun(modifier.anchor, rng, bare=False), rng)
            relations.append(f"{say(modifier.relation, rng)} {anchor}")
    noun = " ".join([*front, _noun(program.noun, rng, bare=False)])
    text = " ".join([f"the {noun}" if front else _with_article(noun, rng), *places])
    if relations:
        link = rng.choice(("that is ", "which is ", "that sits ", ""))
        text += rng.choice((" ", " ", ", ")) + link + " and ".join(relations)
    return text


def typed(text: str, rng: Random, finished: bool = False) -> str:
    """Give the text as somebody typed it; most `finished` sentences begin with a capital and end with a dot."""
    for digits, word in DIGITS.items():
        if word in text and rng.random() < 0.3:
            text = text.replace(word, digits)
    if rng.random() < _SLIP_SHARE:
        text = _slip(text, rng)
    if rng.random() < (0.7 if finished else 0.12):
        text = text[0].upper() + text[1:]
    elif rng.random() < 0.03:
        text = text.upper()
    return text + "." if rng.random() < (0.6 if finished else 0.08) else text


def clean(raw: str, keep_commas: bool = False) -> list[str]:
    """Give tokens of a raw expression as REFER cleans them: lower case, "2nd" becomes "second", the final dot goes.

    Commas go too as in refcoco, or become tokens as in refcocog.
    """
    text = raw.lower().rstrip(".").replace(",", " , " if keep_commas else " ")
    return [DIGITS.get(token, token) for token in text.split()]


def scene_captions(scene: Scene, rng: Random) -> list[str]:
    """Write three true captions that each name every thing by colour and shape, with some sizes, places and relations."""
    return [_listing(scene, rng), _procession(scene, rng) or _listing(scene, rng), _tale(scene, rng)]


def region_captions(scene: Scene, index: int, rng: Random) -> list[str]:
    """Write true captions of one thing: how it looks, half the time where it is, and what tells it from its like."""
    captions = [_with_article(_described(scene, index, rng, 0.6), rng)]
    if rng.random() < 0.5:
        captions.append(_placed(scene, index, rng))
    return captions + _told_apart(scene, index, rng)


def say(word: str, rng: Random) -> str:
    """Give a word or one of its synonyms."""
    plain, *others = SYNONYMS.get(word, (word,))
    return rng.choice(others) if others and rng.random() < _SYNONYM_SHARE else plain


def _noun(noun: Noun, rng: Random, bare: bool = True) -> str:
    """Give the words of a noun in their order; `bare` may leave out the "one" of "red one"."""
    words = [say(word, rng) for word in (noun.size, noun.colour) if word]
    if noun.shape:
        words.append(say(noun.shape, rng))
    elif not (bare and words and rng.random() < 0.25):
        words.append(rng.choice(("one", "one", "thing", "object", "shape")))
    return " ".join(words)


def _place(where: str, noun: Noun, words: str, rng: Random) -> str:
    if where == "middle":
        spot = say(where, rng)
        forms = [f"{spot} {words}", f"{words} in the {spot}", f"{words} in {spot}", f"the {words} in the {spot}"]
    elif " " in where:
        vertical, side = where.split()
        spot = f"{rng.choice((vertical, vertical, 'upper' if vertical == 'top' else 'lower'))} {side}"
        forms = [
            f"{spot} {words}",
            f"{words} {spot}",
            f"{words} in the {spot}",
            f"{words} at {spot}",
            f"{spot} corner {words}",
        ]
    elif where in ("left", "right"):
        spot = where
        forms = [
            f"{where} {words}",
            f"{where} {words}",
            f"{words} on the {where}",
            f"{words} on {where}",
            f"{words}, {where}",
        ]
        forms += [f"{words} on the {where} side", f"{where} side {words}"]
    else:
        spot = rng.choice((where, where, "upper" if where == "top" else "lower"))
        forms = [
            f"{spot} {words}",
            f"{where} {words}",
            f"{words} at the {where}",
            f"{words} at {where}",
            f"the {spot} {words}",
        ]
    if noun == Noun():
        forms += [spot, f"{spot} one", spot]
    return rng.choice(forms)


def _rank(modifier: Rank, noun: Noun, words: str, rng: Random) -> str:
    side, ordinal = modifier.side, ORDINALS[modifier.rank - 1]
    the = rng.choice(("the ", ""))
    forms = [
        f"{ordinal} {words} from {the}{side}",
        f"{words} {ordinal} from {the}{side}",
        f"the {ordinal} {words} from the {side}",
    ]
    if noun == Noun():
        forms.append(f"{ordinal} from {the}{side}")
    if modifier.rank == 1:
        forms += [f"{_OUTERMOST[side]} {words}"] * 3
        forms += [f"{words} farthest {side}", f"far {side} {words}"] if side in ("left", "right") else []
    return rng.choice(forms)


def _full_place(where: str, rng: Random) -> str:
    picture = rng.choice(("picture", "image", "photo"))
    if where == "middle":
        return f"in the {say(where, rng)} of the {picture}"
    if " " in where:
        return rng.choice((f"in the {where} corner of the {picture}", f"at the {where} of the {picture}"))
    if where in ("left", "right"):
        return rng.choice((f"on the {where} side of the {picture}", f"on the {where} of the {picture}"))
    return rng.choice((f"at the {where} of the {picture}", f"near the {where} of the {picture}"))


def _with_article(noun: str, rng: Random) -> str:
    if rng.random() < 0.5:
        return f"the {noun}"
    vowel = noun[0] in "aeiou" and not noun.startswith("one")
    return f"{'an' if vowel else 'a'} {noun}"


def _slip(text: str, rng: Random) -> str:
    """Swap or lose a letter inside one long word. Short words stay: they would turn into others."""
    words = text.split()
    long = [position for position, word in enumerate(words) if len(word) >= 5]
    if not long:
        return text
    position = rng.choice(long)
    word = words[position]
    at = rng.randrange(1, len(word) - 2)
    words[position] = word[:at] + (word[at + 1] + word[at] if rng.random() < 0.6 else "") + word[at + 2 :]
    return " ".join(words)


def _described(scene: Scene, index: int, rng: Random, size_share: float) -> str:
    thing = scene.things[index]
    return _noun(Noun(thing.colour, thing.shape, thing.size if rng.random() < size_share else None), rng)


def _placed(scene: Scene, index: int, rng: Random) -> str:
    where = rng.choice(likely_places(scene, index))
    preposition = "on" if where in ("left", "right") else "in" if where == "middle" else "at"
    return f"{_with_article(_described(scene, index, rng, 0.3), rng)} {preposition} the {say(where, rng)}"


def _told_apart(scene: Scene, index: int, rng: Random) -> list[str]:
    """Name a thing by its order, by how it lies to another, by its size: each where a lot drawn means it alone."""
    captions = []
    for kind in ("order", "relation", "size"):
        lots = (propose(kind, scene, index, (*DIRECTIONS, *PLAIN_RELATIONS), rng) for _ in range(_LOTS))
        fair = next((lot for lot in lots if lot and solve(lot, scene) == index), None)
        if fair:
            captions.append(phrase(fair, rng))
    return captions


def _listed(parts: Sequence[str], rng: Random) -> str:
    return ", ".join(parts[:-1]) + rng.choice((" and ", ", ")) + parts[-1]


def _listing(scene: Scene, rng: Random) -> str:
    """List every thing in random order, some with a size, one or two with a place."""
    order = rng.sample(range(len(scene.things)), len(scene.things))
    placed = set(rng.sample(order, rng.randint(1, 2)))
    parts = [_placed(scene, i, rng) if i in placed else f"a {_described(scene, i, rng, 0.4)}" for i in order]
    return _listed(parts, rng)


def _procession(scene: Scene, rng: Random) -> str | None:
    """List every thing in its order along one axis, where that is plain: "from left to right a red star, a blue ring"."""
    side, end = rng.choice((("left", "right"), ("right", "left"), ("top", "bottom"), ("bottom", "top")))
    dx, dy = TOWARDS[end]
    along = sorted((dx * t.x + dy * t.y, i) for i, t in enumerate(scene.things))
    if any(b[0] - a[0] < ORDER_MARGIN * scene.canvas for a, b in pairwise(along)):
        return None
    names = [f"a {_described(scene, i, rng, 0.3)}" for _, i in along]
    if rng.random() < 0.5:
        return f"from {side} to {end} {_listed(names, rng)}"
    ranked = [f"{name} {ORDINALS[rank]}" for rank, name in enumerate(names)]
    return f"from the {side}, {_listed(ranked, rng)}"


def _tale(scene: Scene, rng: Random) -> str:
    """Name every thing, two of them by how they lie to each other where that is plain, and sometimes the largest."""
    order = rng.sample(range(len(scene.things)), len(scene.things))
    relation = propose_relation(scene, order[0], Noun(), (*DIRECTIONS, *PLAIN_RELATIONS), rng)
    parts = [f"a {_described(scene, i, rng, 0.3)}" for i in order]
    if relation and solve(Program(Noun(), (relation,)), scene) == order[0]:
        anchor = relation.anchor.group(scene)[0]
        parts = [f"{parts[0]} {say(relation.relation, rng)} {parts[order.index(anchor)]}"] + [
            part for part, i in zip(parts, order, strict=True) if i not in (order[0], anchor)
        ]
    which = rng.choice(("largest", "smallest"))
    extreme = solve(Program(Noun(), (Extreme(which),)), scene)
    if extreme is not None and rng.random() < 0.5:
        parts.append(f"the {say(which, rng)} is the {_described(scene, extreme, rng, 0.0)}")
    return _listed(parts, rng)
