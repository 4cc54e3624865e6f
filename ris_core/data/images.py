"""The one decoder of images: whatever is given becomes RGB uint8 (H, W, 3), or an error that says what is wrong with it.

A picture of a user's (`read_image`) is turned upright as its EXIF orientation says, as every viewer shows it. A dataset's
photo (`load_image`) stays as it is stored: COCO's annotations are drawn on that.
"""

from __future__ import annotations

import base64
import io
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ris_core.errors import DataError

ImageLike = str | Path | bytes | np.ndarray | Image.Image

# Pillow decodes these itself. For others it starts programs of the machine, on bytes that anybody may have sent.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
# A file of a few kilobytes may hold more pixels than memory does. Today's largest sensors in phones give 200 million, which
# they join to 50 or fewer.
MAX_PIXELS = 64_000_000
MAX_SIDE = 65_535

SHOWN = 200  # characters of a text that was given as a path

_SPACE = re.compile(r"\s+")
_URL_SAFE = str.maketrans("-_", "+/")


class BadImage(DataError):
    """An image that cannot be decoded or contradicts its annotation; `reason` is the same wherever the file lies."""

    def __init__(self, name: str | Path, reason: str):
        super().__init__(name, reason)
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.args[0]} cannot be used: {self.reason}"


def load_image(path: Path) -> np.ndarray:
    """Decode an image file to RGB uint8 (H, W, 3), as it is stored.

    Raises BadImage for a file that is missing, truncated or otherwise no whole image.
    """
    with opened(path, path) as image:
        return _rgb(image, path)


def read_image(image: ImageLike) -> np.ndarray:
    """Read RGB uint8 (H, W, 3) from a path, encoded bytes, a PIL image or an array, upright where it says what that is.

    Raises DataError that names the problem.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise DataError(f"an image array must be uint8 (H, W, 3) RGB; got {image.dtype} {image.shape}")
        _check_size(image.shape[1], image.shape[0], "the image array")
        return image
    if isinstance(image, Image.Image):
        with whole("the PIL image"):  # which may have been opened and not read yet
            _check_size(*image.size, "the PIL image")
            return _rgb(image, "the PIL image", upright=True)
    if isinstance(image, bytes):
        with opened(io.BytesIO(image), _by_size(image)) as picture:
            return _rgb(picture, _by_size(image), upright=True)
    if not isinstance(image, str | Path):
        raise DataError(f"an image is a path, encoded bytes, an array or a PIL image; got {type(image).__name__}")
    if str(image).startswith(("http://", "https://")):
        raise DataError(
            f"{str(image)[:SHOWN]} is an address, and nothing is fetched here: download the image and give its path"
        )
    if not os.path.exists(image):
        raise DataError(f"no image at {str(image)[:SHOWN]}")
    with opened(Path(image), image) as picture:
        return _rgb(picture, image, upright=True)


def decode_image(content: bytes) -> np.ndarray:
    """Decode an encoded image to RGB uint8 (H, W, 3), as it is stored. Raises BadImage, which names it by its size."""
    with opened(io.BytesIO(content), _by_size(content)) as image:
        return _rgb(image, _by_size(content))


def from_base64(text: str) -> bytes:
    """Give the bytes of an image in base64 as it comes: with line ends, as a data URI, URL-safe, or without its padding.

    Raises DataError for anything else; what was given is not told, as it may be long, or nobody's business.
    """
    try:  # what programs send: megabytes at a time, and several times faster than what follows
        if plain := base64.b64decode(text, validate=True):
            return plain
    except ValueError:
        pass
    head, comma, rest = text.partition(",")
    if comma and not (head.lstrip().lower().startswith("data:") and head.rstrip().lower().endswith(";base64")):
        raise DataError(f"an image text of {len(text)} characters is not base64 of an encoded image")
    letters = _SPACE.sub("", rest if comma else text).translate(_URL_SAFE).rstrip("=")
    try:
        content = base64.b64decode(letters + "=" * (-len(letters) % 4), validate=True)
    except ValueError:  # which also text beyond ASCII gives
        content = b""
    if not content:
        raise DataError(f"an image text of {len(text)} characters is not base64 of an encoded image")
    return content


def _by_size(content: bytes) -> str:
    return f"an image of {len(content)} bytes"


def _rgb(image: Image.Image, name: str | Path, upright: bool = False) -> np.ndarray:
    """Give the pixels in 8 bits. Pillow would cut more than 8 bits off at 255, which makes such images white."""
    of_16_bits = _of_16_bits(image)  # before it is turned, which forgets the format
    if upright:
        image = ImageOps.exif_transpose(image)
    if of_16_bits:
        levels = (np.asarray(image).astype(np.uint32) * 255 + 32_767) // 65_535
        return np.repeat(levels.astype(np.uint8)[:, :, None], 3, axis=2)
    check_depth(image, name)
    return np.asarray(image.convert("RGB"))


def check_depth(image: Image.Image, name: str | Path) -> None:
    """Raise BadImage where the pixels are numbers that do not say what is white."""
    if image.mode == "F" or (image.mode == "I" and not _of_16_bits(image)):
        kind = "integers of 32 bits" if image.mode == "I" else "floating-point numbers"
        raise BadImage(
            name, f"its pixels are {kind}, whose black and white are not known; save it with 8 bits a channel"
        )


def _of_16_bits(image: Image.Image) -> bool:
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))


def _check_size(width: int, height: int, name: str | Path) -> None:
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise BadImage(
            name,
            f"it has {width}x{height} pixels, and {MAX_PIXELS // 10**6} million with sides of {MAX_SIDE} are the most; give a "
            "smaller copy of it",
        )


@contextmanager
def opened(source: Path | BinaryIO, name: str | Path) -> Iterator[Image.Image]:
    """Open a Pillow image to look at or decode in the block. Raises BadImage of that name for whatever Pillow raises there."""
    with whole(name), Image.open(source, formats=FORMATS) as image:
        _check_size(*image.size, name)
        yield image


@contextmanager
def whole(name: str | Path) -> Iterator[None]:
    """Inside the block, raise BadImage of that name for whatever Pillow raises."""
    try:
        yield
    except BadImage:
        raise
    except UnidentifiedImageError:  # its text holds the path
        raise BadImage(name, f"it is none of the image formats read here ({', '.join(FORMATS)})") from None
    except Image.DecompressionBombError:  # Pillow's own limit is above ours
        raise BadImage(
            name, f"it has more than {MAX_PIXELS // 10**6} million pixels; give a smaller copy of it"
        ) from None
    except Exception as error:  # bad files make Pillow raise OSError, SyntaxError, struct.error and others
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise BadImage(name, reason or type(error).__name__) from error
