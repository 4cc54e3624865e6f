"""Pictures have the right size and show the mask where it is."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from ris_core.evaluation.figures import PREDICTED, TRUTH, captioned, grid, outline, overlay


def square(height: int = 20, width: int = 30) -> np.ndarray:
    mask = np.zeros((height, width), bool)
    mask[5:15, 10:20] = True
    return mask


def test_an_outline_is_the_rim_of_a_mask() -> None:
    rim = outline(square())
    assert rim.sum() == 36
    assert not rim[6:14, 11:19].any()
    assert outline(square(), width=2).sum() == 36 + 28
    assert not outline(np.zeros((4, 4), bool)).any()


def test_the_images_own_border_is_no_outline() -> None:
    assert not outline(np.ones((6, 8), bool)).any()


def test_an_overlay_tints_the_mask_and_draws_both_rims() -> None:
    rgb = np.full((20, 30, 3), 100, np.uint8)
    truth = np.zeros((20, 30), bool)
    truth[1:4, 1:4] = True
    pixels = np.asarray(overlay(rgb, square(), truth))
    assert pixels.shape == (20, 30, 3)
    assert (pixels[outline(square())] == PREDICTED).all()
    assert (pixels[outline(truth)] == TRUTH).all()
    inside = pixels[10, 15]
    assert inside.tolist() == [int(0.55 * 100 + 0.45 * channel) for channel in PREDICTED]
    untouched = ~square() & ~truth
    assert (pixels[untouched] == 100).all()
    assert (rgb == 100).all(), "the image given is not drawn upon"


def test_small_images_can_be_enlarged() -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    picture = overlay(rgb, np.zeros((20, 30), bool), scale=3)
    assert picture.size == (90, 60)
    assert (np.asarray(picture)[::3, ::3] == rgb).all()


@pytest.mark.parametrize("width", [4, 12, 40, 200])
def test_a_caption_is_cut_to_fit(width: int) -> None:
    picture = Image.new("RGB", (width, 10), "red")
    made = captioned(picture, "the large blue star to the left of the ring")
    assert made.size == (width, 28)
    assert made.getpixel((1, 1)) == (255, 0, 0)
    below = np.asarray(made)[10:]
    assert (below[:, -1] == 255).all()
    if width >= 40:
        assert (below < 128).any(), "there is writing"


def test_a_grid_lays_pictures_row_by_row() -> None:
    pictures = [Image.new("RGB", (10, 8), colour) for colour in ("red", "lime", "blue")]
    sheet = grid(pictures, columns=2, gap=4)
    assert sheet.size == (24, 20)
    assert [sheet.getpixel(at) for at in ((1, 1), (15, 1), (1, 13), (15, 13), (11, 1))] == [
        (255, 0, 0),
        (0, 255, 0),
        (0, 0, 255),
        (255, 255, 255),
        (255, 255, 255),
    ]
