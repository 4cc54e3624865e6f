"""The parts of CRIS on top of CLIP: spatial attention pool, neck, decoder and projector.

Wang et al., "CRIS: CLIP-Driven Referring Image Segmentation", CVPR 2022, arXiv 2111.15174. Names of parameters, order
of concatenations and numerics follow the authors' code (DerrickWang005/CRIS.pytorch, `model/layers.py`), so that its
checkpoints load as they are. What is faster here gives the same results.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ris_core.models.layers import attention, attention_pool_map, dynamic_conv3x3, position_line, position_map

if TYPE_CHECKING:
    from open_clip.modified_resnet import AttentionPool2d


class ImageFeatures(NamedTuple):
    """What CRIS knows of an image before it hears an expression (h, w = the 1/16 grid)."""

    fine: torch.Tensor  # (B, fpn_out[0], h, w) from C3
    middle: torch.Tensor  # (B, fpn_out[1], h, w) from C4
    coarse: torch.Tensor  # (B, fpn_out[2], h/2, w/2) from C5

    def of(self, image_index: torch.Tensor) -> ImageFeatures:
        """Give the features of image `image_index[n]` for every expression n: int64 (N,)."""
        return ImageFeatures(*(features[image_index] for features in self))


def spatial_attention_pool(pool: AttentionPool2d, features: torch.Tensor) -> torch.Tensor:
    """Give C5 of CRIS: `attention_pool_map` plus a residual branch `pool.connect` (1x1 convolution, batch norm), then ReLU."""
    return F.relu(attention_pool_map(pool, features) + pool.connect(features))


class CoordConv(nn.Module):
    """A convolution block that also sees where it is: X and Y in [-1, 1] as two more input channels."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = conv_block(in_channels + 2, out_channels, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv1(with_coordinates(x))


class Neck(nn.Module):
    """Fuses three visual levels with the sentence state into one map at 1/16 resolution.

    `project_image` is the part that needs no text. With coordinates at every level, X and Y are also appended to C3, C4
    and C5 (not in the paper, where only the aggregated map carries them).
    """

    def __init__(
        self, fpn_in: tuple[int, int, int], fpn_out: tuple[int, int, int], coordinates_everywhere: bool
    ) -> None:
        super().__init__()
        self.coordinates_everywhere = coordinates_everywhere
        extra = 2 if coordinates_everywhere else 0
        fine, middle, coarse = fpn_out
        self.txt_proj = nn.Sequential(nn.Linear(fpn_in[2], coarse, bias=False), nn.BatchNorm1d(coarse), nn.ReLU())
        self.f1_v_proj = conv_block(fpn_in[2] + extra, coarse, 1)
        self.norm_layer = nn.Sequential(nn.BatchNorm2d(coarse), nn.ReLU())
        self.f2_v_proj = conv_block(fpn_in[1] + extra, middle, 3)
        self.f2_cat = conv_block(middle + coarse, middle, 1)
        self.f3_v_proj = conv_block(fpn_in[0] + extra, fine, 3)
        self.f3_cat = conv_block(fine + middle, middle, 1)
        self.f4_proj5 = conv_block(coarse, middle, 3)
        self.f4_proj4 = conv_block(middle, middle, 3)
        self.f4_proj3 = conv_block(middle, middle, 3)
        self.aggr = conv_block(3 * middle, middle, 1)
        self.coordconv = nn.Sequential(CoordConv(middle, middle), conv_block(middle, middle, 3))

    def project_image(self, c3: torch.Tensor, c4: torch.Tensor, c5: torch.Tensor) -> ImageFeatures:
        """Project the three visual levels at 1/8, 1/16 and 1/32 -> the text-independent features."""
        if self.coordinates_everywhere:
            c3, c4, c5 = with_coordinates(c3), with_coordinates(c4), with_coordinates(c5)
        return ImageFeatures(F.avg_pool2d(self.f3_v_proj(c3), 2), self.f2_v_proj(c4), self.f1_v_proj(c5))

    def forward(self, features: ImageFeatures, state: torch.Tensor) -> torch.Tensor:
        """Fuse features of N images and states (N, E) of their expressions -> (N, fpn_out[1], h, w)."""
        coarse = self.norm_layer(features.coarse * self.txt_proj(state)[:, :, None, None])
        middle = self.f2_cat(torch.cat([features.middle, _double(coarse)], dim=1))
        fine = self.f3_cat(torch.cat([features.fine, middle], dim=1))
        levels = [self.f4_proj3(fine), self.f4_proj4(middle), _double(self.f4_proj5(coarse))]
        return self.coordconv(self.aggr(torch.cat(levels, dim=1)))


