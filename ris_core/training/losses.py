"""Pixel losses for one-logit masks."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def segmentation_loss(
    logits: torch.Tensor, target: torch.Tensor, positive_weight: float = 1.0, dice_weight: float = 0.0
) -> torch.Tensor:
    """Mean binary cross-entropy over all pixels, plus `dice_weight` times the soft dice loss. Scalar, fp32.

    logits (N, 1, h, w), any float dtype; target (N, 1, h, w) uint8 0..255 (soft edges) or float 0..1. With the default
    weights this is CRIS' published "text-to-pixel contrastive" loss (arXiv 2111.15174, section 3.4; official code).
    Dice as in V-Net (Milletari et al. 2016, linear denominator), computed per expression, then averaged.
    """
    logits = logits.float()
    target = target.float() / 255 if target.dtype == torch.uint8 else target
    weight = None if positive_weight == 1.0 else torch.full((1,), positive_weight, device=logits.device)
    loss = F.binary_cross_entropy_with_logits(logits, target, pos_weight=weight)
    if dice_weight:
        probability = logits.sigmoid()
        overlap = (probability * target).flatten(1).sum(1)
        total = probability.flatten(1).sum(1) + target.flatten(1).sum(1)
        loss = loss + dice_weight * (1 - (2 * overlap + 1) / (total + 1)).mean()
    return loss
