"""The parts of RISCLIP that are trained: adapters, CFE, SKE and decoder.

Kim et al., "Extending CLIP's Image-Text Alignment to Referring Image Segmentation", NAACL 2024, arXiv 2306.08498. The
authors released no code, so this is a reconstruction. Evidence marks: [F1] read off figures of the paper's version 1, [S+]
reported as the paper's by a student re-implementation, [S] found in that re-implementation, [R] chosen by us.

Every residual branch starts as a no-op, so that training begins at CLIP's own image-text alignment. For that exactly the
last linear layer of a branch is zero: with another zero before it, no gradient would ever reach either.

Dims: N expressions, T image tokens (the class token first), L text tokens, C channels. In all of them `keep` (N, L) bool
marks the text tokens up to the end mark; those after it are padding, and no key.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import nn

from ris_core.models.layers import attention

NORM_GROUPS = 8
Layer = TypeVar("Layer", nn.Linear, nn.Conv2d)


class Adapter(nn.Module):
    """A residual bottleneck: x (N, T, C) -> x + up(ReLU(down(x))).

    Kaiming-normal down and zero up [S+]; zero biases and the width [R].
    """

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.down = nn.Linear(dim, width)
        self.up = zeroed(nn.Linear(width, dim))
        nn.init.kaiming_normal_(self.down.weight, nonlinearity="relu")
        nn.init.zeros_(self.down.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.up(F.relu(self.down(x)))


class BlockAdapters(nn.Module):
    """The two adapters of a transformer block: after its attention and after its MLP, both past the residual [S+]."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.after_attention = Adapter(dim, width)
        self.after_mlp = Adapter(dim, width)


