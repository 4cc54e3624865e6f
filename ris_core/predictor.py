"""Image and expression in, mask out: what a downstream team uses.

predictor = RISPredictor.from_folder("models/cris-shapes")
predictor.set_image("street.jpg")
mask = predictor.predict(["the man in the red cap"])[0].mask
"""

from __future__ import annotations

import io
from collections.abc import Sequence
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
from ris_core.errors import DataError
from ris_core.models.clip import normalise
from ris_core.models.systems import load_model, locates, upsampled_map

ImageLike = str | Path | bytes | np.ndarray | Image.Image


@dataclass(frozen=True)
class Prediction:
    """One answer. mask: bool (H, W) at the image's own size; score: mean probability inside the mask, 0 if it is empty.

    probability: float (H, W), of each pixel. location: float (H, W), the coarse map of a system that has one (LTS' position
    prior, RISCLIP's patch-level map).
    """

    mask: np.ndarray
    score: float
    probability: np.ndarray
    location: np.ndarray | None = None

    @property
    def rle(self) -> dict[str, Any]:
        """COCO compressed RLE: {"size": [H, W], "counts": ascii}."""
        return {"size": list(self.mask.shape), "counts": masks.encode(self.mask)}


class RISPredictor:
    """Encodes an image once (`set_image`), then answers any number of expressions about it (`predict`)."""

    def __init__(
        self, model: nn.Module, image_size: int, word_len: int, threshold: float = 0.5, resample: Mode = "opencv4"
    ):
        self.model, self.image_size, self.word_len, self.threshold = model.eval(), image_size, word_len, threshold
        self.resample = resample
        self.device = next(model.parameters()).device
        self._features: Any = None
        self._size = (0, 0)

    @classmethod
    def from_folder(cls, folder: str | Path, device: str = "cpu", threshold: float = 0.5) -> RISPredictor:
        """Load a trained model (`model.json`, `model.safetensors`). Raises WeightsError if it is not one."""
        model, info = load_model(folder, device)
        return cls(model, info["image_size"], info["word_len"], threshold, info.get("resample", "opencv4"))

    @torch.inference_mode()
    def set_image(self, image: ImageLike) -> None:
        """Take a path, encoded bytes, a PIL image, or an RGB array uint8 (H, W, 3). Raises DataError otherwise."""
        self._features = None  # an image that cannot be read must not leave the one before it to be asked about
        rgb = read_image(image)
        pixels = torch.from_numpy(letterbox_image(rgb, self.image_size, self.resample)).to(self.device)
        self._features = self.model.encode_image(normalise(pixels.permute(2, 0, 1)[None]))  # type: ignore[operator]
        self._size = (rgb.shape[0], rgb.shape[1])

    @torch.inference_mode()
    def predict(self, expressions: Sequence[str], threshold: float | None = None) -> list[Prediction]:
        """One prediction per expression about the image last set. Raises DataError without an image or with a blank text."""
        if self._features is None:
            raise DataError("no image is set: call set_image(...) before predict(...)")
        blank = [i for i, text in enumerate(expressions) if not isinstance(text, str) or not text.strip()]
        if blank or isinstance(expressions, str) or not len(expressions):
            raise DataError(f"expressions must be a list of non-blank texts; got {expressions!r}")
        tokens = torch.from_numpy(np.stack([pad_tokens(encode(text), self.word_len) for text in expressions]))
        index = torch.zeros(len(tokens), dtype=torch.long, device=self.device)
        inputs = (self._features, tokens.to(self.device), index)
        full = self._original(self.model.segment(*inputs))  # type: ignore[operator]
        located = [None] * len(full)
        if locates(self.model):
            located = list(self._original(upsampled_map(self.model, inputs, self.image_size)))
        chosen = self.threshold if threshold is None else threshold
        predictions = []
        for probability, location in zip(full, located, strict=True):
            mask = probability > chosen
            score = float(probability[mask].mean()) if mask.any() else 0.0
            predictions.append(Prediction(mask, score, probability, location))
        return predictions

    def _original(self, logits: torch.Tensor) -> np.ndarray:
        """Logits (N, 1, h, w) -> probabilities float (N, H, W) at the image's own size."""
        probabilities = logits.float().sigmoid()[:, 0]
        return unletterbox(probabilities, *self._size, self.image_size, self.resample, "grid").cpu().numpy()


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
