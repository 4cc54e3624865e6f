"""The pixel loss is plain BCE unless told otherwise; its dice and focal terms are the formulas by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from ris_core.models.losses import LossParams, segmentation_loss


def example(count: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(count, 1, 6, 5, generator=generator)
    return logits, torch.randint(0, 256, (count, 1, 6, 5), generator=generator, dtype=torch.uint8)


def test_by_default_it_is_plain_binary_cross_entropy() -> None:
    logits, target = example()
    p, t = logits.double().sigmoid(), target.double() / 255
    by_hand = -(t * p.log() + (1 - t) * (1 - p).log()).mean()
    loss = segmentation_loss(logits, target, LossParams())
    assert (loss.ndim, loss.dtype) == (0, torch.float32)
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-6)
    assert torch.equal(loss, F.binary_cross_entropy_with_logits(logits, target.float() / 255))


def test_a_float_target_is_taken_as_it_is() -> None:
    logits, target = example()
    params = LossParams(dice_weight=1.0, focal_weight=1.0)
    assert torch.equal(
        segmentation_loss(logits, target.float() / 255, params), segmentation_loss(logits, target, params)
    )


def test_zero_logits_cost_log_two() -> None:
    _, target = example()
    zeros = torch.zeros(target.shape)
    assert segmentation_loss(zeros, target, LossParams()).item() == pytest.approx(math.log(2))
    assert segmentation_loss(zeros, target, LossParams(bce_weight=3.0)).item() == pytest.approx(3 * math.log(2))


def test_the_positive_weight_multiplies_the_foreground_alone() -> None:
    logits, target = example()
    p, t = logits.double().sigmoid(), target.double() / 255
    by_hand = -(3 * t * p.log() + (1 - t) * (1 - p).log()).mean()
    loss = segmentation_loss(logits, target, LossParams(positive_weight=3.0))
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-6)


def test_dice_is_the_formula_by_hand_per_expression() -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [100.0, 100.0, -100.0, -100.0]]).view(2, 1, 2, 2)
    target = torch.tensor([[255, 255, 0, 0], [255, 0, 0, 0]], dtype=torch.uint8).view(2, 1, 2, 2)
    # First: p = .5 everywhere, overlap 1, sum 2 + 2. Second: overlap 1, sum 2 + 1. One is added above and below.
    dice = ((1 - (2 * 1 + 1) / (4 + 1)) + (1 - (2 * 1 + 1) / (3 + 1))) / 2
    plain = segmentation_loss(logits, target, LossParams())
    loss = segmentation_loss(logits, target, LossParams(dice_weight=2.0))
    assert (loss - plain).item() == pytest.approx(2 * dice, abs=1e-5)


FOCAL = LossParams(bce_weight=0.0, focal_weight=1.0, focal_alpha=0.75, focal_gamma=2.0)


def test_focal_is_the_formula_by_hand() -> None:
    logits = torch.tensor([0.8, 0.2, 0.8, 0.2]).logit().view(1, 1, 2, 2)
    target = torch.tensor([255, 255, 0, 0], dtype=torch.uint8).view(1, 1, 2, 2)
    # Foreground at 0.8 and 0.2, background at 0.8 and 0.2: alpha * wrong^2 * -ln(right).
    rows = [(0.75, 0.2, 0.8), (0.75, 0.8, 0.2), (0.25, 0.8, 0.2), (0.25, 0.2, 0.8)]
    by_hand = sum(alpha * wrong**2 * -math.log(right) for alpha, wrong, right in rows) / 4
    assert segmentation_loss(logits, target, FOCAL).item() == pytest.approx(by_hand, rel=1e-5)


def test_focal_of_a_soft_pixel_is_its_shares_of_both() -> None:
    logits, half = torch.tensor([[[[0.7]]]]), torch.tensor([[[[0.5]]]])
    ends = [segmentation_loss(logits, torch.full_like(half, value), FOCAL).item() for value in (0.0, 1.0)]
    assert segmentation_loss(logits, half, FOCAL).item() == pytest.approx(sum(ends) / 2)


def test_without_its_gamma_and_with_equal_shares_focal_is_half_of_bce() -> None:
    logits, target = example()
    focal = LossParams(bce_weight=0.0, focal_weight=2.0, focal_alpha=0.5, focal_gamma=0.0)
    expected = segmentation_loss(logits, target, LossParams()).item()
    assert segmentation_loss(logits, target, focal).item() == pytest.approx(expected, rel=1e-6)


def test_terms_are_added_with_their_weights() -> None:
    """Focal and dice are what RISCLIP is trained with."""
    logits, target = example()
    focal = segmentation_loss(logits, target, FOCAL).item()
    dice = segmentation_loss(logits, target, LossParams(bce_weight=0.0, dice_weight=1.0)).item()
    both = LossParams(bce_weight=0.0, focal_weight=1.75, dice_weight=0.5, focal_alpha=0.75)
    assert segmentation_loss(logits, target, both).item() == pytest.approx(1.75 * focal + 0.5 * dice, rel=1e-6)
    assert 0 < focal < dice < 1


def test_without_any_term_the_loss_is_zero() -> None:
    logits, target = example()
    none = segmentation_loss(logits, target, LossParams(bce_weight=0.0))
    assert (none.shape, none.dtype, none.item()) == ((), torch.float32, 0.0)


def test_sure_logits_have_finite_gradients() -> None:
    logits = torch.tensor([300.0, -300.0, 300.0, -300.0]).view(1, 1, 2, 2).requires_grad_()
    target = torch.tensor([255, 255, 0, 0], dtype=torch.uint8).view(1, 1, 2, 2)
    segmentation_loss(logits, target, LossParams(dice_weight=1.0, focal_weight=1.0)).backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert (logits.grad[0, 0, 0, 1] < 0) & (logits.grad[0, 0, 1, 0] > 0)  # those that are wrong are still pulled


def test_a_perfect_mask_costs_nothing_and_an_empty_one_is_finite() -> None:
    target = torch.tensor([[255, 0, 0, 255], [0, 0, 0, 0]], dtype=torch.uint8).view(2, 1, 2, 2)
    perfect = (target.float() / 255 - 0.5) * 200
    params = LossParams(positive_weight=2.0, dice_weight=1.0, focal_weight=1.0)
    assert segmentation_loss(perfect, target, params).item() == pytest.approx(0, abs=1e-6)


def test_half_precision_logits_are_computed_in_float32() -> None:
    logits, target = example()
    params = LossParams(positive_weight=2.0, dice_weight=0.5, focal_weight=1.0)
    loss = segmentation_loss(logits.bfloat16(), target, params)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, segmentation_loss(logits.bfloat16().float(), target, params))
