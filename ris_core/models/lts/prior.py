"""The position prior of LTS: where the referred object is, as a map of logits, and what it is taught.

The paper (arXiv 2103.16284) names two cross-modal interaction modules, relevance filtering and a transformer, and the
authors' patent (WO 2022/089115) says that correlation filtering gives a response heat map. Formulas are not recoverable:
those below are our choice, except where a source is named.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from ris_core.models.layers import attention, dynamic_conv3x3, position_map

ALPHA, BETA = 2, 4  # of the penalty-reduced focal loss


class Correlation(nn.Module):
    """A vector (N, D) becomes one kernel per sample, correlated with a map (N, C, h, w): logits (N, 1, h, w).

    Scaled by the root of the kernel's number of weights, plus a learned scalar. kernel_size is 1 or 3.
    """

    def __init__(self, source_dim: int, dim: int, kernel_size: int) -> None:
        super().__init__()
        self.kernel = nn.Linear(source_dim, dim * kernel_size**2)
        self.bias = nn.Parameter(torch.zeros(1))
        self.kernel_size = kernel_size

    def forward(self, source: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        kernel = self.kernel(source) / math.sqrt(self.kernel.out_features)
        if self.kernel_size == 3:
            bias = self.bias.expand(len(kernel), 1)
            return dynamic_conv3x3(x, kernel.unflatten(1, (-1, 9)), kernel.new_zeros(len(kernel), 9), bias)
        response = torch.bmm(kernel[:, None], x.flatten(2)).unflatten(2, x.shape[-2:])
        return response.to(torch.promote_types(response.dtype, torch.float32)) + self.bias


class RelevanceFilter(nn.Module):
    """Variant "filtering": the sentence itself makes the kernel. The map at 1/16 is not looked at."""

    def __init__(self, sentence_dim: int, dim: int, kernel_size: int) -> None:
        super().__init__()
        self.correlation = Correlation(sentence_dim, dim, kernel_size)

    def forward(self, sentence: torch.Tensor, middle: torch.Tensor, fused: torch.Tensor) -> torch.Tensor:
        """Take sentence (N, D), maps (N, dim, h/2, w/2) and, at the prior's resolution, (N, dim, h, w)."""
        return self.correlation(sentence, fused)


class TransformerLocator(nn.Module):
    """Variant "transformer": the sentence is the one query of a decoder over the map at 1/16, and then makes the kernel.

    Sine positions are added to the keys. With a single query there is nothing for a self-attention to mix, so a layer is
    cross-attention and feed-forward, both with the norm first.
    """

    def __init__(
        self, sentence_dim: int, dim: int, kernel_size: int, width: int, layers: int, heads: int, ffn_dim: int
    ) -> None:
        super().__init__()
        self.query = nn.Linear(sentence_dim, width)
        self.memory = nn.Conv2d(dim, width, 1)
        self.layers = nn.ModuleList(LocatorLayer(width, heads, ffn_dim) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.correlation = Correlation(width, dim, kernel_size)

    def forward(self, sentence: torch.Tensor, middle: torch.Tensor, fused: torch.Tensor) -> torch.Tensor:
        """Take sentence (N, D), maps (N, dim, h/2, w/2) and, at the prior's resolution, (N, dim, h, w)."""
        memory = self.memory(middle).flatten(2).transpose(1, 2)
        keys = memory + position_map(memory.shape[2], *middle.shape[-2:], middle.device)
        query = self.query(sentence)[:, None]
        for layer in self.layers:
            query = layer(query, keys, memory)
        return self.correlation(self.norm(query)[:, 0], fused)


class LocatorLayer(nn.Module):
    """query (N, 1, C) attends to keys and values (N, hw, C)."""

    def __init__(self, width: int, heads: int, ffn_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_query, self.to_key = nn.Linear(width, width), nn.Linear(width, width)
        self.to_value, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.ffn = nn.Sequential(nn.Linear(width, ffn_dim), nn.ReLU(), nn.Linear(ffn_dim, width))

    def forward(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        asked = self.to_query(self.norm1(query))
        query = query + self.out(attention(asked, self.to_key(keys), self.to_value(values), self.heads))
        return query + self.ffn(self.norm2(query))


# What the prior is taught


def mask_target(target: torch.Tensor, factor: int) -> torch.Tensor:
    """Map masks (N, 1, H, W), uint8 0..255 or float 0..1, to the covered share of each cell, (N, 1, H/factor, W/factor)."""
    covered = target.float() / 255 if target.dtype == torch.uint8 else target
    return F.avg_pool2d(covered, factor)


def gaussian_target(covered: torch.Tensor, scale: float) -> torch.Tensor:
    """Put a Gaussian of height 1 at the cell nearest to each mask's centroid: float (N, 1, h, w), as its argument.

    covered is `mask_target`'s. sigma = scale * sqrt(area in cells), at least half a cell. An empty mask gives zeros. The
    idea, without its numbers, is that of correlation filtering for referring expressions (RCCF, Liao et al. 2020).
    """
    height, width = covered.shape[-2:]
    area = covered.sum(dim=(2, 3), keepdim=True)
    rows = torch.arange(height, device=covered.device, dtype=covered.dtype)[:, None]
    columns = torch.arange(width, device=covered.device, dtype=covered.dtype)
    mass = area.clamp(min=torch.finfo(covered.dtype).tiny)
    row = ((covered * rows).sum(dim=(2, 3), keepdim=True) / mass).round()
    column = ((covered * columns).sum(dim=(2, 3), keepdim=True) / mass).round()
    sigma = (scale * area.sqrt()).clamp(min=0.5)
    squared = (rows - row) ** 2 + (columns - column) ** 2
    return torch.exp(-squared / (2 * sigma**2)) * (area > 0)


def penalty_reduced_focal_loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Give the focal loss of centre maps (Law and Deng 2018; Zhou et al. 2019, equation 1): scalar, fp32.

    logits and target (N, 1, h, w). Cells where the target is exactly 1 are positive, all others negative and the less so the
    nearer they are; the sum over all cells is divided by the number of positive ones (by 1 if there is none).
    """
    logits = logits.float()
    positive = target == 1
    probability = logits.sigmoid()
    hit = (1 - probability) ** ALPHA * F.logsigmoid(logits)
    miss = (1 - target) ** BETA * probability**ALPHA * F.logsigmoid(-logits)
    return -torch.where(positive, hit, miss).sum() / positive.sum().clamp(min=1)
