"""Masks as COCO polygons: rasterised again they are the mask, holes and all."""

from __future__ import annotations

import numpy as np
import pytest

from ris_core.data import masks
from ris_core.data.outlines import polygons


def disk(height: int, width: int, y: float, x: float, radius: float) -> np.ndarray:
    rows, columns = np.mgrid[:height, :width]
    return np.asarray((rows - y) ** 2 + (columns - x) ** 2 < radius**2)


DISK = disk(90, 130, 40, 60, 30)
SHAPES = {
    "a disk": DISK,
    "a ring": DISK & ~disk(90, 130, 38, 58, 14),
    "two holes": DISK & ~disk(90, 130, 38, 48, 6) & ~disk(90, 130, 38, 70, 7),
    "two pieces": disk(90, 130, 20, 20, 12) | disk(90, 130, 60, 100, 17),
    "an island in a hole": (DISK & ~disk(90, 130, 40, 60, 20)) | disk(90, 130, 40, 60, 8),
    "all of it": np.ones((90, 130), bool),
    "cut by the border": disk(90, 130, 0, 129, 40),
    "a bar": np.pad(np.ones((20, 60), bool), ((35, 35), (35, 35))),
}


@pytest.mark.parametrize("name", SHAPES)
def test_rasterised_they_are_the_mask_again(name: str) -> None:
    mask = SHAPES[name]
    found = polygons(mask)
    counts = masks.segmentation_to_counts(found, *mask.shape)
    again = masks.decode(counts, *mask.shape).astype(bool)
    assert (again ^ mask).sum() <= 0.02 * mask.sum()
    assert all(len(piece) % 2 == 0 and len(piece) >= 6 for piece in found)
    assert len(found) == {"two pieces": 2, "an island in a hole": 2}.get(name, 1)


def test_a_single_pixel_is_an_outline_and_nothing_is_none() -> None:
    mask = np.zeros((5, 6), bool)
    assert polygons(mask) == []
    mask[2, 3] = True
    ((*points,),) = polygons(mask)
    assert np.reshape(points, (-1, 2)).mean(axis=0).tolist() == [3.5, 2.5]


def test_straight_lines_have_no_points_between() -> None:
    (bar,) = polygons(SHAPES["a bar"])
    assert len(bar) == 16, "two points at each cut corner"
