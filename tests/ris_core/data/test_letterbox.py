"""The letterbox against arrays made by OpenCV 4.11 and 5.0 with the official CRIS code."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from ris_core.data import letterbox
from ris_core.data.letterbox import (
    BORDER_RGB,
    Mode,
    letterbox_image,
    letterbox_mask,
    letterbox_masks,
    letterbox_matrix,
    unletterbox,
)
from ris_core.errors import ConfigError, DataError
from ris_core.models.clip import normalise

GOLDEN = Path(__file__).parents[2] / "golden"
ARRAYS = np.load(GOLDEN / "cris_transform.npz")
FACTS = json.loads((GOLDEN / "cris_transform.json").read_text())
CASES = ["c0", "c1", "c2", "c3"]
VERSIONS: list[tuple[Mode, str, str]] = [("opencv4", "", "cases_cv4"), ("exact", "cv5/", "cases_cv5")]
WARPED: list[tuple[Mode, str, str]] = [("opencv4", "", "c0"), ("opencv4", "", "c1"), ("exact", "cv5/", "c0")]


@pytest.mark.parametrize("case", CASES)
def test_matrices_equal_opencv_to_the_last_bit(case: str) -> None:
    height, width = ARRAYS[f"{case}/image_rgb"].shape[:2]
    forward, inverse = letterbox_matrix(height, width, 416)
    np.testing.assert_array_equal(forward, ARRAYS[f"{case}/mat"])
    np.testing.assert_array_equal(inverse, ARRAYS[f"{case}/mat_inv"])


@pytest.mark.parametrize(("mode", "prefix", "case"), WARPED)
def test_images_are_within_a_level_of_opencv(mode: Mode, prefix: str, case: str) -> None:
    got = letterbox_image(ARRAYS[f"{case}/image_rgb"], 416, mode).astype(int)
    difference = np.abs(got - ARRAYS[f"{prefix}{case}/warped_rgb_u8"])
    assert difference.max() <= 1
    assert np.count_nonzero(difference) <= 61  # of 519,168: OpenCV's weights are fixed-point


@pytest.mark.parametrize(("mode", "facts"), [(mode, facts) for mode, _, facts in VERSIONS])
@pytest.mark.parametrize("case", CASES)
def test_images_have_the_same_sum_as_with_opencv(case: str, mode: Mode, facts: str) -> None:
    total = int(letterbox_image(ARRAYS[f"{case}/image_rgb"], 416, mode).sum(dtype=np.int64))
    assert abs(total - FACTS[facts][case]["u8_sum"]) <= 61


@pytest.mark.parametrize(("mode", "prefix", "case"), WARPED)
def test_masks_equal_opencv_exactly(mode: Mode, prefix: str, case: str) -> None:
    got = letterbox_mask(ARRAYS[f"{case}/gt_mask"], 416, mode=mode)
    np.testing.assert_array_equal(got, ARRAYS[f"{prefix}{case}/warped_mask_u8"])


@pytest.mark.parametrize("case", ["c0", "c1"])
def test_a_mask_warped_straight_to_the_coarse_grid_is_the_official_target(case: str) -> None:
    coarse = letterbox_mask(ARRAYS[f"{case}/gt_mask"] > 0, 416, stride=4)
    assert coarse.shape == (104, 104)
    assert coarse.dtype == np.uint8
    np.testing.assert_array_equal(coarse.astype(np.float32) / 255, ARRAYS[f"{case}/mask_down_104"])


@pytest.mark.parametrize("case", ["c0", "c1"])
def test_normalised_pixels_equal_the_official_ones(case: str) -> None:
    image = torch.from_numpy(letterbox_image(ARRAYS[f"{case}/image_rgb"], 416))
    got = normalise(image.permute(2, 0, 1)[None])[0, :, 60:124, 120:184]
    want = torch.from_numpy(ARRAYS[f"{case}/norm_crop_60_124__120_184"])
    assert (got - want).abs().max() < 1.01 / 255 / 0.26  # a level
    assert ((got - want).abs() > 1e-5).float().mean() < 1e-3


@pytest.mark.parametrize(("mode", "prefix", "facts"), VERSIONS)
@pytest.mark.parametrize("case", CASES)
def test_predictions_on_the_original_image_equal_opencv(case: str, mode: Mode, prefix: str, facts: str) -> None:
    truth = ARRAYS[f"{case}/gt_mask"] != 0
    height, width = truth.shape
    probabilities = torch.from_numpy(ARRAYS[f"{case}/pred_logits"]).sigmoid()[None]
    full = unletterbox(probabilities, height, width, 416, mode)[0].numpy()

    rows = full.sum(axis=1, dtype=np.float64)
    np.testing.assert_allclose(rows, ARRAYS[f"{prefix}{case}/pred_orig_rowsum"], atol=2e-3)
    if f"{prefix}{case}/pred_orig" in ARRAYS:
        np.testing.assert_allclose(full, ARRAYS[f"{prefix}{case}/pred_orig"], atol=1e-5)
    predicted = full > 0.35
    want = np.unpackbits(ARRAYS[f"{prefix}{case}/pred_bin"])[: height * width].reshape(height, width)
    np.testing.assert_array_equal(predicted, want)
    inter, union = int((predicted & truth).sum()), int((predicted | truth).sum())
    assert (inter, union) == (FACTS[facts][case]["inter"], FACTS[facts][case]["union"])
    assert inter / (union + 1e-6) == FACTS[facts][case]["iou"]


def test_an_image_of_the_right_size_passes_unchanged() -> None:
    random = np.random.default_rng(0)
    image = random.integers(0, 256, (128, 128, 3), dtype=np.uint8)
    mask = random.integers(0, 2, (128, 128), dtype=np.uint8)
    same = letterbox_image(image, 128)
    np.testing.assert_array_equal(same, image)
    assert not np.shares_memory(same, image)
    np.testing.assert_array_equal(letterbox_mask(mask, 128, stride=4), mask[::4, ::4] * 255)
    forward, inverse = letterbox_matrix(128, 128, 128)
    np.testing.assert_array_equal(forward, np.eye(2, 3))
    np.testing.assert_array_equal(inverse, np.eye(2, 3))
    maps = torch.from_numpy(random.random((2, 128, 128), dtype=np.float32))
    torch.testing.assert_close(unletterbox(maps, 128, 128, 128), maps, atol=1e-6, rtol=0)


def test_the_shortcut_for_the_right_size_equals_the_general_path() -> None:
    image = np.random.default_rng(1).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    taps = letterbox._forward_taps(96, 96, 96, 1, "cubic", "opencv4")
    general = letterbox._warp(letterbox._used(image, *taps), *taps, 96, BORDER_RGB)
    np.testing.assert_array_equal(general, image)
    mask = image[:, :, :1] // 128 * 255
    taps = letterbox._forward_taps(96, 96, 96, 4, "linear", "opencv4")
    coarse = letterbox._warp(letterbox._used(mask, *taps), *taps, 24, (0,))
    np.testing.assert_array_equal(coarse, mask[::4, ::4])


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 3000), (3000, 1), (5, 700)])
def test_odd_images_keep_their_shapes(height: int, width: int) -> None:
    image = letterbox_image(np.zeros((height, width, 3), np.uint8), 128)
    assert image.shape == (128, 128, 3)
    assert letterbox_mask(np.ones((height, width), bool), 128, stride=4).shape == (32, 32)
    assert unletterbox(torch.rand(2, 32, 32), height, width, 128).shape == (2, height, width)
    if height != width:
        assert (image[0, 0] == BORDER_RGB).all()


def test_maps_of_half_precision_are_resampled_in_float32() -> None:
    maps = torch.rand(1, 26, 26, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        full = unletterbox(maps, 60, 80, 104)
    assert full.dtype == torch.float32
    torch.testing.assert_close(full, unletterbox(maps.float(), 60, 80, 104), atol=0, rtol=0)


@pytest.mark.filterwarnings("error")
def test_read_only_and_strided_images_are_fine() -> None:
    image = ARRAYS["c0/image_rgb"].copy()
    want = letterbox_image(image, 128)
    mirrored = image[:, ::-1].copy()[:, ::-1]
    mirrored.flags.writeable = False
    np.testing.assert_array_equal(letterbox_image(mirrored, 128), want)


def test_wrong_inputs_are_named() -> None:
    with pytest.raises(DataError, match=r"RGB image \(H, W, 3\) uint8, got \(4, 5\) uint8"):
        letterbox_image(np.zeros((4, 5), np.uint8), 128)
    with pytest.raises(DataError, match="float64"):
        letterbox_image(np.zeros((4, 5, 3)), 128)
    with pytest.raises(DataError, match=r"a mask \(H, W\), got shape \(4, 5, 3\)"):
        letterbox_mask(np.zeros((4, 5, 3), np.uint8), 128)
    with pytest.raises(ConfigError, match="mask stride 3 does not divide the letterbox size 128"):
        letterbox_mask(np.zeros((4, 5), np.uint8), 128, stride=3)
    with pytest.raises(DataError, match="0x5"):
        letterbox_image(np.zeros((0, 5, 3), np.uint8), 128)
    with pytest.raises(DataError, match=r"float maps \(N, h, w\)"):
        unletterbox(torch.zeros(1, 1, 8, 8), 10, 10, 32)


def test_cells_of_a_map_lie_where_its_target_was_sampled() -> None:
    """'grid' keeps the values at pixels 0, 4, 8, ...; 'corners', the official way, stretches the map over them."""
    maps = torch.rand(1, 32, 32, generator=torch.Generator().manual_seed(0))
    full = unletterbox(maps, 128, 128, 128, upsampling="grid")
    torch.testing.assert_close(full[:, ::4, ::4], maps, atol=1e-6, rtol=0)

    y, x = np.mgrid[:128, :128]
    disc = ((y - 105) ** 2 + (x - 105) ** 2 < 14**2).astype(np.uint8)
    target = torch.from_numpy(letterbox_mask(disc, 128, stride=4)[None] / 255)

    def iou(upsampling: str) -> float:
        mask = unletterbox(target, 128, 128, 128, upsampling=upsampling)[0].numpy() > 0.5  # type: ignore[arg-type]
        return float((mask & (disc > 0)).sum() / (mask | (disc > 0)).sum())

    assert iou("grid") > 0.87
    assert iou("corners") < iou("grid") - 0.1


@pytest.mark.parametrize(("height", "width"), [(480, 640), (640, 427), (33, 500), (60, 20)])
@pytest.mark.parametrize("upsampling", ["grid", "corners"])
def test_bands_of_the_matrices_give_what_the_whole_ones_give(
    height: int, width: int, upsampling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    maps = torch.rand(3, 26, 26, generator=torch.Generator().manual_seed(0))
    whole = []
    for band in (letterbox.BAND, 10_000):
        monkeypatch.setattr(letterbox, "BAND", band)
        letterbox._inverse_matrices.cache_clear()
        whole.append(unletterbox(maps, height, width, 104, upsampling=upsampling))  # type: ignore[arg-type]
    letterbox._inverse_matrices.cache_clear()
    torch.testing.assert_close(*whole, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("height", "width"), [(480, 640), (640, 480), (50, 30), (700, 2000)])
def test_strips_change_no_pixel(height: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    expected = letterbox_image(image, 104)
    for strip in (7, 10_000):
        monkeypatch.setattr(letterbox, "STRIP", strip)
        assert np.array_equal(letterbox_image(image, 104), expected)


def test_a_target_looks_at_few_of_a_masks_pixels_wherever_they_lie_in_memory() -> None:
    mask = np.random.default_rng(0).random((480, 640)) > 0.5
    rows, columns = letterbox._forward_taps(480, 640, 416, 4, "linear", "opencv4")
    assert len(rows.used) <= 2 * 104
    assert len(columns.used) <= 2 * 104
    whole = letterbox_mask(mask, 416)[::4, ::4]
    assert np.array_equal(letterbox_mask(mask, 416, 4), whole)
    assert np.array_equal(letterbox_mask(np.asfortranarray(mask), 416, 4), whole)


def test_masks_at_once_are_those_one_by_one() -> None:
    some = [np.random.default_rng(seed).random((60, 90)) > 0.5 for seed in range(3)]
    for size, stride in ((64, 4), (64, 1), (60, 2)):
        for mode in ("opencv4", "exact"):
            together = letterbox_masks(some, size, stride, mode)  # type: ignore[arg-type]
            assert together.shape == (3, size // stride, size // stride)
            for mask, found in zip(some, together, strict=True):
                assert np.array_equal(found, letterbox_mask(mask, size, stride, mode))  # type: ignore[arg-type]
    assert letterbox_masks([], 64, 4).shape == (0, 16, 16)
    with pytest.raises(DataError, match=r"got shape \(60, 90\), \(60, 91\)"):
        letterbox_masks([some[0], np.zeros((60, 91))], 64)
