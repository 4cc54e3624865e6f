"""Layers that several systems share: attention, CLIP's attention pool as a map, a convolution per sample, sine positions.

Numerics follow the code of CRIS' authors (DerrickWang005/CRIS.pytorch, `model/layers.py`), where they come from there.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from open_clip.modified_resnet import AttentionPool2d


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    heads: int,
    keep: torch.Tensor | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Do multi-head attention of projected query (B, Q, C) to key, value (B, K, C); keep (B, K) bool marks usable keys."""

    def split(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (heads, -1)).transpose(1, 2)

    mask = None if keep is None else keep[:, None, None, :]
    out = F.scaled_dot_product_attention(split(query), split(key), split(value), attn_mask=mask, dropout_p=dropout)
    return out.transpose(1, 2).flatten(-2)


def attention_pool_map(pool: AttentionPool2d, features: torch.Tensor) -> torch.Tensor:
    """Keep CLIP's attention pool as a map: raw layer4 maps (B, 32*width, H, W) -> (B, E, H, W).

    No mean token; every position is a query. The positional embedding, without its first row, is resized to (H, W) by
    bicubic interpolation written as a matrix product, which is quick and has a deterministic gradient on GPUs.
    """
    height, width = features.shape[-2:]
    grid = math.isqrt(pool.positional_embedding.shape[0] - 1)
    with torch.autocast(features.device.type, enabled=False):
        positions = _bicubic_matrix(grid, height, width, features.device) @ pool.positional_embedding[1:]
    x = features.flatten(2).transpose(1, 2) + positions
    pooled = pool.c_proj(attention(pool.q_proj(x), pool.k_proj(x), pool.v_proj(x), pool.num_heads))
    return pooled.transpose(1, 2).unflatten(2, (height, width))


def dynamic_conv3x3(x: torch.Tensor, weight: torch.Tensor, offset: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Apply one zero-padded 3x3 convolution per sample: x (N, C, H, W), weight (N, C, 9) -> (N, 1, H, W).

    offset (N, 9) is added to each tap's product inside the map only, bias (N, 1) to every output. Written as one matrix
    product per sample and a sum of nine shifted maps, ten times as fast as a grouped convolution on CPUs. The sum, and
    with it the logits, are at least float32 even under autocast.
    """
    height, width = x.shape[-2:]
    taps = torch.baddbmm(offset[:, :, None], weight.transpose(1, 2), x.flatten(2)).unflatten(2, (height, width))
    padded = F.pad(taps.to(torch.promote_types(taps.dtype, torch.float32)), (1, 1, 1, 1))
    out = bias[:, :, None]
    for tap in range(9):
        row, column = divmod(tap, 3)
        out = out + padded[:, tap, row : row + height, column : column + width]
    return out[:, None]


@lru_cache(maxsize=64)
def position_line(dim: int, length: int, device: torch.device) -> torch.Tensor:
    """Give sine and cosine of positions 0..length-1, interleaved: float32 (length, dim)."""
    with torch.inference_mode(False):
        rate = torch.exp(torch.arange(0, dim, 2, dtype=torch.float32, device=device) * (-math.log(10_000.0) / dim))
        angle = torch.arange(length, dtype=torch.float32, device=device)[:, None] * rate
        return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)


@lru_cache(maxsize=64)
def position_map(dim: int, height: int, width: int, device: torch.device) -> torch.Tensor:
    """Encode the column in the first half of the channels, the row in the second half: float32 (height * width, dim)."""
    with torch.inference_mode(False):
        columns = position_line(dim // 2, width, device)[None].expand(height, -1, -1)
        rows = position_line(dim // 2, height, device)[:, None].expand(-1, width, -1)
        return torch.cat([columns, rows], dim=-1).flatten(0, 1)


@lru_cache(maxsize=64)
def _bicubic_matrix(grid: int, height: int, width: int, device: torch.device) -> torch.Tensor:
    """Give bicubic resizing of a (grid, grid) map to (height, width) as float32 (height * width, grid * grid)."""
    with torch.inference_mode(False):
        cells = torch.eye(grid * grid, device=device).unflatten(1, (grid, grid))[None]
        resized = F.interpolate(cells, (height, width), mode="bicubic", align_corners=False)
        return resized[0].flatten(1).T.contiguous()
