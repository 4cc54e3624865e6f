"""From masks to polygons, as COCO writes them."""

from __future__ import annotations

from itertools import pairwise

import contourpy
import numpy as np


def polygons(mask: np.ndarray) -> list[list[float]]:
    """Trace the pieces of a mask (H, W), bool: a list of COCO polygons `[x0, y0, x1, y1, ...]` in pixels, none for an empty one.

    Lines run along the borders of pixels, corners cut, so that rasterising gives the mask again but for single pixels. A
    hole is joined to its outline by a keyhole, as COCO's form knows none.
    """
    tracer = contourpy.contour_generator(z=np.pad(mask, 1).astype(np.float32), fill_type=contourpy.FillType.OuterOffset)
    pieces = []
    for points, offsets in zip(*tracer.filled(0.5, 2.0), strict=True):
        outline, *holes = (_without_straight(points[a : b - 1]) for a, b in pairwise(offsets))
        for hole in holes:
            outline = keyhole(outline, hole)
        pieces.append((outline - 0.5).ravel().tolist())  # from the centres of the padded grid to the image's corner
    return pieces


def keyhole(outline: np.ndarray, hole: np.ndarray) -> np.ndarray:
    """Join a hole (m, 2) to the outline (n, 2) around it: the outline, then the hole the other way round, in one list."""
    nearest = int(np.argmin(np.hypot(*(outline - hole[0]).T)))
    outline = np.roll(outline, -nearest, axis=0)
    return np.concatenate([outline, outline[:1], hole, hole[:1]])


def _without_straight(ring: np.ndarray) -> np.ndarray:
    """Leave out the points of a ring (n, 2) between which the line goes straight on."""
    before, after = ring - np.roll(ring, 1, axis=0), np.roll(ring, -1, axis=0) - ring
    bends = before[:, 0] * after[:, 1] != before[:, 1] * after[:, 0]
    return np.asarray(ring[bends])
