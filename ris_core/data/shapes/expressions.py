"""What a referring expression means: little programs, executed on a scene with a margin.

A program is a noun ("red star") and modifiers that compare the things the noun fits ("on the left", "second from the
top", "largest", "next to the blue ring"). Each modifier answers YES, NO or UNSURE for each thing: UNSURE is the band
in which two people might disagree. A program is a fair expression only if one thing answers YES and none is UNSURE.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from random import Random

from ris_core.data.shapes.scenes import Scene, Thing

# Shares of the longest side.
LOCATION_MARGIN = 0.16
ORDER_MARGIN = 0.11
RELATION_MARGIN = 0.125
OFF_CENTRE = 0.14  # where the middle ends and the sides begin
NEARBY = 0.5  # how near "next to" must be

SIZE_RATIO = 1.2  # of the square roots of two areas
HIDDEN_SHARE = 0.06  # of the thing behind, for "behind" and "overlapping"

KINDS = ("attribute", "size", "location", "order", "relation")
TOWARDS = {"left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1)}  # side -> direction, y downwards
CORNERS = tuple(f"{v} {h}" for v in ("top", "bottom") for h in ("left", "right"))
DIRECTIONS = {"left of": "left", "right of": "right", "above": "top", "below": "bottom"}
PLAIN_RELATIONS = ("next to", "farthest from", "overlapping", "behind", "in front of")


class Verdict(Enum):
    """Whether a modifier holds of a thing."""

    NO = "no"
    UNSURE = "unsure"
    YES = "yes"


@dataclass(frozen=True, slots=True)
class Noun:
    """Exact properties; None leaves one open."""

    colour: str | None = None
    shape: str | None = None
    size: str | None = None

    def fits(self, thing: Thing) -> bool:
        return (
            self.colour in (None, thing.colour)
            and self.shape in (None, thing.shape)
            and self.size in (None, thing.size)
        )

    def group(self, scene: Scene) -> list[int]:
        """Give indices of the things this noun fits."""
        return [index for index, thing in enumerate(scene.things) if self.fits(thing)]


@dataclass(frozen=True, slots=True)
class Place:
    """A side, a corner or the middle: the thing must lie there, and a margin more so than the others of its group."""

    where: str
    kind = "location"

    def judge(self, scene: Scene, group: Sequence[int], index: int) -> Verdict:
        margin, central = LOCATION_MARGIN * scene.canvas, OFF_CENTRE * scene.canvas
        if self.where in CORNERS:
            into = [_offset(scene, index, side) for side in self.where.split()]
            return _plainly(max(into) >= central, _band(min(into), margin / 2))
        if self.where == "middle":
            values = {i: -_from_centre(scene, i) for i in {index, *group}}
            plain = -values[index] <= central
        else:
            values = {i: _offset(scene, i, self.where) for i in {index, *group}}
            plain = values[index] >= central
        lead = values.pop(index) - max(values.values(), default=-math.inf)
        return _plainly(plain, _band(lead, margin))


@dataclass(frozen=True, slots=True)
class Rank:
    """The rank-th of the group counted from a side (1 is the outermost)."""

    side: str
    rank: int
    kind = "order"

    def judge(self, scene: Scene, group: Sequence[int], index: int) -> Verdict:
        margin = ORDER_MARGIN * scene.canvas
        leads = [
            _offset(scene, other, self.side) - _offset(scene, index, self.side) for other in group if other != index
        ]
        surely_before = sum(lead >= margin for lead in leads)
        maybe_before = sum(lead > -margin for lead in leads)
        if not surely_before <= self.rank - 1 <= maybe_before:
            return Verdict.NO
        return Verdict.YES if surely_before == maybe_before else Verdict.UNSURE


@dataclass(frozen=True, slots=True)
class Extreme:
    """The largest or the smallest of the group, by the area it covers when nothing hides it."""

    which: str
    kind = "size"

    def judge(self, scene: Scene, group: Sequence[int], index: int) -> Verdict:
        power = 0.5 if self.which == "largest" else -0.5
        rivals = max((scene.areas[i] ** power for i in group if i != index), default=0.0)
        return _band(math.log(scene.areas[index] ** power / rivals) if rivals else math.inf, math.log(SIZE_RATIO))


@dataclass(frozen=True, slots=True)
class Relation:
    """How a thing lies to an anchor, which its own noun must single out; the anchor itself is no answer."""

    relation: str
    anchor: Noun
    kind = "relation"

    def judge(self, scene: Scene, group: Sequence[int], index: int) -> Verdict:
        anchors = self.anchor.group(scene)
        if len(anchors) != 1:
            return Verdict.UNSURE
        anchor = anchors[0]
        if index == anchor:
            return Verdict.NO
        if self.relation in DIRECTIONS:
            return _direction(scene, index, anchor, DIRECTIONS[self.relation])
        if self.relation == "behind":
            return _covering(scene.hidden[index][anchor])
        if self.relation == "in front of":
            return _covering(scene.hidden[anchor][index])
        if self.relation == "overlapping":
            return _covering(max(scene.hidden[index][anchor], scene.hidden[anchor][index]))
        sign = -1 if self.relation == "next to" else 1
        value = sign * _apart(scene, index, anchor)
        rivals = [sign * _apart(scene, other, anchor) for other in group if other not in (index, anchor)]
        plain = -value <= NEARBY * scene.canvas if sign < 0 else bool(rivals)
        return _plainly(plain, _band(value - max(rivals, default=-math.inf), RELATION_MARGIN * scene.canvas))


@dataclass(frozen=True, slots=True)
class Side:
    """A half of the picture, for sets: whatever lies there, however the others of its group lie."""

    where: str
    kind = "location"

    def judge(self, scene: Scene, group: Sequence[int], index: int) -> Verdict:
        return _band(_offset(scene, index, self.where), LOCATION_MARGIN / 2 * scene.canvas)


Modifier = Place | Rank | Extreme | Relation | Side


@dataclass(frozen=True, slots=True)
class Program:
    """A noun and its modifiers, all of which must hold; the first modifier names the kind."""

    noun: Noun
    modifiers: tuple[Modifier, ...] = ()

    @property
    def kind(self) -> str:
        if self.modifiers:
            return self.modifiers[0].kind
        return "size" if self.noun.size else "attribute"

    def judge(self, scene: Scene, group: Sequence[int], index: int) -> Verdict:
        """Give the conjunction of the modifiers for one of the `group` of things the noun fits."""
        verdicts = [modifier.judge(scene, group, index) for modifier in self.modifiers]
        if Verdict.NO in verdicts:
            return Verdict.NO
        return Verdict.UNSURE if Verdict.UNSURE in verdicts else Verdict.YES


def solve(program: Program, scene: Scene) -> int | None:
    """Give the index of the one thing the program means; None if it means none, several, or is a matter of opinion."""
    group = program.noun.group(scene)
    answer = None
    for index in group:
        verdict = program.judge(scene, group, index)
        if verdict is Verdict.UNSURE or (verdict is Verdict.YES and answer is not None):
            return None
        if verdict is Verdict.YES:
            answer = index
    return answer


def propose(kind: str, scene: Scene, target: int, relations: Sequence[str], rng: Random) -> Program | None:
    """Draw a program of one kind that might mean `target`; None where the lot drawn cannot. `solve` decides.

    Kinds other than attribute take a noun that fits several things, so that the modifier is needed.
    """
    thing = scene.things[target]
    if kind == "attribute":
        nouns = (Noun(thing.colour, thing.shape), Noun(thing.colour), Noun(None, thing.shape))
        return Program(rng.choices(nouns, (2, 1, 1))[0])
    noun = Noun(rng.choice((None, thing.colour)), rng.choice((None, thing.shape, thing.shape)))
    rivals = len(noun.group(scene))
    if rivals < 2:
        return None
    if kind == "size":
        if rng.random() < 0.5:
            return Program(Noun(noun.colour, noun.shape, thing.size))
        return Program(noun, (Extreme("largest" if thing.size == "large" else "smallest"),))
    if kind == "location":
        return Program(noun, (Place(rng.choice(likely_places(scene, target))),))
    if kind == "order":
        side = rng.choice(tuple(TOWARDS))
        rank = 1 + sum(_offset(scene, i, side) > _offset(scene, target, side) for i in noun.group(scene))
        return Program(noun, (Rank(side, rank),)) if rank == 1 or rank < rivals else None
    relation = propose_relation(scene, target, noun, relations, rng)
    return Program(noun, (relation,)) if relation else None


def propose_relation(scene: Scene, target: int, noun: Noun, relations: Sequence[str], rng: Random) -> Relation | None:
    """Draw a relation that holds of `target` among the things `noun` fits, to some other thing that can be singled out."""
    other = rng.choice([index for index in range(len(scene.things)) if index != target])
    thing = scene.things[other]
    nouns = (
        Noun(thing.colour, thing.shape),
        Noun(thing.colour),
        Noun(None, thing.shape),
        Noun(thing.colour, thing.shape, thing.size),
    )
    anchor = rng.choices(nouns, (4, 1, 2, 1))[0]
    if len(anchor.group(scene)) != 1:
        return None
    group = noun.group(scene)
    true = [r for r in relations if Relation(r, anchor).judge(scene, group, target) is Verdict.YES]
    return Relation(rng.choice(true), anchor) if true else None


def likely_places(scene: Scene, index: int) -> list[str]:
    """Name the places at which a thing lies when one looks at it alone. Never none: what is at no side is in the middle."""
    return [w for w in (*TOWARDS, *CORNERS, "middle") if Place(w).judge(scene, (index,), index) is Verdict.YES]


def _band(score: float, margin: float) -> Verdict:
    if score >= margin:
        return Verdict.YES
    return Verdict.NO if score <= -margin else Verdict.UNSURE


def _plainly(plain: bool, verdict: Verdict) -> Verdict:
    """Open a YES that is not plain to doubt; a NO stays one."""
    return verdict if plain or verdict is Verdict.NO else Verdict.UNSURE


def _offset(scene: Scene, index: int, side: str) -> float:
    """Give the pixels from the middle of the picture towards a side."""
    thing, (dx, dy) = scene.things[index], TOWARDS[side]
    return dx * (thing.x - scene.width / 2) + dy * (thing.y - scene.height / 2)


def _from_centre(scene: Scene, index: int) -> float:
    """Give the pixels along the axis on which the thing is farther off."""
    return max(abs(scene.things[index].x - scene.width / 2), abs(scene.things[index].y - scene.height / 2))


def _apart(scene: Scene, one: int, other: int) -> float:
    a, b = scene.things[one], scene.things[other]
    return math.hypot(a.x - b.x, a.y - b.y)


def _direction(scene: Scene, index: int, anchor: int, side: str) -> Verdict:
    """Give YES within 45 degrees of the direction and a margin away, NO on the other side of the anchor's centre."""
    ahead = _offset(scene, index, side) - _offset(scene, anchor, side)
    if ahead <= 0:
        return Verdict.NO
    aside = math.sqrt(max(_apart(scene, index, anchor) ** 2 - ahead**2, 0.0))
    return Verdict.YES if ahead >= RELATION_MARGIN * scene.canvas and aside <= ahead else Verdict.UNSURE


def _covering(share: float) -> Verdict:
    if share >= HIDDEN_SHARE:
        return Verdict.YES
    return Verdict.NO if share == 0 else Verdict.UNSURE
