"""The middle and the end of LTS: fusion of image and sentence, and the segmentation network.

Jing et al., "Locate then Segment: A Strong Pipeline for Referring Image Segmentation", CVPR 2021, arXiv 2103.16284. There
is no official code; what the paper leaves open follows the family it belongs to (MCN, Luo et al. 2020) or is our choice,
see `ris_core.models.lts.system.LTSConfig`. What is written in a faster form gives the same results as the plain one.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ris_core.models.lts.encoders import Levels

SLOPE = 0.1  # of every LeakyReLU outside the backbone


class ImageFeatures(NamedTuple):
    """What LTS knows of an image before it hears an expression (h, w = the 1/8 grid)."""

    fine: torch.Tensor  # (B, dim, h, w) C3's share of the merge at 1/8
    middle: torch.Tensor  # (B, dim, h/2, w/2) C4's share of the merge at 1/16
    coarse: torch.Tensor  # (B, fusion_dim, h/4, w/4) the projected C5

    def of(self, image_index: torch.Tensor) -> ImageFeatures:
        """Give the features of image `image_index[n]` for every expression n: int64 (N,)."""
        # indexing keeps channels_last, index_select does not
        return ImageFeatures(*(features[image_index] for features in self))


class Merge(nn.Module):
    """CBL1x1(concat[up(below), lateral]), computed as up(A below) + B lateral before batch norm and activation.

    A 1x1 convolution of a concatenation is a sum of two, and commutes with nearest upsampling: the lateral's share needs
    no text, and the other runs on a quarter of the positions.
    """

    def __init__(self, below: int, lateral: int, out_channels: int) -> None:
        super().__init__()
        self.below = nn.Conv2d(below, out_channels, 1, bias=False)
        self.lateral = nn.Conv2d(lateral, out_channels, 1, bias=False)
        self.norm = norm(out_channels)

    def forward(self, below: torch.Tensor, lateral: torch.Tensor) -> torch.Tensor:
        """Merge below (N, below, h/2, w/2) and `self.lateral` of the lateral map (N, out, h, w) -> (N, out, h, w)."""
        return self.norm(F.interpolate(self.below(below), scale_factor=2.0, mode="nearest") + lateral)


class Fusion(nn.Module):
    """Visual levels and the sentence become one cross-modal map at 1/8, top-down; `project_image` needs no text.

    The product at 1/32 is MCN's. Coordinates are told to the last convolution: "box" the 8 channels of
    `box_coordinates`, "xy" only the two of the cell's centre, "none" nothing.
    """

    def __init__(
        self, channels: tuple[int, ...], sentence_dim: int, fusion_dim: int, dim: int, coordinates: str
    ) -> None:
        super().__init__()
        c3, c4, c5 = channels
        self.coarse = cbl(c5, fusion_dim, 1)
        self.middle = cbl(c4, dim, 1)
        self.fine = cbl(c3, dim // 2, 1)
        self.sentence = nn.Sequential(
            nn.Linear(sentence_dim, fusion_dim, bias=False), nn.BatchNorm1d(fusion_dim), nn.LeakyReLU(SLOPE)
        )
        self.product = norm(fusion_dim)
        self.merge_middle = Merge(fusion_dim, dim, dim)
        self.merge_fine = Merge(dim, dim // 2, dim)
        self.map = nn.Conv2d(dim, dim, 3, padding=1, bias=False)
        self.places = {"box": slice(0, 8), "xy": slice(4, 6), "none": slice(0, 0)}[coordinates]
        count = self.places.stop - self.places.start
        self.coordinates = nn.Conv2d(count, dim, 3, padding=1, bias=False) if count else None
        self.norm = norm(dim)

    def project_image(self, levels: Levels) -> ImageFeatures:
        c3, c4, c5 = levels
        return ImageFeatures(
            self.merge_fine.lateral(self.fine(c3)), self.merge_middle.lateral(self.middle(c4)), self.coarse(c5)
        )

    def forward(self, features: ImageFeatures, sentence: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Fuse features of N images, sentences (N, D) -> F (N, dim, h, w) at 1/8 and the map (N, dim, h/2, w/2) at 1/16."""
        coarse = self.product(features.coarse * self.sentence(sentence)[:, :, None, None])
        middle = self.merge_middle(coarse, features.middle)
        x = self.map(self.merge_fine(middle, features.fine))
        if self.coordinates is not None:
            # the coordinates' share of a convolution over concat[map, coordinates] is the same for every sample
            grid = box_coordinates(x.shape[-2], x.shape[-1], x.device)[:, self.places]
            x = x + self.coordinates(grid.to(self.coordinates.weight.dtype))
        return self.norm(x), middle


