"""Class-agnostic mask proposals for zero-shot systems: what may be meant, before anybody has said anything.

    propose = proposer(ProposalOptions("felzenszwalb"))   # as params.yaml has them
    masks = propose(image)
    masks = SAMProposer("sam-vit-base")(image)            # needs a folder with SAM's weights
    index, iou = best_proposal(masks, target)             # how good an answer can be at all

Every generator maps an RGB image uint8 (H, W, 3) to masks bool (N, H, W), largest first, without near duplicates, and
gives the same masks for the same image: they can be cached. An image's annotated objects, the oracle proposals, are in its
shard already: zero-shot systems are scored on them too, beside those of the generator.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from ris_core.errors import ConfigError, DataError, WeightsError, list_problems
from ris_core.options import Plain, from_plain, option


@dataclass(frozen=True)
class ProposalFilter:
    """Which masks are kept: areas are shares of the image."""

    min_area: float = 0.002
    max_area: float = 0.9
    max_iou: float = 0.9  # a mask that overlaps a larger kept one this much is dropped; 1.0 drops equal masks only
    # So many of an image, the largest: each is encoded twice. Of 310 to 360 segments of photos the best one of each of 13
    # objects was among the largest 150.
    max_count: int = 150

    def _problems(self) -> list[str]:
        checks = {
            f"min_area is {self.min_area} and max_area {self.max_area}: use 0 <= min_area < max_area <= 1": 0
            <= self.min_area
            < self.max_area
            <= 1,
            f"max_iou is {self.max_iou}: use more than 0, at most 1": 0 < self.max_iou <= 1,
            f"max_count is {self.max_count}: use 1 or more": self.max_count >= 1,
        }
        return [problem for problem, fine in checks.items() if not fine]

    def __post_init__(self) -> None:
        if problems := self._problems():
            raise ConfigError(list_problems(f"{type(self).__name__} is wrong", problems))


@dataclass(frozen=True)
class FelzenszwalbOptions(ProposalFilter):
    """Segmentations at several scales; their segments are the proposals. Defaults: a measured preset for photographs."""

    scales: tuple[float, ...] = (50.0, 100.0, 200.0, 400.0, 800.0)  # larger: larger segments
    sigma: float = 0.8  # pixels of smoothing before
    min_size: float = 0.002  # share of the image below which a segment is merged into a neighbour
    short_side: int = 300  # larger images are shrunk to it for the segmentation (time grows with the pixels)
    grow: int = 0  # pixels added around every proposal: in small images blurred edges are segments of their own

    def __post_init__(self) -> None:
        object.__setattr__(self, "scales", tuple(self.scales))  # JSON and YAML bring a list
        super().__post_init__()

    def _problems(self) -> list[str]:
        checks = {
            f"scales is {self.scales}: use one or more positive numbers": len(self.scales) > 0 and min(self.scales) > 0,
            f"sigma is {self.sigma}: use 0 or more": self.sigma >= 0,
            f"min_size is {self.min_size}: use 0 or more and less than 1": 0 <= self.min_size < 1,
            f"short_side is {self.short_side}: use 16 or more": self.short_side >= 16,
            f"grow is {self.grow}: use 0 or more": self.grow >= 0,
        }
        return super()._problems() + [problem for problem, fine in checks.items() if not fine]


@dataclass(frozen=True)
class SAMOptions(ProposalFilter):
    """Segment Anything prompted with a grid of points; the defaults are its authors'.

    HybridGL (fhgyuanshen/HybridGL) uses 8 points a side and 0.7 for both thresholds, with ViT-H.
    """

    points_per_side: int = 32
    points_per_batch: int = 64  # bounds memory
    pred_iou: float = 0.88  # least quality that SAM predicts for a mask
    stability: float = 0.95  # least IoU of a mask with itself under a shifted threshold
    box_nms: float = 0.7
    crop_layers: int = 0  # above 0: again on crops of the image

    def _problems(self) -> list[str]:
        counts = {"points_per_side": self.points_per_side, "points_per_batch": self.points_per_batch}
        shares = {"pred_iou": self.pred_iou, "stability": self.stability, "box_nms": self.box_nms}
        problems = [f"{name} is {value}: use 1 or more" for name, value in counts.items() if value < 1]
        problems += [f"{name} is {value}: use 0 to 1" for name, value in shares.items() if not 0 <= value <= 1]
        if self.crop_layers < 0:
            problems.append(f"crop_layers is {self.crop_layers}: use 0 or more")
        return super()._problems() + problems


GENERATORS = ("felzenszwalb", "sam")


@dataclass(frozen=True)
class ProposalOptions:
    """A generator by name, and the options of each."""

    generator: str = option("felzenszwalb", choices=GENERATORS)
    felzenszwalb: FelzenszwalbOptions = field(default_factory=FelzenszwalbOptions)
    sam: SAMOptions = field(default_factory=SAMOptions)
    sam_weights: str | None = None  # a folder as transformers saves it


@dataclass(frozen=True)
class ProposalsParams(ProposalOptions):
    """Proposals of a dataset: how they are made, and of which splits."""

    splits: list[str] | None = None  # all but train

    @property
    def max_count(self) -> int:
        """Tell how many an image has at most."""
        return (self.felzenszwalb if self.generator == "felzenszwalb" else self.sam).max_count

    def options(self) -> ProposalOptions:
        """Tell how they are made."""
        return ProposalOptions(self.generator, self.felzenszwalb, self.sam, self.sam_weights)


def proposal_options(content: Plain) -> ProposalOptions:
    """Give the options that `asdict` made plain, of a model's folder say. Raises ConfigError for what are no such options."""
    return from_plain(ProposalOptions, content, "proposals")


