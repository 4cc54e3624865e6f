"""The pixel loss is plain BCE unless told otherwise, and its dice term is the formula by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from ris_core.training.losses import segmentation_loss


def example(count: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(count, 1, 6, 5, generator=generator)
    return logits, torch.randint(0, 256, (count, 1, 6, 5), generator=generator, dtype=torch.uint8)


def test_by_default_it_is_plain_binary_cross_entropy() -> None:
    logits, target = example()
    p, t = logits.double().sigmoid(), target.double() / 255
    by_hand = -(t * p.log() + (1 - t) * (1 - p).log()).mean()
    loss = segmentation_loss(logits, target)
    assert (loss.ndim, loss.dtype) == (0, torch.float32)
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-6)
    assert torch.equal(loss, F.binary_cross_entropy_with_logits(logits, target.float() / 255))


def test_a_float_target_is_taken_as_it_is() -> None:
    logits, target = example()
    assert torch.equal(segmentation_loss(logits, target.float() / 255), segmentation_loss(logits, target))


def test_zero_logits_cost_log_two() -> None:
    _, target = example()
    assert segmentation_loss(torch.zeros(target.shape), target).item() == pytest.approx(math.log(2))


def test_the_positive_weight_multiplies_the_foreground_alone() -> None:
    logits, target = example()
    p, t = logits.double().sigmoid(), target.double() / 255
    by_hand = -(3 * t * p.log() + (1 - t) * (1 - p).log()).mean()
    assert segmentation_loss(logits, target, positive_weight=3.0).item() == pytest.approx(by_hand.item(), rel=1e-6)


def test_dice_is_the_formula_by_hand_per_expression() -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [100.0, 100.0, -100.0, -100.0]]).view(2, 1, 2, 2)
    target = torch.tensor([[255, 255, 0, 0], [255, 0, 0, 0]], dtype=torch.uint8).view(2, 1, 2, 2)
    # First: p = .5 everywhere, overlap 1, sum 2 + 2. Second: overlap 1, sum 2 + 1. One is added above and below.
    dice = ((1 - (2 * 1 + 1) / (4 + 1)) + (1 - (2 * 1 + 1) / (3 + 1))) / 2
    plain = segmentation_loss(logits, target)
    assert (segmentation_loss(logits, target, dice_weight=2.0) - plain).item() == pytest.approx(2 * dice, abs=1e-5)


def test_a_perfect_mask_costs_nothing_and_an_empty_one_is_finite() -> None:
    target = torch.tensor([[255, 0, 0, 255], [0, 0, 0, 0]], dtype=torch.uint8).view(2, 1, 2, 2)
    perfect = (target.float() / 255 - 0.5) * 200
    assert segmentation_loss(perfect, target, 2.0, 1.0).item() == pytest.approx(0, abs=1e-6)


def test_half_precision_logits_are_computed_in_float32() -> None:
    logits, target = example()
    loss = segmentation_loss(logits.bfloat16(), target, 2.0, 0.5)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, segmentation_loss(logits.bfloat16().float(), target, 2.0, 0.5))
