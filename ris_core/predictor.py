"""Image and expression in, mask out: what a downstream team uses.

predictor = RISPredictor.from_folder("models/cris-shapes")
street = predictor.encode("street.jpg")
mask = predictor.answer(street, ["the man in the red cap"])[0].mask

A predictor keeps nothing of what it is asked, so that threads can share it: what is known of an image is the caller's.
"""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import numpy as np
import torch
from PIL import Image

from ris_core.data import masks
from ris_core.data.images import ImageLike, read_image
from ris_core.data.letterbox import Mode, letterbox_image
from ris_core.data.outlines import polygons
from ris_core.device import autocast, best_device
from ris_core.errors import DataError, WeightsError, short
from ris_core.models.answer import Frame, Reading, choose, read_map, resized, smoothly_resized
from ris_core.models.clip import normalise
from ris_core.models.contract import MapSystem, ProposalSystem, System
from ris_core.models.proposals import proposal_options, proposer
from ris_core.models.registry import load_model

Features = TypeVar("Features")


@dataclass(frozen=True)
class Prediction:
    """One answer. mask: bool (H, W) at the image's own size; score: how sure the system is, 0 for an empty mask.

    probability: float (H, W), of each pixel. location: float (H, W), where the system looked: the coarse map of one that has
    one (LTS' position prior, RISCLIP's patch-level map), the relevance of proposals of one that chooses among them. cut:
    whether the expression was longer than the system reads, and its end not heard.

    H and W are the reading's resolution where that is not the image's own.
    """

    mask: np.ndarray
    score: float
    probability: np.ndarray
    location: np.ndarray | None = None
    cut: bool = False

    @property
    def rle(self) -> dict[str, Any]:
        """Give COCO compressed RLE: {"size": [H, W], "counts": ascii}."""
        return {"size": list(self.mask.shape), "counts": masks.encode(self.mask)}

    @property
    def polygons(self) -> list[list[float]]:
        """Give COCO polygons `[x0, y0, x1, y1, ...]` in pixels, one a piece; see `data.outlines.polygons`."""
        return polygons(self.mask)

    @property
    def png(self) -> bytes:
        """Give a PNG file, grey (H, W), 255 inside the mask and 0 outside."""
        buffer = io.BytesIO()
        Image.fromarray(self.mask.astype(np.uint8) * np.uint8(255)).save(buffer, "PNG")
        return buffer.getvalue()


@dataclass(frozen=True)
class EncodedImage(Generic[Features]):
    """What a system knows of one image before it hears an expression; it stays valid whatever else is encoded.

    height, width: of the image itself. features: the system's own. proposals: bool (P, H, W), of one that chooses.
    """

    height: int
    width: int
    features: Features
    proposals: np.ndarray | None = None

    @property
    def nbytes(self) -> int:
        """Tell what it holds, in bytes, on whichever device."""
        return _nbytes(self.features) + (0 if self.proposals is None else self.proposals.nbytes)


def _nbytes(features: object) -> int:
    if isinstance(features, torch.Tensor):
        return features.nbytes
    if is_dataclass(features):
        return sum(_nbytes(getattr(features, each.name)) for each in fields(features))
    return sum(_nbytes(each) for each in features) if isinstance(features, tuple) else 0


class RISPredictor(ABC):
    """Encodes an image once (`encode`), then answers any number of expressions about it (`answer`).

    `set_image` and `predict` are the same for one person in a notebook: the predictor remembers the image last set, so
    they are not for threads.
    """

    def __init__(self, model: System, reading: Reading, most_tokens: int):
        self.model, self.reading, self.most_tokens = model.eval(), reading, most_tokens
        self.device = next(model.parameters()).device
        self._image: EncodedImage | None = None

    @staticmethod
    def from_folder(
        folder: str | Path,
        device: str | torch.device | None = None,
        threshold: float | None = None,
        reading: Reading | None = None,
        precision: str = "auto",
    ) -> RISPredictor:
        """Load a model (`model.json`, `model.safetensors`), by default on the best device there is.

        `reading` says how answers are read, by default as protocol `ours` does; `threshold` replaces its threshold;
        `precision` (of `device.PRECISIONS`) is that of a trained system's network.
        Raises WeightsError if the folder holds no model, ConfigError if it chooses among proposals that cannot be made here;
        the reason is named.
        """
        reading = reading or Reading()
        if threshold is not None:
            reading = replace(reading, threshold=threshold)
        model, described = load_model(folder, device or best_device())
        info = described.info
        if isinstance(model, MapSystem):
            if info.word_len is None:
                raise WeightsError(
                    f"{folder} is what a training starts from (its word_len is not set): give a trained model"
                )
            return MapPredictor(model, info.image_size, info.word_len, cast("Mode", info.resample), reading, precision)
        assert isinstance(model, ProposalSystem)
        if info.proposals is None:
            raise WeightsError(f"{folder}/model.json does not say among which proposals it chooses: export it again")
        make = proposer(proposal_options(info.proposals), next(model.parameters()).device)
        return ProposalPredictor(model, make, reading)

    @torch.inference_mode()
    def encode(self, image: ImageLike) -> EncodedImage:
        """Take a path, encoded bytes, a PIL image, or an RGB array uint8 (H, W, 3). Raises DataError otherwise."""
        return self._encode(read_image(image))

    @torch.inference_mode()
    def answer(
        self, encoded: EncodedImage, expressions: Sequence[str], threshold: float | None = None
    ) -> list[Prediction]:
        """Give one prediction per expression about an encoded image.

        Raises DataError for a blank text, ConfigError for a threshold that is no number from 0 to 1.
        """
        blank = [i for i, text in enumerate(expressions) if not isinstance(text, str) or not text.strip()]
        if blank or isinstance(expressions, str) or not len(expressions):
            raise DataError(f"expressions must be a list of non-blank texts; got {short(expressions)}")
        reading = self.reading if threshold is None else replace(self.reading, threshold=threshold)
        cut = [self.model.count_tokens(text) > self.most_tokens for text in expressions]
        found = self._answer(encoded, expressions, reading)
        return [replace(each, cut=was) for each, was in zip(found, cut, strict=True)]

    def segment(
        self, images: Sequence[ImageLike], expressions: Sequence[Sequence[str]], threshold: float | None = None
    ) -> list[list[Prediction]]:
        """Give for each of N images one prediction per expression about it: N lists of texts, or one list for all images.

        Raises DataError for lists of another number, and as `encode` and `answer` do.
        """
        if isinstance(expressions, str) or all(isinstance(each, str) for each in expressions):
            expressions = [cast("Sequence[str]", expressions)] * len(images)
        if len(expressions) != len(images):
            raise DataError(
                f"{len(images)} images and {len(expressions)} lists of expressions: give a list for each, or one for all"
            )
        return [
            self.answer(self.encode(image), texts, threshold) for image, texts in zip(images, expressions, strict=True)
        ]

    def set_image(self, image: ImageLike) -> None:
        """Encode an image and remember it for `predict`. Raises as `encode` does, and then remembers none."""
        self._image = None  # an image that cannot be read must not leave the one before it to be asked about
        self._image = self.encode(image)

    def predict(self, expressions: Sequence[str], threshold: float | None = None) -> list[Prediction]:
        """Do `answer` about the image last set. Raises DataError without one, and as `answer` does."""
        if self._image is None:
            raise DataError("no image is set: call set_image(...) before predict(...)")
        return self.answer(self._image, expressions, threshold)

    @abstractmethod
    def _encode(self, rgb: np.ndarray) -> EncodedImage:
        """Give what needs no text, of an image uint8 (H, W, 3)."""

    @abstractmethod
    def _answer(self, encoded: EncodedImage, expressions: Sequence[str], reading: Reading) -> list[Prediction]:
        """Give predictions from what `_encode` returned."""


