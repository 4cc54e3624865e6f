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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from ris_core.data import masks
from ris_core.data.letterbox import Mode, letterbox_image, unletterbox
from ris_core.data.text import encode, pad_tokens
from ris_core.errors import ConfigError, DataError
from ris_core.models.choice import choose
from ris_core.models.clip import normalise
from ris_core.models.proposals import proposal_options, proposer
from ris_core.models.systems import load_model, locates, trains, upsampled_map

ImageLike = str | Path | bytes | np.ndarray | Image.Image


@dataclass(frozen=True)
class Prediction:
    """One answer. mask: bool (H, W) at the image's own size; score: how sure the system is, 0 for an empty mask.

    probability: float (H, W), of each pixel. location: float (H, W), where the system looked: the coarse map of one that has
    one (LTS' position prior, RISCLIP's patch-level map), the relevance of proposals of one that chooses among them.
    """

    mask: np.ndarray
    score: float
    probability: np.ndarray
    location: np.ndarray | None = None

    @property
    def rle(self) -> dict[str, Any]:
        """COCO compressed RLE: {"size": [H, W], "counts": ascii}."""
        return {"size": list(self.mask.shape), "counts": masks.encode(self.mask)}


@dataclass(frozen=True)
class EncodedImage:
    """What a system knows of one image before it hears an expression; it stays valid whatever else is encoded.

    height, width: of the image itself. features: the system's own. proposals: bool (P, H, W), of one that chooses.
    """

    height: int
    width: int
    features: Any
    proposals: np.ndarray | None = None


class RISPredictor(ABC):
    """Encodes an image once (`encode`), then answers any number of expressions about it (`answer`).

    `set_image` and `predict` are the same for one person in a notebook: the predictor remembers the image last set, so
    they are not for threads.
    """

    def __init__(self, model: nn.Module, threshold: float = 0.5):
        self.model, self.threshold = model.eval(), check_threshold(threshold)
        self._image: EncodedImage | None = None

    @staticmethod
    def from_folder(folder: str | Path, device: str = "cpu", threshold: float = 0.5) -> RISPredictor:
        """Load a model (`model.json`, `model.safetensors`). Raises WeightsError if it is not one.

        Raises ConfigError if it chooses among proposals that cannot be made here; the reason is named.
        """
        model, info = load_model(folder, device)
        if trains(info["system"]):
            return MapPredictor(model, info["image_size"], info["word_len"], threshold, info.get("resample", "opencv4"))
        return ProposalPredictor(model, proposer(proposal_options(info["proposals"]), device))

    @torch.inference_mode()
    def encode(self, image: ImageLike) -> EncodedImage:
        """Take a path, encoded bytes, a PIL image, or an RGB array uint8 (H, W, 3). Raises DataError otherwise."""
        return self._encode(read_image(image))

    @torch.inference_mode()
    def answer(
        self, encoded: EncodedImage, expressions: Sequence[str], threshold: float | None = None
    ) -> list[Prediction]:
        """One prediction per expression about an encoded image.

        Raises DataError for a blank text, ConfigError for a threshold that is no number from 0 to 1.
        """
        blank = [i for i, text in enumerate(expressions) if not isinstance(text, str) or not text.strip()]
        if blank or isinstance(expressions, str) or not len(expressions):
            raise DataError(f"expressions must be a list of non-blank texts; got {expressions!r}")
        return self._answer(encoded, expressions, self.threshold if threshold is None else check_threshold(threshold))

    def set_image(self, image: ImageLike) -> None:
        """Encode an image and remember it for `predict`. Raises as `encode` does, and then remembers none."""
        self._image = None  # an image that cannot be read must not leave the one before it to be asked about
        self._image = self.encode(image)

    def predict(self, expressions: Sequence[str], threshold: float | None = None) -> list[Prediction]:
        """`answer` about the image last set. Raises DataError without one, and as `answer` does."""
        if self._image is None:
            raise DataError("no image is set: call set_image(...) before predict(...)")
        return self.answer(self._image, expressions, threshold)

    @abstractmethod
    def _encode(self, rgb: np.ndarray) -> EncodedImage:
        """What needs no text, of an image uint8 (H, W, 3)."""

    @abstractmethod
    def _answer(self, encoded: EncodedImage, expressions: Sequence[str], threshold: float) -> list[Prediction]:
        """Predictions from what `_encode` returned."""


