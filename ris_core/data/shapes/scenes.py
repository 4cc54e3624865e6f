"""Scenes of coloured shapes: drawing lots for them, painting them, tracing what is visible of each thing.

A scene is a list of things painted back to front. Each thing is a signed distance field (negative inside, in pixels)
sampled at pixel centres; the picture, the visible masks and the polygons all come from these fields, so that they
cannot disagree. Pixel (row, column) covers [column, column + 1] x [row, row + 1], as COCO counts.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import contourpy
import numpy as np
from PIL import Image

from ris_core.data.outlines import keyhole

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
ROUND = ("circle", "ring")
COLOURS = {
    "red": (213, 45, 42),
    "green": (42, 158, 66),
    "blue": (45, 96, 214),
    "yellow": (242, 203, 42),
    "purple": (148, 62, 190),
    "white": (243, 243, 240),
}
SIZES = {"small": (0.098, 0.129), "large": (0.172, 0.227)}  # radius as a share of the canvas
COUNTS = (3, 4, 5, 5)  # how many things are tried for; some find no room
ASPECTS = ((1.0, 1.0), (1.0, 1.0), (1.0, 0.8), (0.8, 1.0), (1.0, 0.9))  # width, height as shares of the canvas
REACH = {
    "circle": 1.0,
    "square": 1.2,
    "triangle": 1.3,
    "star": 1.25,
    "ring": 1.0,
    "cross": 1.1,
}  # farthest point / radius
MIN_VISIBLE = 0.6

_SHARED_LOOKS = 0.8  # share of the things that take shape or colour from an earlier one
_LARGE_SHARE = 0.35
_LEANING = 0.5  # share of the scenes in which one thing lies partly on another
_TILT = 0.3  # radians
_SPACING = 1.08  # least distance of two centres that do not lean on each other, in sums of their radii
Option = TypeVar("Option")

_BACKDROPS = ((92, 88, 84), (70, 84, 92), (110, 98, 80), (60, 66, 58), (126, 122, 116), (78, 70, 84), (52, 54, 62))
_TOLERANCE = 0.12  # pixels a vertex may lie off its chord to be dropped from a polygon
_SLIVER = 4.0  # visible pieces smaller than this many square pixels get no polygon


@dataclass(frozen=True, slots=True)
class Thing:
    """One object: what it is called and where it lies. x, y, radius in pixels, angle in radians, tint in RGB 0..255."""

    shape: str
    colour: str
    size: str
    x: float
    y: float
    radius: float
    angle: float
    tint: tuple[float, float, float]


@dataclass(frozen=True, slots=True, eq=False)
class Field:
    """Signed distance (h, w) float64 of one thing on a window of the picture whose first pixel is (top, left)."""

    top: int
    left: int
    distance: np.ndarray

    @property
    def window(self) -> tuple[slice, slice]:
        h, w = self.distance.shape
        return slice(self.top, self.top + h), slice(self.left, self.left + w)


@dataclass(frozen=True, slots=True, eq=False)
class Scene:
    """Things back to front with what follows from their fields.

    owner (H, W) int8 is the index of the topmost thing at each pixel, -1 for the background; areas are whole pixel
    counts, hidden parts included; hidden[i][j] is the share of thing i's pixels that thing j owns, so that the diagonal
    tells how much of each thing is visible; canvas is the longest side.
    """

    width: int
    height: int
    things: tuple[Thing, ...]
    fields: tuple[Field, ...]
    owner: np.ndarray
    areas: tuple[int, ...]
    hidden: tuple[tuple[float, ...], ...]
    canvas: int

    def visible_mask(self, index: int) -> np.ndarray:
        """Mark the pixels at which thing `index` is on top: (H, W) bool."""
        return self.owner == index


def sample_scene(rng: np.random.Generator, canvas: int, focus: Sequence[str] = SHAPES) -> Scene:
    """Draw a scene of 3 to 5 things whose longest side is `canvas` pixels.

    Lots are drawn again until every thing shows at least 60 % of itself and colour and shape alone single out one thing
    at least whose shape is among `focus`, so that something can always be said.
    """
    while True:
        wide, high = _pick(rng, ASPECTS)
        width, height = round(canvas * wide), round(canvas * high)
        things = _draw_things(rng, width, height, focus)
        if len(things) < 3 or not _has_unique_look(things, focus):
            continue
        scene = settle(width, height, things)
        if all(shares[i] >= MIN_VISIBLE for i, shares in enumerate(scene.hidden)):
            return scene


def settle(width: int, height: int, things: Sequence[Thing]) -> Scene:
    """Work out fields, owners and hidden shares of things listed back to front."""
    fields = tuple(_field(thing, width, height) for thing in things)
    owner = np.full((height, width), -1, np.int8)
    for index, field in enumerate(fields):
        owner[field.window][field.distance <= 0] = index
    owners = [np.bincount(owner[f.window][f.distance <= 0], minlength=len(things)) for f in fields]
    areas = tuple(int(counts.sum()) for counts in owners)
    hidden = tuple(tuple((counts / area).tolist()) for counts, area in zip(owners, areas, strict=True))
    return Scene(width, height, tuple(things), fields, owner, areas, hidden, max(width, height))


def _pick(rng: np.random.Generator, options: Sequence[Option]) -> Option:
    return options[int(rng.integers(len(options)))]


def _has_unique_look(things: Sequence[Thing], focus: Sequence[str]) -> bool:
    looks = Counter((thing.colour, thing.shape) for thing in things)
    return any(count == 1 and shape in focus for (_, shape), count in looks.items())


def _draw_things(rng: np.random.Generator, width: int, height: int, focus: Sequence[str]) -> list[Thing]:
    """Draw 3 to 5 things back to front, fewer where there was no room."""
    things: list[Thing] = []
    colours = list(COLOURS)
    leaning = int(rng.integers(1, 5)) if rng.random() < _LEANING else 0
    for index in range(_pick(rng, COUNTS)):
        shape, colour = _pick(rng, SHAPES if things else focus), _pick(rng, colours)
        if things and rng.random() < _SHARED_LOOKS:
            model = _pick(rng, things)
            shape, colour = (model.shape, colour) if rng.random() < 0.5 else (shape, model.colour)
        size = "large" if rng.random() < _LARGE_SHARE else "small"
        radius = float(rng.uniform(*SIZES[size])) * max(width, height)
        spot = _find_spot(rng, things, radius, radius * REACH[shape] + 1, width, height, lean=index == leaning > 0)
        if spot is None:
            continue
        tint = np.clip(np.array(COLOURS[colour]) + rng.uniform(-14, 14, 3), 0, 255).tolist()
        things.append(Thing(shape, colour, size, *spot, radius, float(rng.uniform(-_TILT, _TILT)), tuple(tint)))
    return things


def _find_spot(
    rng: np.random.Generator, things: Sequence[Thing], radius: float, reach: float, width: int, height: int, lean: bool
) -> tuple[float, float] | None:
    """Find a centre inside the picture and clear of the other things, or leaning on one of them."""
    for _ in range(40):
        partner = None
        if lean and things:
            partner = _pick(rng, things)
            turn, away = rng.uniform(0, 2 * math.pi), (partner.radius + radius) * rng.uniform(0.6, 0.9)
            x, y = partner.x + away * math.cos(turn), partner.y + away * math.sin(turn)
            if not (reach <= x <= width - reach and reach <= y <= height - reach):
                continue
        else:
            x, y = rng.uniform(reach, width - reach), rng.uniform(reach, height - reach)
        gaps = (math.hypot(x - t.x, y - t.y) - _SPACING * (radius + t.radius) for t in things if t is not partner)
        if all(gap >= 0 for gap in gaps):
            return float(x), float(y)
    return None


def _field(thing: Thing, width: int, height: int) -> Field:
    reach = thing.radius * REACH[thing.shape] + 4
    left, right = max(0, int(thing.x - reach)), min(width, int(thing.x + reach) + 1)
    top, bottom = max(0, int(thing.y - reach)), min(height, int(thing.y + reach) + 1)
    dx = np.arange(left, right) + 0.5 - thing.x
    dy = (np.arange(top, bottom) + 0.5 - thing.y)[:, None]
    cos, sin = math.cos(thing.angle), math.sin(thing.angle)
    return Field(top, left, _distance(thing.shape, (dx * cos + dy * sin), (dy * cos - dx * sin), thing.radius))


def _distance(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Give the signed distance (h, w) in pixels to an upright shape at the origin, y down; less than it beyond the tips."""
    reach = radius * REACH[shape]
    if shape == "circle":
        return np.hypot(x, y) - radius
    if shape == "ring":
        return np.abs(np.hypot(x, y) - 0.74 * radius) - 0.26 * radius
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - reach / math.sqrt(2)
    if shape == "cross":
        long, short = np.maximum(np.abs(x), np.abs(y)), np.minimum(np.abs(x), np.abs(y))
        return np.maximum(long - 0.95 * reach, short - 0.34 * reach)
    return _spiky(x, y, reach, 3, 0.5) if shape == "triangle" else _spiky(x, y, reach, 5, 0.48)


