"""Pixel losses for one-logit masks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ris_core.options import option


@dataclass
class LossParams:
    """Pixel loss, a weighted sum of BCE, focal and dice terms; the default is the published one of CRIS: plain BCE."""

    bce_weight: float = option(1.0, minimum=0)
    positive_weight: float = option(1.0, minimum=0)  # of foreground pixels in the BCE
    dice_weight: float = option(0.0, minimum=0)
    focal_weight: float = option(0.0, minimum=0)
    focal_alpha: float = option(0.65, minimum=0, below=1)
    focal_gamma: float = option(2.0, minimum=0)


def segmentation_loss(logits: torch.Tensor, target: torch.Tensor, params: LossParams) -> torch.Tensor:
    """Sum the terms of `params` whose weight is not zero. Scalar, fp32.

    logits (N, 1, h, w), any float dtype; target (N, 1, h, w) uint8 0..255 (soft edges) or float 0..1.

    BCE, mean over all pixels: with weight 1 alone, CRIS' published "text-to-pixel contrastive" loss (arXiv 2111.15174,
    section 3.4; official code). Dice as in V-Net (Milletari et al. 2016, linear denominator), computed per expression, then
    averaged. Focal (Lin et al. 2017), mean over all pixels, alpha for foreground and 1 - alpha for background; RISCLIP is
    trained with focal and dice.
    """
    logits = logits.float()
    target = target.float() / 255 if target.dtype == torch.uint8 else target
    loss = logits.new_zeros(())
    if params.bce_weight:
        weight = None if params.positive_weight == 1.0 else logits.new_full((1,), params.positive_weight)
        loss = loss + params.bce_weight * F.binary_cross_entropy_with_logits(logits, target, pos_weight=weight)
    if params.focal_weight:
        loss = loss + params.focal_weight * _focal(logits, target, params.focal_alpha, params.focal_gamma)
    if params.dice_weight:
        probability = logits.sigmoid()
        overlap = (probability * target).flatten(1).sum(1)
        total = probability.flatten(1).sum(1) + target.flatten(1).sum(1)
        loss = loss + params.dice_weight * (1 - (2 * overlap + 1) / (total + 1)).mean()
    return loss


def _focal(logits: torch.Tensor, target: torch.Tensor, alpha: float, gamma: float) -> torch.Tensor:
    """Count a pixel with a soft target as foreground and as background, in these shares."""
    wrong = torch.sigmoid(-logits)  # of a foreground pixel; 1 - wrong of a background pixel
    foreground = alpha * target * wrong**gamma * -F.logsigmoid(logits)
    background = (1 - alpha) * (1 - target) * (1 - wrong) ** gamma * -F.logsigmoid(-logits)
    return (foreground + background).mean()
