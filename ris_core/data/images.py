"""The one decoder of images: whatever is given becomes RGB uint8 (H, W, 3), or an error that says what is wrong with it.

EXIF orientation is ignored, as COCO's annotations do.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from ris_core.errors import DataError

ImageLike = str | Path | bytes | np.ndarray | Image.Image

# Pillow decodes these itself. For others it starts programs of the machine, on bytes that anybody may have sent.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")


SHOWN = 200  # characters of a text that was given as a path


class BadImage(DataError):
    """An image that cannot be decoded or contradicts its annotation; `reason` is the same wherever the file lies."""

    def __init__(self, name: str | Path, reason: str):
        super().__init__(name, reason)
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.args[0]} cannot be used: {self.reason}"


def load_image(path: Path) -> np.ndarray:
    """Decode an image file to RGB uint8 (H, W, 3).

    Raises BadImage for a file that is missing, truncated or otherwise no whole image.
    """
    with opened(path, path) as image:
        return np.asarray(image.convert("RGB"))


def read_image(image: ImageLike) -> np.ndarray:
    """Read RGB uint8 (H, W, 3) from a path, encoded bytes, a PIL image or an array. Raises DataError that names the problem."""
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise DataError(f"an image array must be uint8 (H, W, 3) RGB; got {image.dtype} {image.shape}")
        return image
    if isinstance(image, Image.Image):
        with whole("the PIL image"):  # which may have been opened and not read yet
            return np.asarray(image.convert("RGB"))
    if isinstance(image, bytes):
        return decode_image(image)
    if not isinstance(image, str | Path):
        raise DataError(f"an image is a path, encoded bytes, an array or a PIL image; got {type(image).__name__}")
    if str(image).startswith(("http://", "https://")):
        raise DataError(
            f"{str(image)[:SHOWN]} is an address, and nothing is fetched here: download the image and give its path"
        )
    if not os.path.exists(image):
        raise DataError(f"no image at {str(image)[:SHOWN]}")
    return load_image(Path(image))


def decode_image(content: bytes) -> np.ndarray:
    """Decode an encoded image to RGB uint8 (H, W, 3). Raises BadImage, which names it by its size."""
    with opened(io.BytesIO(content), f"an image of {len(content)} bytes") as image:
        return np.asarray(image.convert("RGB"))


@contextmanager
def opened(source: Path | BinaryIO, name: str | Path) -> Iterator[Image.Image]:
    """Open a Pillow image to look at or decode in the block. Raises BadImage of that name for whatever Pillow raises there."""
    with whole(name), Image.open(source, formats=FORMATS) as image:
        yield image


@contextmanager
def whole(name: str | Path) -> Iterator[None]:
    """Inside the block, raise BadImage of that name for whatever Pillow raises."""
    try:
        yield
    except UnidentifiedImageError:  # its text holds the path
        raise BadImage(name, f"it is none of the image formats read here ({', '.join(FORMATS)})") from None
    except Image.DecompressionBombError as error:
        raise BadImage(name, f"{str(error).split(', could')[0]}; give a smaller copy of it") from None
    except Exception as error:  # bad files make Pillow raise OSError, SyntaxError, struct.error and others
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise BadImage(name, reason or type(error).__name__) from error