class MapPredictor(RISPredictor):
    """Of a trained system: a pixel is in the mask if its probability is above the threshold.

    A score is the mean probability inside the mask.
    """

    def __init__(
        self, model: nn.Module, image_size: int, word_len: int, threshold: float = 0.5, resample: Mode = "opencv4"
    ):
        super().__init__(model, threshold)
        self.image_size, self.word_len, self.resample = image_size, word_len, resample
        self.device = next(model.parameters()).device

    def _encode(self, rgb: np.ndarray) -> EncodedImage:
        pixels = torch.from_numpy(letterbox_image(rgb, self.image_size, self.resample)).to(self.device)
        features = self.model.encode_image(normalise(pixels.permute(2, 0, 1)[None]))  # type: ignore[operator]
        return EncodedImage(rgb.shape[0], rgb.shape[1], features)

    def _answer(self, encoded: EncodedImage, expressions: Sequence[str], threshold: float) -> list[Prediction]:
        tokens = torch.from_numpy(np.stack([pad_tokens(encode(text), self.word_len) for text in expressions]))
        index = torch.zeros(len(tokens), dtype=torch.long, device=self.device)
        inputs = (encoded.features, tokens.to(self.device), index)
        full = self._original(self.model.segment(*inputs), encoded)  # type: ignore[operator]
        located = [None] * len(full)
        if locates(self.model):
            located = list(self._original(upsampled_map(self.model, inputs, self.image_size), encoded))
        predictions = []
        for probability, location in zip(full, located, strict=True):
            mask = probability > threshold
            score = float(probability[mask].mean()) if mask.any() else 0.0
            predictions.append(Prediction(mask, score, probability, location))
        return predictions

    def _original(self, logits: torch.Tensor, encoded: EncodedImage) -> np.ndarray:
        """Logits (N, 1, h, w) -> probabilities float (N, H, W) at the image's own size."""
        size = (encoded.height, encoded.width)
        probabilities = logits.float().sigmoid()[:, 0]
        return unletterbox(probabilities, *size, self.image_size, self.resample, "grid").cpu().numpy()


class ProposalPredictor(RISPredictor):
    """Of a zero-shot system: the mask is the proposal that it scores highest, whatever the threshold.

    A score is the softmax of that proposal's among all; a pixel's probability is that score inside the mask, 0 outside.
    `propose` maps an image uint8 (H, W, 3) to masks bool (P, H, W).
    """

    def __init__(self, model: nn.Module, propose: Callable[[np.ndarray], np.ndarray]):
        super().__init__(model)
        self.propose = propose

    def _encode(self, rgb: np.ndarray) -> EncodedImage:
        proposals = self.propose(rgb)
        features = self.model.encode_proposals(rgb, proposals)  # type: ignore[operator]
        return EncodedImage(rgb.shape[0], rgb.shape[1], features, proposals)

    def _answer(self, encoded: EncodedImage, expressions: Sequence[str], threshold: float) -> list[Prediction]:
        assert encoded.proposals is not None
        scores = self.model.score(encoded.features, expressions).float()  # type: ignore[operator]
        choice = choose(torch.from_numpy(encoded.proposals).to(scores.device), scores)
        return [
            Prediction(mask, float(share), mask * np.float32(share), relevance)
            for mask, share, relevance in zip(*(part.cpu().numpy() for part in choice), strict=True)
        ]


def check_threshold(threshold: float) -> float:
    """The threshold. Raises ConfigError unless it is a number from 0 to 1, as probabilities are."""
    if not 0 <= threshold <= 1:  # so written, not-a-number is outside
        raise ConfigError(f"the threshold is {threshold}: a probability is compared with it, use 0 to 1")
    return threshold


def read_image(image: ImageLike) -> np.ndarray:
    """RGB uint8 (H, W, 3) from a path, encoded bytes, a PIL image or an array. Raises DataError that names the problem."""
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise DataError(f"an image array must be uint8 (H, W, 3) RGB; got {image.dtype} {image.shape}")
        return image
    if isinstance(image, Image.Image):
        return np.asarray(image.convert("RGB"))
    if not isinstance(image, str | Path | bytes):
        raise DataError(f"an image is a path, encoded bytes, an array or a PIL image; got {type(image).__name__}")
    name = f"{len(image)} bytes" if isinstance(image, bytes) else str(image)
    try:
        with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as opened:
            return np.asarray(opened.convert("RGB"))
    except FileNotFoundError:
        raise DataError(f"no image at {name}") from None
    except Exception as error:  # bad files make Pillow raise OSError, SyntaxError, struct.error and others
        raise DataError(
            f"{name}: not an image that can be decoded ({type(error).__name__}); give a JPEG or PNG"
        ) from error
