"""Overlaps counted on bits are those counted on pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ris_core.evaluation.overlap import areas, packed, pairwise_overlap


@pytest.mark.parametrize("size", [(17, 9), (8, 8), (1, 1), (3, 640), (5, 13)])
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8])
def test_overlaps_of_all_pairs(size: tuple[int, int], dtype: torch.dtype) -> None:
    random = np.random.default_rng(0)
    first, second = random.random((3, *size)) > 0.5, random.random((4, *size)) > 0.3
    overlap, together = pairwise_overlap(*(packed(torch.from_numpy(some).to(dtype)) for some in (first, second)))
    assert overlap.dtype == together.dtype == np.int64
    for i, a in enumerate(first):
        for j, b in enumerate(second):
            assert (overlap[i, j], together[i, j]) == ((a & b).sum(), (a | b).sum())


def test_areas_count_every_pixel() -> None:
    assert areas(packed(torch.ones(2, 480, 641, dtype=torch.bool))).tolist() == [480 * 641] * 2
    assert areas(packed(torch.zeros(0, 4, 4, dtype=torch.bool))).tolist() == []


def test_masks_that_are_not_laid_out_row_by_row_are_packed_as_they_read() -> None:
    masks = torch.from_numpy(np.random.default_rng(1).random((3, 7, 11)) > 0.5)
    assert np.array_equal(packed(masks.transpose(1, 2)), packed(masks.transpose(1, 2).contiguous()))


def test_no_masks_overlap_with_nothing() -> None:
    some, none = packed(torch.ones(2, 3, 3, dtype=torch.bool)), packed(torch.ones(0, 3, 3, dtype=torch.bool))
    assert [part.shape for part in pairwise_overlap(some, none)] == [(2, 0)] * 2
