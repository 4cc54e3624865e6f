import numpy as np
import pytest
from pycocotools import mask as coco_mask
from refer_fixture import OVERLAPPING

from ris_core.data import masks
from ris_core.errors import DataError


def random_masks() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    found = [np.zeros((3, 5), np.uint8), np.ones((3, 5), np.uint8), np.eye(1, dtype=np.uint8)]
    for _ in range(200):
        height, width = rng.integers(1, 70, 2)
        found.append((rng.random((height, width)) < rng.random() ** 3).astype(np.uint8))
    large = np.zeros((480, 640), np.uint8)
    large[100:300, 200:203] = large[7:9, 500:] = (
        1  # long runs beside short ones: numbers of several digits and both signs
    )
    return [*found, large]


def test_masks_survive_the_round_trip_and_agree_with_coco() -> None:
    for mask in random_masks():
        counts = masks.encode(mask)
        assert counts.encode() == coco_mask.encode(np.asfortranarray(mask))["counts"]
        decoded = masks.decode(counts, *mask.shape)
        assert decoded.dtype == np.uint8
        assert decoded.flags["C_CONTIGUOUS"]
        np.testing.assert_array_equal(decoded, mask)
        assert masks.area(counts, *mask.shape) == mask.sum()


def test_every_nonzero_value_is_foreground() -> None:
    mask = np.array([[0, 1, 2], [254, 0, 255]], np.uint8)
    np.testing.assert_array_equal(masks.decode(masks.encode(mask), 2, 3), mask != 0)
    assert masks.encode(mask != 0) == masks.encode(mask)


@pytest.mark.parametrize("mask", [np.zeros((2, 2)), np.zeros((1, 2, 2), bool), np.zeros((0, 4), bool)])
def test_encode_refuses_what_is_no_mask(mask: np.ndarray) -> None:
    with pytest.raises(DataError, match="must be \\(H, W\\)"):
        masks.encode(mask)


@pytest.mark.parametrize("counts", ["", "0", "5", "04", "0a", "0`", "0d2", "0d0\x7f", "0d0 ", "é", "P" * 30, "0d0"])
def test_decode_refuses_counts_that_do_not_fill_the_image(counts: str) -> None:
    size = (5, 5) if counts == "0d0" else (4, 5)  # 0d0 is twenty pixels of foreground
    with pytest.raises(DataError, match="does not describe"):
        masks.decode(counts, *size)
    with pytest.raises(DataError, match="does not describe"):
        masks.area(counts, *size)


def test_parts_are_united_not_summed() -> None:
    union = masks.decode(masks.segmentation_to_counts(OVERLAPPING, 80, 100), 80, 100)
    parts = [masks.decode(masks.segmentation_to_counts([part], 80, 100), 80, 100) for part in OVERLAPPING]
    assert (parts[0] & parts[1]).sum() == 100  # 10 by 10 pixels
    np.testing.assert_array_equal(union, parts[0] | parts[1])


def test_all_segmentation_forms_give_the_same_counts() -> None:
    mask = masks.decode(masks.segmentation_to_counts(OVERLAPPING, 80, 100), 80, 100)
    counts = masks.encode(mask)
    flat = mask.T.ravel()
    edges = np.flatnonzero(np.diff(np.concatenate(([0], flat, [2]))))  # 2 closes the last run
    runs = np.diff(np.concatenate(([0], edges))).tolist()
    uncompressed = {"size": [80, 100], "counts": runs}
    compressed = {"size": [80, 100], "counts": counts}
    empty = {"size": [80, 100], "counts": [8000]}
    for segmentation in (OVERLAPPING, uncompressed, compressed, [compressed], [compressed, uncompressed, empty]):
        assert masks.segmentation_to_counts(segmentation, 80, 100) == counts


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ([], "found \\[\\]"),
        (None, "found None"),
        ([[]], "part 1 of 1: degenerate polygon of 0 numbers"),
        ([*OVERLAPPING, [1, 2, 3, 4]], "part 3 of 3: degenerate polygon of 4 numbers"),
        ([[1, 2, 3, 4, 5, 6, 7]], "degenerate polygon of 7 numbers"),
        ([[1, 2, 3, 4, 5, "6"]], "not only numbers"),
        ([[1, 2, 3, 4, 5, True]], "not only numbers"),
        ([[1, 2, 3, 4, 5, float("nan")]], "far outside the 100x80 image"),
        ([[1, 2, 3, 4, 5, 1e9]], "far outside the 100x80 image"),
        ([[1, 2, 3, 4, 5, 10**400]], "far outside the 100x80 image"),
        ([7], "expected a polygon or run lengths, found 7"),
        ({"counts": "0d0"}, "size None"),
        ({"size": [100, 80], "counts": [8000]}, "size \\[100, 80\\] \\(height, width\\), the image is \\[80, 100\\]"),
        ({"size": [80, 100], "counts": [8000, 1]}, "do not sum to 80x100"),
        ({"size": [80, 100], "counts": [9000, -1000]}, "do not sum to 80x100"),
        ({"size": [80, 100], "counts": "0d0"}, "does not describe 80x100"),
        ({"size": [80, 100], "counts": 5}, "must be text or a list of integers"),
    ],
)
def test_unusable_segmentations_are_named(segmentation: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        masks.segmentation_to_counts(segmentation, 80, 100)


def test_all_bad_parts_are_named_at_once() -> None:
    with pytest.raises(DataError, match=r"part 1 of 3: .* of 2 numbers.*; part 3 of 3: .* of 4 numbers"):
        masks.segmentation_to_counts([[1, 2], *OVERLAPPING[:1], [1, 2, 3, 4]], 80, 100)