def proposer(options: ProposalOptions, device: str | torch.device = "cpu") -> Callable[[np.ndarray], np.ndarray]:
    """Give what makes proposals of a picture, by these options; see `felzenszwalb` for what goes in and comes out.

    Raises:
        ConfigError: SAM without a folder of weights, or without transformers.
        WeightsError: see `SAMProposer`.
    """
    if options.generator == "felzenszwalb":
        return partial(felzenszwalb, options=options.felzenszwalb)
    if options.sam_weights is None:
        raise ConfigError("proposals.generator is sam: set proposals.sam_weights to a folder with its weights")
    return SAMProposer(options.sam_weights, options.sam, device)


def felzenszwalb(image: np.ndarray, options: FelzenszwalbOptions | None = None) -> np.ndarray:
    """Make proposals from graph-based segmentation (Felzenszwalb and Huttenlocher, IJCV 2004), by scikit-image.

    Args:
        image: RGB uint8 (H, W, 3).
        options: None for the defaults.

    Returns:
        Masks bool (N, H, W), largest first; N is 0 where every segment is filtered out (an image of one colour).

    Raises:
        DataError: not such an image.
        ConfigError: scikit-image is not installed.
    """
    options = options or FelzenszwalbOptions()
    _check_image(image)
    segmentation = _require("skimage.segmentation", "proposals by felzenszwalb", "scikit-image")
    height, width = image.shape[:2]
    scale = min(1.0, options.short_side / min(height, width))
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    if size != (height, width):
        image = np.asarray(Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.BOX))
    min_size = round(options.min_size * size[0] * size[1])
    rows, columns = (np.arange(n) * m // n for n, m in zip((height, width), size, strict=True))  # nearest
    layers = []
    for each in options.scales:
        segments = segmentation.felzenszwalb(image, scale=each, sigma=options.sigma, min_size=min_size)
        layers.append(segments[np.ix_(rows, columns)])
    owners = [(layer, label) for layer in layers for label in range(int(layer.max()) + 1)]
    kept = _distinct(_segment_overlaps(layers), height * width, options)
    masks = np.zeros((len(kept), height, width), dtype=bool)
    for mask, place in zip(masks, kept, strict=True):
        layer, label = owners[place]
        np.equal(layer, label, out=mask)
    return _grown(masks, options.grow) if options.grow else masks


class SAMProposer:
    """Automatic masks of Segment Anything (Kirillov et al., ICCV 2023, arXiv 2304.02643), by transformers.

    Args:
        weights: a folder as transformers saves SAM, with safetensors (`hf download facebook/sam-vit-huge --local-dir`).
            Nothing is fetched.
        options: None for the defaults.
        device: where SAM runs.

    Raises:
        ConfigError: transformers is not installed.
        WeightsError: the folder is not there or incomplete.
    """

    def __init__(
        self, weights: str | Path, options: SAMOptions | None = None, device: str | torch.device = "cpu"
    ) -> None:
        self.options = options or SAMOptions()
        folder = Path(weights)
        missing = [
            name
            for name in ("config.json", "preprocessor_config.json", "model.safetensors")
            if not (folder / name).is_file()
        ]
        if missing:
            raise WeightsError(
                f"no SAM weights in {folder}: {', '.join(missing)} missing; give a folder as transformers saves it, such "
                "as the one of `hf download facebook/sam-vit-base --local-dir sam-vit-base`"
            )
        transformers = _require("transformers", "proposals by SAM", "transformers")
        model = transformers.SamModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
        processor = transformers.SamImageProcessor.from_pretrained(folder, local_files_only=True)
        self._generate = transformers.pipeline(
            "mask-generation", model=model.eval(), image_processor=processor, device=torch.device(device)
        )

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """Map an RGB image uint8 (H, W, 3) to masks bool (N, H, W), largest first. Raises DataError if it is no such image."""
        _check_image(image)
        options = self.options
        found = self._generate(
            Image.fromarray(image),
            points_per_batch=options.points_per_batch,
            points_per_crop=options.points_per_side,  # transformers means the points of one side
            crops_n_layers=options.crop_layers,
            pred_iou_thresh=options.pred_iou,
            stability_score_thresh=options.stability,
            crops_nms_thresh=options.box_nms,
        )["masks"]
        masks = np.array([np.asarray(mask) for mask in found], dtype=bool).reshape(-1, *image.shape[:2])
        return filter_proposals(masks, options)


def filter_proposals(masks: np.ndarray, options: ProposalFilter) -> np.ndarray:
    """Filter masks bool (N, H, W) of any origin -> those of the right area, largest first, without near duplicates."""
    pixels = torch.from_numpy(masks).flatten(1).float()
    overlap = (pixels @ pixels.T).numpy()  # exact: pixel counts stay far below 2^24
    return masks[_distinct(overlap, pixels.shape[1], options)]


def best_proposal(masks: np.ndarray, target: np.ndarray) -> tuple[int, float]:
    """Give index and IoU of the proposal (of N, H, W) that covers a target (H, W) best: the upper bound of any choice.

    The first of equals; (-1, 0.0) without proposals.
    """
    if not len(masks):
        return -1, 0.0
    inside, wanted = masks != 0, target != 0
    intersections = (inside & wanted).sum(axis=(1, 2))
    unions = (inside | wanted).sum(axis=(1, 2))
    ious = intersections / np.maximum(unions, 1)
    best = int(ious.argmax())
    return best, float(ious[best])


def _distinct(overlap: np.ndarray, pixels: int, options: ProposalFilter) -> list[int]:
    """Give indices to keep of masks with pairwise intersections (N, N), largest first and equal areas in the order given."""
    areas = np.diagonal(overlap)
    fitting = (areas >= max(1, options.min_area * pixels)) & (areas <= options.max_area * pixels)
    kept: list[int] = []
    for candidate in np.argsort(-areas, kind="stable").tolist():
        shared = overlap[candidate, kept]
        unions = areas[candidate] + areas[kept] - shared
        if fitting[candidate] and not np.any(shared >= options.max_iou * unions):
            kept.append(candidate)
        if len(kept) == options.max_count:
            break
    return kept


def _segment_overlaps(layers: list[np.ndarray]) -> np.ndarray:
    """Count common pixels (N, N) of all segments of all label maps (H, W), whose labels count from 0; areas on the diagonal.

    Counting pairs of labels takes one pass per pair of maps, where comparing masks would take one per pair of masks.
    """
    counts = [int(layer.max()) + 1 for layer in layers]
    blocks = [
        [
            np.bincount((first * n + second).ravel(), minlength=m * n).reshape(m, n)
            for second, n in zip(layers, counts, strict=True)
        ]
        for first, m in zip(layers, counts, strict=True)
    ]
    return np.block(blocks)


def _grown(masks: np.ndarray, pixels: int) -> np.ndarray:
    """Grow masks bool (N, H, W) by all pixels that are at most this far away, along rows and columns."""
    side = 2 * pixels + 1
    grown = [F.max_pool2d(torch.from_numpy(mask)[None].float(), side, 1, pixels)[0].numpy() > 0 for mask in masks]
    return np.stack(grown) if grown else masks


def _check_image(image: np.ndarray) -> None:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        raise DataError(f"proposals are made of an RGB image uint8 (H, W, 3); got {image.dtype} {image.shape}")


def _require(module: str, purpose: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ConfigError(f"{purpose} need {package} ({error}): pip install {package}") from error