class Attention(nn.Module):
    """Multi-head attention of x (N, Q, C) to a context (N, K, C); `keep` (N, K) bool marks the usable keys."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim, 2 * dim)
        self.out = nn.Linear(dim, dim)
        for linear in (self.query, self.key_value):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, x: torch.Tensor, context: torch.Tensor, keep: torch.Tensor | None = None) -> torch.Tensor:
        key, value = self.key_value(context).chunk(2, dim=-1)
        return self.out(attention(self.query(x), key, value, self.heads, keep))


class CFE(nn.Module):
    """Cross-modal feature extraction, "PreFusion" in version 1: the towers hear each other before a pair of blocks.

    Both streams go to a shared width, attend to each other, and come back as a residual [F1: the image's direction]. The
    directions are parallel [F1]: neither reads what the other has just written. Norms before projections, attentions and
    the zero-initialised way back [S+]; shared width and heads [S].
    """

    def __init__(self, image_dim: int, text_dim: int, dim: int, heads: int) -> None:
        super().__init__()
        self.image_in = nn.Sequential(nn.LayerNorm(image_dim), nn.Linear(image_dim, dim), nn.LayerNorm(dim))
        self.text_in = nn.Sequential(nn.LayerNorm(text_dim), nn.Linear(text_dim, dim), nn.LayerNorm(dim))
        self.image_attention = Attention(dim, heads)
        self.text_attention = Attention(dim, heads)
        self.image_out = nn.Sequential(nn.LayerNorm(dim), zeroed(nn.Linear(dim, image_dim)))
        self.text_out = nn.Sequential(nn.LayerNorm(dim), zeroed(nn.Linear(dim, text_dim)))

    def forward(self, image: torch.Tensor, text: torch.Tensor, keep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Take image (N, T, C image), text (N, L, C text), keep (N, L) -> both, updated."""
        shared_image, shared_text = self.image_in(image), self.text_in(text)
        image = image + self.image_out(self.image_attention(shared_image, shared_text, keep))
        return image, text + self.text_out(self.text_attention(shared_text, shared_image))


class SKEBranch(nn.Module):
    """One modality of an SKE block: attention to the other one, to itself, MLP; pre-norm, each with its residual [F1]."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.cross_norm = nn.LayerNorm(dim)
        self.context_norm = nn.LayerNorm(dim)
        self.cross_attention = Attention(dim, heads)
        self.self_norm = nn.LayerNorm(dim)
        self.self_attention = Attention(dim, heads)
        self.mlp = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, hidden), nn.GELU(), zeroed(nn.Linear(hidden, dim)))
        zeroed(self.cross_attention.out)
        zeroed(self.self_attention.out)

    def forward(
        self, x: torch.Tensor, other: torch.Tensor, keep: torch.Tensor | None, keep_other: torch.Tensor | None
    ) -> torch.Tensor:
        """Take x (N, Q, C), other (N, K, C), keep (N, Q) and keep_other (N, K) or None for all of them -> (N, Q, C)."""
        x = x + self.cross_attention(self.cross_norm(x), self.context_norm(other), keep_other)
        normed = self.self_norm(x)
        x = x + self.self_attention(normed, normed, keep)
        return x + self.mlp(x)


class SKE(nn.Module):
    """Shared-space knowledge exploitation, "PostFusion" in version 1: one block on tokens in CLIP's shared space.

    Both modalities read the incoming state of the other [F1]. "Zeros" as the initialisation [S+] is read as zero last
    layers; pre-norm [S+]; heads and MLP width [R].
    """

    def __init__(self, dim: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.image = SKEBranch(dim, heads, mlp_ratio)
        self.text = SKEBranch(dim, heads, mlp_ratio)

    def forward(self, image: torch.Tensor, text: torch.Tensor, keep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Take image (N, T, C), text (N, L, C), keep (N, L) -> both, updated."""
        return self.image(image, text, None, keep), self.text(text, image, keep, None)


class Decoder(nn.Module):
    """Refines patch logits to pixel logits with CLIP's image features; starts as bilinear upsampling of the former.

    The inputs are the paper's [F1]; stages, channels and which features are not recoverable [R]. One stage per entry of
    `channels`: the map so far beside a projection of a skip feature, two 3x3 convolutions, x2. Group norm instead of batch
    norm keeps results independent of the batch and of the number of processes.
    """

    def __init__(self, image_dim: int, channels: Sequence[int], size: int) -> None:
        super().__init__()
        self.size = size
        self.laterals = nn.ModuleList(nn.Linear(image_dim, width) for width in channels)
        self.stages = nn.ModuleList(
            nn.Sequential(*_convolution(before + width, width), *_convolution(width, width))
            for before, width in pairwise((1, *channels))
        )
        self.head = zeroed(nn.Conv2d(channels[-1], 1, 1))

    def forward(self, logits: torch.Tensor, skips: Sequence[torch.Tensor]) -> torch.Tensor:
        """Take patch logits (N, 1, g, g) and image tokens (N, 1 + g*g, C) per stage, shallow to deep -> (N, 1, size, size)."""
        grid = logits.shape[-2:]
        x, scale = logits, 1
        for lateral, stage, tokens in zip(self.laterals, self.stages, reversed(skips), strict=True):
            side = lateral(tokens)[:, 1:].transpose(1, 2).unflatten(2, grid)
            if scale > 1:
                x, side = _enlarge(x, 2), _enlarge(side, scale)
            x, scale = stage(torch.cat([x, side], dim=1)), 2 * scale
        # The head is linear and bilinear weights add up to 1, so it may come before the last x2: one channel, not many.
        correction = resize(_enlarge(self.head(x).float(), 2), self.size)
        return correction + resize(logits, self.size)


def resize(x: torch.Tensor, size: int) -> torch.Tensor:
    """Resize maps (N, C, H, W) to (N, C, size, size), bilinearly, corners not aligned."""
    return x if x.shape[-2:] == (size, size) else F.interpolate(x, (size, size), mode="bilinear", align_corners=False)


def zeroed(layer: Layer) -> Layer:
    """Give the layer with weight and bias zero: the last one of a branch that is to begin as a no-op."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def _enlarge(x: torch.Tensor, factor: int) -> torch.Tensor:
    return F.interpolate(x, scale_factor=float(factor), mode="bilinear", align_corners=False)


def _convolution(before: int, after: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(before, after, 3, padding=1, bias=False), nn.GroupNorm(NORM_GROUPS, after), nn.ReLU(inplace=True)