class Segmenter(nn.Module):
    """concat[F, prior] (N, dim + 1, h, w) -> mask logits (N, 1, 2h, 2w): context, a transposed convolution, one logit."""

    def __init__(self, in_channels: int, dim: int, head: str, rates: tuple[int, ...]) -> None:
        super().__init__()
        plain = nn.Sequential(cbl(in_channels, dim, 3), cbl(dim, dim, 3))
        self.context = ASPP(in_channels, dim, rates) if head == "aspp" else plain
        self.upsample = nn.Sequential(nn.ConvTranspose2d(dim, dim, 4, stride=2, padding=1, bias=False), norm(dim))
        self.logit = nn.Conv2d(dim, 1, 3, padding=1)

    def forward(self, fused: torch.Tensor, prior: torch.Tensor) -> torch.Tensor:
        x = torch.cat([fused, prior.to(fused.dtype)], dim=1)
        logits = self.logit(self.upsample(self.context(x)))
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling: 1x1, one 3x3 per rate and image pooling side by side, then 1x1 to `dim`."""

    def __init__(self, in_channels: int, dim: int, rates: tuple[int, ...]) -> None:
        super().__init__()
        self.branches = nn.ModuleList([cbl(in_channels, dim, 1), *(cbl(in_channels, dim, 3, rate) for rate in rates)])
        self.pooled = cbl(in_channels, dim, 1)
        self.project = cbl((len(rates) + 2) * dim, dim, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled = self.pooled(x.mean(dim=(2, 3), keepdim=True)).expand(-1, -1, *x.shape[-2:])
        return self.project(torch.cat([*(branch(x) for branch in self.branches), pooled], dim=1))


def norm(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm2d(channels), nn.LeakyReLU(SLOPE, inplace=True))


def cbl(in_channels: int, out_channels: int, kernel: int, rate: int = 1) -> nn.Sequential:
    """Build a convolution without bias, batch norm, LeakyReLU; the size stays."""
    padding = rate * (kernel // 2)
    convolution = nn.Conv2d(in_channels, out_channels, kernel, padding=padding, dilation=rate, bias=False)
    return nn.Sequential(convolution, norm(out_channels))


@lru_cache(maxsize=64)
def box_coordinates(height: int, width: int, device: torch.device) -> torch.Tensor:
    """Tell where each cell lies, in [-1, 1]: x0, y0, x1, y1, centre x, centre y, then 1/width, 1/height.

    float32 (1, 8, height, width). Outside inference mode, so that training may use what prediction cached.
    """
    with torch.inference_mode(False):
        x = (2 * torch.arange(width + 1, dtype=torch.float32, device=device) / width - 1).expand(height, -1)
        y = (2 * torch.arange(height + 1, dtype=torch.float32, device=device)[:, None] / height - 1).expand(-1, width)
        x0, x1, y0, y1 = x[:, :-1], x[:, 1:], y[:-1], y[1:]
        one = torch.ones_like(x0)
        return torch.stack([x0, y0, x1, y1, (x0 + x1) / 2, (y0 + y1) / 2, one / width, one / height])[None]
