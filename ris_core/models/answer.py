"""The one way from what a system says to masks: of a predicted map the pixels above a threshold, of proposals the best."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from ris_core.data.letterbox import Mode, Upsampling, unletterbox
from ris_core.errors import ConfigError


@dataclass(frozen=True)
class Reading:
    """How an answer is read. Raises ConfigError for a threshold that is no probability, or a resolution that is none.

    threshold: a pixel is in the mask if its probability is above it. resolution: 'original', or a side length to which
    answers are resized, aspect ratio lost. upsampling: where the cells of a map lie, see `letterbox.unletterbox`.
    """

    threshold: float = 0.5
    resolution: str | int = "original"
    upsampling: Upsampling = "grid"

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:  # so written, not-a-number is outside
            raise ConfigError(f"the threshold is {self.threshold}: a probability is compared with it, use 0 to 1")
        if self.resolution != "original" and not (isinstance(self.resolution, int) and self.resolution > 0):
            raise ConfigError(f"the resolution is {self.resolution!r}: use 'original', or the pixels of a side")


@dataclass(frozen=True)
class Frame:
    """An image of height x width pixels and the square of image_size pixels a side in which systems see it."""

    height: int
    width: int
    image_size: int
    resample: Mode = "opencv4"


class MapAnswer(NamedTuple):
    """The answers to N expressions about one image, (h, w) being the reading's resolution."""

    masks: torch.Tensor  # (N, h, w) bool
    scores: torch.Tensor  # (N,) float 0..1: how sure, the mean probability inside the mask, 0 for an empty one
    probabilities: torch.Tensor  # (N, h, w) float32 0..1


def read_map(logits: torch.Tensor, frame: Frame, reading: Reading) -> MapAnswer:
    """Read logits (N, 1, g, g) of any float dtype over the square, about one image -> its answers."""
    square = logits.float().sigmoid()[:, 0]
    found = unletterbox(square, frame.height, frame.width, frame.image_size, frame.resample, reading.upsampling)
    found = smoothly_resized(found, reading).clamp_(0, 1)  # bicubic upsampling goes a little beyond
    masks = _above(found, reading.threshold)
    inside = F.threshold(found, reading.threshold, 0.0)  # as found * masks, in a quarter of the time
    areas = masks.view(torch.uint8).flatten(1).sum(1, dtype=torch.int64)
    scores = inside.flatten(1).sum(1) / areas.clamp(min=1)
    return MapAnswer(masks, scores, found)


def _above(maps: torch.Tensor, threshold: float) -> torch.Tensor:
    """Give maps > threshold, float32 -> bool; on a CPU by numpy, which takes a sixth of torch's time for it."""
    if maps.device.type != "cpu":
        return maps > threshold
    return torch.from_numpy(maps.numpy() > np.float32(threshold))


def resized(masks: torch.Tensor, reading: Reading) -> torch.Tensor:
    """Bring masks (N, H, W) of 0 and 1, any dtype, to the reading's resolution, bool, by nearest neighbours."""
    if reading.resolution == "original":
        return masks.bool()
    return F.interpolate(masks[None].to(torch.uint8), _side(reading), mode="nearest")[0].bool()


def smoothly_resized(maps: torch.Tensor, reading: Reading) -> torch.Tensor:
    """Give maps (N, H, W), float, at the reading's resolution, bilinear."""
    if reading.resolution == "original":
        return maps
    return F.interpolate(maps[None], _side(reading), mode="bilinear", align_corners=False)[0]


def _side(reading: Reading) -> tuple[int, int]:
    return int(reading.resolution), int(reading.resolution)


class Choice(NamedTuple):
    """The answers to N expressions about an image of H x W pixels."""

    masks: torch.Tensor  # (N, H, W) bool: the chosen proposals; empty where there was none
    shares: torch.Tensor  # (N,) float 0..1: how sure, the softmax of the chosen one's score among all
    of_all: torch.Tensor  # (N, P) float 0..1: the shares of all

    def relevance(self, proposals: torch.Tensor) -> torch.Tensor:
        """Give maps (N, H, W) float 0..1: of each pixel the shares of the proposals (P, H, W) that hold it, added up."""
        return torch.einsum("np,phw->nhw", self.of_all, proposals.to(self.of_all.dtype)).clamp(max=1)


def choose(masks: torch.Tensor, scores: torch.Tensor) -> Choice:
    """Choose from proposals (P, H, W) bool, by scores (N, P), higher is better, the best one for each expression.

    The first of equals. Without proposals the answers are empty masks of share 0.
    """
    if not len(masks):
        nothing = torch.zeros((len(scores), *masks.shape[1:]), dtype=torch.bool, device=scores.device)
        return Choice(nothing, scores.new_zeros(len(scores)), scores)
    shares = scores.softmax(dim=1)
    best = scores.argmax(dim=1)
    return Choice(masks[best], shares.gather(1, best[:, None])[:, 0], shares)
