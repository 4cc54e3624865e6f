"""Mask proposals: they find what is drawn, are the same every time, and say what is missing."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ris_core.errors import ConfigError, DataError, WeightsError
from ris_core.models import proposals
from ris_core.models.proposals import (
    FelzenszwalbOptions,
    ProposalFilter,
    SAMOptions,
    SAMProposer,
    best_proposal,
    felzenszwalb,
    filter_proposals,
)


def drawing(height: int = 96, width: int = 128) -> tuple[np.ndarray, list[np.ndarray]]:
    """A red disc and a blue rectangle on a noisy grey ground, and their masks."""
    random = np.random.default_rng(0)
    rows, columns = np.mgrid[:height, :width] + 0.5
    disc = (columns - 0.3 * width) ** 2 + (rows - 0.4 * height) ** 2 < (0.2 * height) ** 2
    box = (abs(columns - 0.75 * width) < 0.12 * width) & (abs(rows - 0.6 * height) < 0.2 * height)
    pixels = np.full((height, width, 3), 90.0)
    pixels[disc], pixels[box] = (213, 45, 42), (45, 96, 214)
    noisy = pixels + random.normal(0, 6, pixels.shape)
    return noisy.clip(0, 255).astype(np.uint8), [disc, box]


def overlaps(masks: np.ndarray) -> np.ndarray:
    flat = masks.reshape(len(masks), -1).astype(np.int64)
    shared = flat @ flat.T
    return shared / (np.diagonal(shared)[:, None] + np.diagonal(shared) - shared)


@pytest.mark.parametrize("size", [(96, 128), (128, 96), (400, 450)])
def test_felzenszwalb_finds_what_is_drawn(size: tuple[int, int]) -> None:
    image, shapes = drawing(*size)
    masks = felzenszwalb(image)
    assert masks.dtype == np.bool_
    assert masks.shape[1:] == size
    for shape in shapes:
        index, iou = best_proposal(masks, shape)
        assert iou > 0.85
        assert iou == pytest.approx((masks[index] & shape).sum() / (masks[index] | shape).sum())


def test_felzenszwalb_is_the_same_every_time() -> None:
    image, _ = drawing()
    assert np.array_equal(felzenszwalb(image), felzenszwalb(image.copy()))


def test_felzenszwalb_sorts_filters_and_leaves_out_near_duplicates() -> None:
    image, _ = drawing()
    options = FelzenszwalbOptions(min_area=0.01, max_area=0.5, max_iou=0.8, min_size=0.001)
    masks = felzenszwalb(image, options)
    shares = masks.mean(axis=(1, 2))
    assert len(masks) > 2
    assert (np.diff(shares) <= 0).all()
    assert shares.min() >= 0.01
    assert shares.max() <= 0.5
    assert overlaps(masks)[~np.eye(len(masks), dtype=bool)].max() < 0.8
    everything = felzenszwalb(image, FelzenszwalbOptions(min_area=0, max_area=1, max_iou=1.0, min_size=0.001))
    assert len(everything) > len(masks)
    assert all(any(np.array_equal(mask, other) for other in everything) for mask in masks)


def test_the_overlaps_of_segments_are_those_of_their_masks() -> None:
    layers = [np.random.default_rng(i).integers(0, n, (9, 11)) for i, n in enumerate((4, 7))]
    masks = np.stack([layer == label for layer in layers for label in range(layer.max() + 1)])
    flat = masks.reshape(len(masks), -1).astype(np.int64)
    assert np.array_equal(proposals._segment_overlaps(layers), flat @ flat.T)


def test_grown_proposals_reach_the_edge_of_what_is_drawn() -> None:
    image, shapes = drawing()
    plain, grown = felzenszwalb(image), felzenszwalb(image, FelzenszwalbOptions(grow=1))
    assert len(grown) == len(plain)
    assert all((mask <= larger).all() for mask, larger in zip(plain, grown, strict=True))
    corner = np.zeros((1, 4, 5), dtype=bool)
    corner[0, 0, 0] = True
    assert proposals._grown(corner, 1).sum() == 4
    assert all(best_proposal(grown, shape)[1] > best_proposal(plain, shape)[1] for shape in shapes)


def test_an_image_of_one_colour_has_no_proposals() -> None:
    image = np.full((40, 50, 3), 7, np.uint8)
    for grow in (0, 1):
        assert felzenszwalb(image, FelzenszwalbOptions(grow=grow)).shape == (0, 40, 50)


def test_a_filter_keeps_the_larger_of_near_duplicates_in_the_order_given() -> None:
    masks = np.zeros((5, 10, 10), dtype=bool)
    masks[0, :2], masks[1, :5], masks[2, :5, 1:], masks[3, 5:], masks[4] = True, True, True, True, True
    kept = filter_proposals(masks, ProposalFilter(min_area=0.1, max_area=0.9, max_iou=0.9))
    assert np.array_equal(kept, masks[[1, 3, 0]])  # 2 is nine tenths of 1, 4 the whole image
    assert filter_proposals(masks[:0], ProposalFilter()).shape == (0, 10, 10)
    few = filter_proposals(masks, ProposalFilter(min_area=0.1, max_area=0.9, max_iou=0.9, max_count=2))
    assert np.array_equal(few, masks[[1, 3]])  # the largest


def test_the_best_proposal_is_an_upper_bound() -> None:
    target = np.zeros((4, 4), dtype=np.uint8)
    target[:2] = 1
    masks = np.zeros((3, 4, 4), dtype=bool)
    masks[0, 3], masks[1, 0], masks[2, :3] = True, True, True
    assert best_proposal(masks, target) == (2, pytest.approx(8 / 12))
    assert best_proposal(masks[:0], target) == (-1, 0.0)
    assert best_proposal(masks[:1], np.zeros((4, 4), bool)) == (0, 0.0)


@pytest.mark.parametrize("image", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3)), np.zeros((0, 4, 3), np.uint8)])
def test_what_is_no_image_is_refused(image: np.ndarray) -> None:
    with pytest.raises(DataError, match=r"RGB image uint8 \(H, W, 3\); got"):
        felzenszwalb(image)


def test_all_problems_of_options_are_listed() -> None:
    with pytest.raises(ConfigError) as error:
        FelzenszwalbOptions(
            min_area=0.5, max_area=0.4, max_iou=0, scales=(), sigma=-1, min_size=1, short_side=2, grow=-1, max_count=0
        )
    message = str(error.value)
    assert "FelzenszwalbOptions is wrong (8 problems)" in message
    for part in (
        "max_area 0.4",
        "max_iou is 0",
        "scales is ()",
        "sigma is -1",
        "min_size is 1",
        "short_side is 2",
        "grow is -1",
        "max_count is 0",
    ):
        assert part in message
    with pytest.raises(ConfigError, match=r"(?s)points_per_side is 0.*stability is 2.*crop_layers is -1"):
        SAMOptions(points_per_side=0, stability=2, crop_layers=-1)
    assert FelzenszwalbOptions(scales=[1.0, 2.0]).scales == (1.0, 2.0)  # type: ignore[arg-type]


def test_without_scikit_image_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "skimage.segmentation", None)
    with pytest.raises(ConfigError, match=r"felzenszwalb need scikit-image .*pip install scikit-image"):
        felzenszwalb(drawing()[0])


# SAM, with the library stubbed: what is asked of it and what is made of its answer


def weights_folder(folder: Path) -> Path:
    for name in ("config.json", "preprocessor_config.json", "model.safetensors"):
        (folder / name).write_text("{}")
    return folder


def test_sam_without_weights_names_the_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(WeightsError, match=r"preprocessor_config.json, model.safetensors missing.*hf download"):
        SAMProposer(tmp_path)


def test_sam_without_its_library_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"SAM need transformers .*pip install transformers"):
        SAMProposer(weights_folder(tmp_path))


class StubModel:
    @classmethod
    def from_pretrained(cls, folder: Path, **options: Any) -> StubModel:
        assert options["local_files_only"]
        assert options.get("use_safetensors", True)
        return cls()

    def eval(self) -> StubModel:
        return self


class StubTransformers:
    """Answers every image with the same masks and remembers what it was asked."""

    SamModel = SamImageProcessor = StubModel

    def __init__(self, masks: list[np.ndarray]) -> None:
        self.masks, self.asked = masks, dict[str, Any]()

    def pipeline(self, task: str, **_: Any) -> Any:
        assert task == "mask-generation"

        def generate(image: Image.Image, **options: Any) -> dict[str, Any]:
            assert image.size == (10, 8)
            self.asked = options
            return {"masks": self.masks}

        return generate


@pytest.mark.parametrize("found", [0, 3])
def test_sam_masks_are_filtered_and_sorted(found: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    masks = np.zeros((3, 8, 10), dtype=bool)
    masks[0, 0], masks[1, :4], masks[2, :4] = True, True, True
    stub = StubTransformers(list(masks[:found]))
    monkeypatch.setitem(sys.modules, "transformers", stub)
    proposer = SAMProposer(weights_folder(tmp_path), SAMOptions(points_per_side=8, pred_iou=0.7, stability=0.6))
    got = proposer(np.zeros((8, 10, 3), np.uint8))
    assert got.dtype == np.bool_
    assert np.array_equal(got, masks[[1, 0]] if found else np.zeros((0, 8, 10), bool))
    assert stub.asked["points_per_crop"] == 8
    assert (stub.asked["pred_iou_thresh"], stub.asked["stability_score_thresh"]) == (0.7, 0.6)