class DecoderLayer(nn.Module):
    """Pixels attend to pixels, then to words, then think (pre-norm, with a second norm after each attention)."""

    def __init__(self, dim: int, heads: int, ffn_dim: int, dropout: float) -> None:
        super().__init__()
        self.self_attn_norm = nn.LayerNorm(dim)
        self.cross_attn_norm = nn.LayerNorm(dim)
        self.self_attn = nn.MultiheadAttention(dim, heads, dropout=dropout, batch_first=True)
        self.multihead_attn = nn.MultiheadAttention(dim, heads, dropout=dropout, batch_first=True)
        self.ffn = nn.Sequential(
            nn.Linear(dim, ffn_dim), nn.ReLU(), nn.Dropout(dropout), nn.LayerNorm(ffn_dim), nn.Linear(ffn_dim, dim)
        )
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, pixels: torch.Tensor, words: torch.Tensor, keep: torch.Tensor, places: torch.Tensor, order: torch.Tensor
    ) -> torch.Tensor:
        """Take pixels (N, HW, C), words (N, L, C), keep (N, L) bool, positions of pixels (HW, C) and words (L, C)."""
        x = self.norm1(pixels)
        placed = x + places
        x = self._attend(self.self_attn, placed, placed, x)
        pixels = pixels + self.dropout(self.self_attn_norm(x))
        x = self._attend(self.multihead_attn, self.norm2(pixels) + places, words + order, words, keep)
        pixels = pixels + self.dropout(self.cross_attn_norm(x))
        return pixels + self.dropout(self.ffn(self.norm3(pixels)))

    def _attend(
        self,
        module: nn.MultiheadAttention,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        keep: torch.Tensor | None = None,
    ) -> torch.Tensor:
        for_query, for_key, for_value = zip(module.in_proj_weight.chunk(3), module.in_proj_bias.chunk(3), strict=True)
        pooled = attention(
            F.linear(query, *for_query),
            F.linear(key, *for_key),
            F.linear(value, *for_value),
            module.num_heads,
            keep,
            module.dropout if self.training else 0.0,
        )
        return module.out_proj(pooled)


class Decoder(nn.Module):
    """The vision-language decoder: a map (N, C, h, w) and words (N, L, C) -> a map (N, C, h, w)."""

    def __init__(self, layers: int, dim: int, heads: int, ffn_dim: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(dim, heads, ffn_dim, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)

    def forward(self, fused: torch.Tensor, words: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        _, dim, height, width = fused.shape
        places = position_map(dim, height, width, fused.device)
        order = position_line(dim, words.shape[1], fused.device)
        pixels = fused.flatten(2).transpose(1, 2)
        for layer in self.layers:
            pixels = layer(pixels, words, keep, places, order)
        return self.norm(pixels).transpose(1, 2).unflatten(2, (height, width))


class Projector(nn.Module):
    """The sentence state becomes a 3x3 kernel that turns a map (N, C, h, w) into logits (N, 1, 4h, 4w)."""

    def __init__(self, state_dim: int, dim: int) -> None:
        super().__init__()
        half = dim // 2
        self.vis = nn.Sequential(
            nn.Upsample(scale_factor=2, mode="bilinear"),
            conv_block(dim, dim, 3),
            nn.Upsample(scale_factor=2, mode="bilinear"),
            conv_block(dim, half, 3),
            nn.Conv2d(half, half, 1),  # never called: folded into the dynamic kernel
        )
        self.txt = nn.Linear(state_dim, half * 9 + 1)

    def forward(self, x: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """Let the dynamic kernel absorb the last 1x1 convolution's weights, both convolutions being linear."""
        dynamic = self.txt(state)
        kernel, bias = dynamic[:, :-1].unflatten(1, (-1, 9)), dynamic[:, -1:]
        last = self.vis[-1].get_parameter("weight").flatten(1)
        offset = self.vis[-1].get_parameter("bias") @ kernel
        return dynamic_conv3x3(self.vis[:-1](x), last.T @ kernel, offset, bias)


def conv_block(in_channels: int, out_channels: int, kernel: int) -> nn.Sequential:
    """Build a convolution without bias, batch norm, ReLU; the size stays."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


def with_coordinates(x: torch.Tensor) -> torch.Tensor:
    """Extend (N, C, H, W) -> (N, C + 2, H, W): X along the width, then Y along the height, both from -1 to 1 inclusive."""
    grid = _coordinates(x.shape[-2], x.shape[-1], x.device).to(x.dtype)
    return torch.cat([x, grid.expand(x.shape[0], -1, -1, -1)], dim=1)


def _double(x: torch.Tensor) -> torch.Tensor:
    return F.interpolate(x, scale_factor=2, mode="bilinear")


# Constants of the geometry, built once per size and device. Outside inference mode, so that training may use them too.


@lru_cache(maxsize=64)
def _coordinates(height: int, width: int, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):
        x = torch.linspace(-1, 1, width, device=device).expand(height, width)
        y = torch.linspace(-1, 1, height, device=device)[:, None].expand(height, width)
        return torch.stack([x, y])[None]