class MapPredictor(RISPredictor):
    """Of a trained system: a pixel is in the mask if its probability is above the threshold.

    A score is the mean probability inside the mask.
    """

    def __init__(
        self,
        model: MapSystem,
        image_size: int,
        word_len: int,
        resample: Mode = "opencv4",
        reading: Reading = Reading(),  # noqa: B008  # it is frozen
        precision: str = "auto",
    ):
        super().__init__(model, reading, word_len)
        self.system, self.image_size, self.resample, self.precision = model, image_size, resample, precision

    def _encode(self, rgb: np.ndarray) -> EncodedImage:
        pixels = torch.from_numpy(letterbox_image(rgb, self.image_size, self.resample)).to(self.device)
        with autocast(self.precision, self.device):
            features = self.system.encode_image(normalise(pixels.permute(2, 0, 1)[None]))
        return EncodedImage(rgb.shape[0], rgb.shape[1], features)

    def _answer(self, encoded: EncodedImage, expressions: Sequence[str], reading: Reading) -> list[Prediction]:
        tokens = self.system.tokenize(expressions, self.most_tokens).to(self.device)
        index = torch.zeros(len(tokens), dtype=torch.long, device=self.device)
        frame = Frame(encoded.height, encoded.width, self.image_size, self.resample)
        with autocast(self.precision, self.device):
            logits = self.system.segment(encoded.features, tokens, index)
            where = (
                self.system.located(encoded.features, tokens, index, self.image_size) if self.system.locates else None
            )
        found = read_map(logits, frame, reading)
        located = None if where is None else read_map(where, frame, reading).probabilities.cpu().numpy()
        parts = zip(*(part.cpu().numpy() for part in found), strict=True)
        return [
            Prediction(mask, float(score), probability, None if located is None else located[i])
            for i, (mask, score, probability) in enumerate(parts)
        ]


class ProposalPredictor(RISPredictor):
    """Of a zero-shot system: the mask is the proposal that it scores highest, whatever the threshold.

    A score is the softmax of that proposal's among all; a pixel's probability is that score inside the mask, 0 outside.
    `propose` maps an image uint8 (H, W, 3) to masks bool (P, H, W).
    """

    def __init__(
        self,
        model: ProposalSystem,
        propose: Callable[[np.ndarray], np.ndarray],
        reading: Reading = Reading(),  # noqa: B008  # it is frozen
    ):
        super().__init__(model, reading, model.context_length)
        self.system, self.propose = model, propose

    def _encode(self, rgb: np.ndarray) -> EncodedImage:
        proposals = self.propose(rgb)
        features = self.system.encode_proposals(rgb, proposals)
        return EncodedImage(rgb.shape[0], rgb.shape[1], features, proposals)

    def _answer(self, encoded: EncodedImage, expressions: Sequence[str], reading: Reading) -> list[Prediction]:
        assert encoded.proposals is not None
        scores = self.system.score(encoded.features, expressions).float()
        proposals = torch.from_numpy(encoded.proposals).to(scores.device)
        choice = choose(proposals, scores)
        return [
            Prediction(mask, float(share), mask * np.float32(share), relevance)
            for mask, share, relevance in zip(
                resized(choice.masks, reading).cpu().numpy(),
                choice.shares.cpu().numpy(),
                smoothly_resized(choice.relevance(proposals), reading).cpu().numpy(),
                strict=True,
            )
        ]
