"""From what a system says to masks: of a map the pixels above a threshold, among proposals the best scored; and how sure.

Whoever asks gets the same mask: the evaluator that scores it, the predictor that hands it out.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_world import Tiny

from ris_core.data.images import load_image
from ris_core.data.letterbox import Upsampling, letterbox_mask, unletterbox
from ris_core.errors import ConfigError
from ris_core.evaluation.answers import MapAnswers
from ris_core.evaluation.metrics import PROTOCOLS, Protocol
from ris_core.evaluation.queries import queries_of
from ris_core.models import registry
from ris_core.models.answer import Frame, Reading, choose, read_map, resized
from ris_core.models.clip import load_saved_clip
from ris_core.models.contract import MapSystem
from ris_core.predictor import MapPredictor

TRAINED = [name for name in registry.systems() if registry.trains(name)]
FRAME = Frame(40, 60, 64)
SQUARE = Frame(48, 48, 48)  # an image that is not moved in its square


# How a map is read


@pytest.mark.parametrize("threshold", [-0.01, 1.01, 7, math.nan, math.inf, -math.inf])
def test_a_threshold_that_is_no_probability_is_refused(threshold: float) -> None:
    for make in (lambda: Reading(threshold), lambda: replace(Reading(), threshold=threshold)):
        with pytest.raises(ConfigError, match=rf"the threshold is {threshold}: .* use 0 to 1"):
            make()


def test_the_ends_are_probabilities_too() -> None:
    logits = maps(3)
    everything, nothing = (read_map(logits, SQUARE, Reading(threshold)).masks for threshold in (0, 1))
    inside = read_map(logits, SQUARE, Reading()).probabilities
    assert torch.equal(everything, inside > 0)
    assert torch.equal(nothing, inside > 1), "bicubic upsampling may go beyond"


def test_a_protocol_says_how_its_answers_are_read() -> None:
    assert PROTOCOLS["ours"].reading == Reading()
    assert PROTOCOLS["cris"].reading == Reading(0.35, "original", "corners")
    assert PROTOCOLS["lavt"].reading == Reading(0.5, 480, "grid")


def maps(count: int, side: int = 16) -> torch.Tensor:
    """Smooth logits (count, 1, side, side) on both sides of 0."""
    coarse = torch.randn(count, 1, 5, 5, generator=torch.Generator().manual_seed(count))
    return 3 * F.interpolate(coarse, (side, side), mode="bicubic", align_corners=True)


@pytest.mark.parametrize("upsampling", ["grid", "corners"])
def test_a_map_is_read_at_the_images_own_size(upsampling: Upsampling) -> None:
    logits, reading = maps(3), Reading(0.4, upsampling=upsampling)
    found = read_map(logits, FRAME, reading)
    expected = unletterbox(logits.sigmoid()[:, 0], 40, 60, 64, "opencv4", upsampling)
    assert torch.equal(found.probabilities, expected.clamp(0, 1))
    assert (found.masks.dtype, found.masks.shape) == (torch.bool, (3, 40, 60))
    assert torch.equal(found.masks, expected > 0.4)
    assert 0.1 < found.masks.float().mean() < 0.9
    for other in set(get_args(Upsampling)) - {upsampling}:
        assert not torch.equal(
            read_map(logits, FRAME, Reading(0.4, upsampling=other)).probabilities, expected.clamp(0, 1)
        )


def test_a_mask_survives_the_way_into_the_square_and_back() -> None:
    for height, width in ((40, 60), (60, 40), (50, 50)):
        truth = np.zeros((height, width), np.uint8)
        truth[10:30, 15:35] = 1
        soft = torch.from_numpy(letterbox_mask(truth, 64, stride=4)).float() / 255
        found = read_map(soft.logit(eps=1e-3)[None, None], Frame(height, width, 64), Reading()).masks[0].numpy()
        assert (found & (truth > 0)).sum() / (found | (truth > 0)).sum() > 0.85


@pytest.mark.parametrize("side", [30, 96])
def test_at_a_side_probabilities_are_resized_before_they_meet_the_threshold(side: int) -> None:
    logits = maps(2)
    own = unletterbox(logits.sigmoid()[:, 0], 40, 60, 64, "opencv4", "grid")
    found = read_map(logits, FRAME, Reading(0.4, side))
    size = (int(side), int(side))
    assert found.masks.shape == found.probabilities.shape == (2, *size)
    expected = F.interpolate(own[None], size, mode="bilinear", align_corners=False)[0]
    assert torch.equal(found.probabilities, expected.clamp(0, 1))
    assert torch.equal(found.masks, expected > 0.4)
    assert expected.max() > 1, "what is to be cut off"


def test_how_images_were_resampled_is_how_maps_are_read_back() -> None:
    logits = maps(1)
    ours, exact = (read_map(logits, replace(FRAME, resample=mode), Reading()) for mode in ("opencv4", "exact"))
    assert torch.equal(
        exact.probabilities, unletterbox(logits.sigmoid()[:, 0], 40, 60, 64, "exact", "grid").clamp(0, 1)
    )
    assert not torch.equal(ours.probabilities, exact.probabilities)


@pytest.mark.parametrize("resolution", ["original", 30])
def test_a_score_is_the_mean_probability_inside_the_mask(resolution: str | int) -> None:
    logits = torch.cat([maps(4), torch.full((1, 1, 16, 16), -9.0)])
    for threshold in (0.3, 0.5, 0.8):
        found = read_map(logits, FRAME, Reading(threshold, resolution))
        assert not found.masks[4].any()
        means = [
            float(probability[mask].mean()) if mask.any() else 0.0
            for mask, probability in zip(found.masks, found.probabilities, strict=True)
        ]
        assert found.scores.tolist() == pytest.approx(means, abs=1e-6)
        assert found.scores[4] == 0, "of an empty mask"
        assert min(means[:4]) > threshold


def test_logits_of_low_precision_are_read_in_float32() -> None:
    logits = maps(2).bfloat16()
    found, expected = (read_map(given, FRAME, Reading()) for given in (logits, logits.float()))
    assert found.probabilities.dtype == found.scores.dtype == torch.float32
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_each_expression_is_read_alone() -> None:
    logits = maps(3)
    for resolution in ("original", 30):
        reading = Reading(resolution=resolution)
        together = read_map(logits, FRAME, reading)
        for i in range(3):
            alone = read_map(logits[i : i + 1], FRAME, reading)
            torch.testing.assert_close(alone.probabilities[0], together.probabilities[i], atol=1e-6, rtol=0)
            torch.testing.assert_close(alone.scores[0], together.scores[i], atol=1e-4, rtol=0)
    nothing = read_map(logits[:0], FRAME, Reading())
    assert (nothing.masks.shape, nothing.scores.shape) == ((0, 40, 60), (0,))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8])
def test_masks_are_resized_by_nearest_neighbours(dtype: torch.dtype) -> None:
    masks = torch.from_numpy(np.random.default_rng(0).random((3, 40, 60)) > 0.5).to(dtype)
    assert torch.equal(resized(masks, Reading()), masks.bool())
    for side in (30, 45, 480):
        grid = torch.arange(side)
        found = resized(masks, Reading(resolution=side))
        assert found.dtype == torch.bool
        assert torch.equal(found, masks.bool()[:, grid * 40 // side][:, :, grid * 60 // side])


# The evaluator's masks are the predictor's


@pytest.fixture(scope="module")
def models(tiny: Tiny) -> dict[str, MapSystem]:
    """An untrained one of every system that is trained, stirred so that its answers differ."""
    found = {}
    for name in TRAINED:
        section = tiny.params().of(name)
        torch.manual_seed(3)
        model = registry.build_model(
            name, section.model, load_saved_clip({"rn": tiny.clip, "vit": tiny.clip_vit}[section.clip])
        )
        assert isinstance(model, MapSystem)
        with torch.no_grad():
            for _, parameter in model.trained():
                parameter.add_(0.1 * torch.randn(parameter.shape))
        found[name] = model.eval()
    return found


def widest_gap(levels: np.ndarray) -> float:
    """Between two values from the middle of all: where rounding moves none across."""
    middle = np.quantile(levels, [0.4, 0.6])
    values = np.sort(levels[(levels >= middle[0]) & (levels <= middle[1])])
    widest = np.diff(values).argmax()
    return float(values[widest : widest + 2].mean())


@pytest.mark.parametrize("resolution", ["original", 480])
@pytest.mark.parametrize("upsampling", ["grid", "corners"])
@pytest.mark.parametrize("name", TRAINED)
def test_evaluator_and_predictor_give_the_same_masks(
    name: str, upsampling: Upsampling, resolution: str | int, models: dict[str, MapSystem], tiny: Tiny
) -> None:
    model, store = models[name], tiny.store()
    image = next(int(i) for i in store.images_of("val") if store.row(i)["height"] != store.row(i)["width"])
    queries = queries_of(store, "val", PROTOCOLS["ours"], [image])
    texts = [query.text for query in queries]
    photo = load_image(tiny.raw / store.row(image)["file_name"])
    middle = Protocol("middle", upsampling=upsampling, resolution=resolution)
    predictor = MapPredictor(model, store.image_size, 12, store.resample, middle.reading)
    levels = np.stack([answer.probability for answer in predictor.answer(predictor.encode(photo), texts)])
    protocol = replace(middle, threshold=widest_gap(levels))  # on both sides of which an untrained model's answers lie
    predictor = MapPredictor(model, store.image_size, 12, store.resample, protocol.reading)
    handed_out = predictor.answer(predictor.encode(photo), texts)
    scored = MapAnswers(model, 12)(store, queries, protocol)[image]
    masks = np.stack([answer.mask for answer in handed_out])
    assert np.array_equal(masks, scored.masks.numpy())
    assert [answer.score for answer in handed_out] == pytest.approx(scored.scores.tolist(), abs=1e-6)
    assert 0.2 < masks.mean() < 0.8
    size = (480, 480) if resolution == 480 else photo.shape[:2]
    assert masks.shape == (len(queries), *size)


# One among proposals

MASKS = torch.zeros(3, 4, 5, dtype=torch.bool)
MASKS[0, :2], MASKS[1, 1:3], MASKS[2, 3, 4] = True, True, True


def test_the_best_scored_proposal_is_chosen_for_each_expression() -> None:
    scores = torch.tensor([[0.1, 0.3, 0.2], [5.0, -5.0, 0.0], [-3.0, -2.0, -1.0]])
    choice = choose(MASKS, scores)
    assert choice.masks.dtype == torch.bool
    assert torch.equal(choice.masks, MASKS[[1, 0, 2]])
    torch.testing.assert_close(choice.shares, scores.softmax(1).max(1).values)


def test_the_first_of_equals_is_chosen() -> None:
    choice = choose(MASKS, torch.tensor([[1.0, 2.0, 2.0], [3.0, 3.0, 3.0]]))
    assert torch.equal(choice.masks, MASKS[[1, 0]])
    torch.testing.assert_close(choice.shares[1], torch.tensor(1 / 3))


def test_a_pixels_relevance_is_the_sum_of_the_shares_of_what_holds_it() -> None:
    scores = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)) * 4
    choice = choose(MASKS, scores)
    relevance = choice.relevance(MASKS)
    shares = scores.softmax(1)
    assert relevance.shape == (6, 4, 5)
    torch.testing.assert_close(relevance[:, 0, 0], shares[:, 0])
    torch.testing.assert_close(relevance[:, 1, 0], shares[:, 0] + shares[:, 1])
    torch.testing.assert_close(relevance[:, 3, 4], shares[:, 2])
    assert not relevance[:, 3, 0].any(), "what no proposal holds"


def test_shares_and_relevance_stay_within_0_and_1_whatever_the_scores() -> None:
    everything = torch.ones(50, 3, 3, dtype=torch.bool)
    for scale in (1e-3, 1.0, 1e4):
        choice = choose(everything, torch.randn(20, 50, generator=torch.Generator().manual_seed(1)) * scale)
        relevance = choice.relevance(everything)
        assert choice.shares.isfinite().all()
        assert 0 < choice.shares.min() <= choice.shares.max() <= 1
        assert 0 <= relevance.min() <= relevance.max() <= 1
        torch.testing.assert_close(relevance, torch.ones(20, 3, 3))


def test_a_single_proposal_is_certain() -> None:
    choice = choose(MASKS[:1], torch.tensor([[-100.0], [3.0]]))
    assert torch.equal(choice.masks, MASKS[[0, 0]])
    assert choice.shares.tolist() == [1.0, 1.0]


def test_without_proposals_answers_are_empty_masks_of_share_0() -> None:
    choice = choose(MASKS[:0], torch.zeros(2, 0))
    assert choice.masks.dtype == torch.bool
    assert choice.masks.shape == choice.relevance(MASKS[:0]).shape == (2, 4, 5)
    assert not choice.masks.any()
    assert not choice.relevance(MASKS[:0]).any()
    assert choice.shares.tolist() == [0.0, 0.0]


def test_without_expressions_there_are_no_answers() -> None:
    for masks in (MASKS, MASKS[:0]):
        choice = choose(masks, torch.zeros(0, len(masks)))
        assert choice.masks.shape == choice.relevance(masks).shape == (0, 4, 5)
        assert choice.shares.shape == (0,)


@pytest.mark.parametrize("resolution", ["30", "big", 0, -1, 1.5])
def test_a_resolution_is_the_original_or_a_number_of_pixels(resolution: Any) -> None:
    with pytest.raises(ConfigError, match="use 'original', or the pixels of a side"):
        Reading(resolution=resolution)