def _spiky(x: np.ndarray, y: np.ndarray, tip: float, tips: int, valley: float) -> np.ndarray:
    """Make a polygon with `tips` tips at radius `tip` and valleys at `valley * tip` between them, first tip upwards.

    All tips fold onto one by symmetry; what remains is the distance to the one line from that tip to the next valley.
    """
    sector = 2 * math.pi / tips
    fold = np.abs((np.arctan2(x, -y) + sector / 2) % sector - sector / 2)
    reach = np.hypot(x, y)
    vx, vy = valley * tip * math.cos(sector / 2), valley * tip * math.sin(sector / 2)
    return (vy * (reach * np.cos(fold) - tip) + (tip - vx) * reach * np.sin(fold)) / math.hypot(vy, tip - vx)


def paint(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """Paint the picture, (H, W, 3) uint8 RGB: textured background, soft shadows, lit things with a dark rim, grain."""
    picture = _background(rng, scene.width, scene.height)
    for thing, field in zip(scene.things, scene.fields, strict=True):
        d = field.distance.astype(np.float32)
        h, w = d.shape
        shade = picture[
            field.top + 3 : field.top + 3 + h, field.left + 2 : field.left + 2 + w
        ]  # light from the upper left
        shade *= 1 - 0.4 * np.clip(0.6 - d / 5, 0, 1)[: shade.shape[0], : shade.shape[1], None]
        rows = np.arange(h, dtype=np.float32) + (field.top + 0.5 - thing.y)
        light = np.where(d > -1.7, np.float32(0.72), 1.06 - 0.14 * rows[:, None] / thing.radius)
        cover = np.clip(0.5 - d, 0, 1)[..., None]
        under = picture[field.window]
        under += cover * (light[..., None] * np.array(thing.tint, np.float32) - under)
    picture += rng.integers(-9, 10, (scene.height, scene.width, 1), np.int8)
    return np.clip(picture, 0, 255).astype(np.uint8)


def _background(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """Paint (H, W, 3) float32: blotches of a muted colour under stripes, squares or dots."""
    muted = np.array(_pick(rng, _BACKDROPS)) + rng.normal(0, 14, (5, 5, 1)) + rng.normal(0, 9, (5, 5, 3))
    blotches = np.clip(muted, 0, 255)
    image = Image.fromarray(blotches.astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    turn, period = rng.uniform(0, math.pi), rng.uniform(0.05, 0.16) * max(width, height)
    x, y = np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32)[:, None]
    step = np.float32(2 * math.pi / period)
    weave = np.sin((x * math.cos(turn) + y * math.sin(turn)) * step)
    if rng.random() < 0.5:
        weave = weave * np.sin((y * math.cos(turn) - x * math.sin(turn)) * step)
    if rng.random() < 0.5:
        weave = np.sign(weave)
    return np.asarray(image, np.float32) + (weave * np.float32(rng.uniform(0, 10)))[..., None]


def visible_polygons(scene: Scene, index: int) -> list[np.ndarray]:
    """Trace outlines of what is visible of a thing: one (n, 2) float array of x, y per piece, rounded to 2 digits.

    A hole is joined to its outline by a keyhole: the outline, then the hole the other way round, in one list of points.
    """
    field = scene.fields[index]
    inside = -field.distance
    for other in range(index + 1, len(scene.things)):
        if scene.hidden[index][other] > 0:
            _cut(inside, field, scene.fields[other])
    tracer = contourpy.contour_generator(z=inside, fill_type=contourpy.FillType.OuterOffset)
    corner = (field.left + 0.5, field.top + 0.5)
    pieces = []
    for points, offsets in zip(*tracer.filled(0.0, 1e6), strict=True):
        outline, *holes = (_simplify(points[a : b - 1]) for a, b in pairwise(offsets))
        for hole in holes:
            outline = keyhole(outline, hole)
        pieces.append(np.round(outline + corner, 2))
    return [piece for piece in pieces if polygon_area(piece) >= _SLIVER]


def polygon_area(points: np.ndarray) -> float:
    """Give the shoelace area in square pixels of one (n, 2) polygon whose coordinates have 2 digits, as those above.

    It is added up in whole numbers: of floats, the last digit would depend on the processor, and files are named by their bytes.
    """
    x, y = np.rint(100 * np.concatenate([points, points[:1]])).astype(np.int64).T
    return abs(int((x[:-1] * y[1:] - y[:-1] * x[1:]).sum())) / (2 * 100**2)


def _cut(inside: np.ndarray, field: Field, cover: Field) -> None:
    """Take from `inside` (positive within a thing) what lies under `cover`."""
    top, left = max(field.top, cover.top), max(field.left, cover.left)
    bottom = min(field.top + inside.shape[0], cover.top + cover.distance.shape[0])
    right = min(field.left + inside.shape[1], cover.left + cover.distance.shape[1])
    mine = inside[top - field.top : bottom - field.top, left - field.left : right - field.left]
    over = cover.distance[top - cover.top : bottom - cover.top, left - cover.left : right - cover.left]
    np.minimum(mine, over, out=mine)


def _simplify(ring: np.ndarray) -> np.ndarray:
    """Drop vertices that lie on the line between their neighbours, every other one at a time."""
    for _ in range(5):
        around = np.concatenate([ring[-1:], ring, ring[:1]])
        chord, step = around[2:] - around[:-2], ring - around[:-2]
        off = np.abs(chord[:, 0] * step[:, 1] - chord[:, 1] * step[:, 0])
        drop = off < _TOLERANCE * np.hypot(chord[:, 0], chord[:, 1])
        drop[::2] = False
        if len(ring) - drop.sum() < 4:
            break
        ring = ring[~drop]
    return ring
