"""What a predictor knows of the images last asked about, for servers: an image is decoded and encoded once for many clients."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Hashable
from concurrent.futures import Future
from pathlib import Path
from threading import Lock

import numpy as np
from cachetools import LRUCache

from ris_core.data.images import ImageLike, read_image
from ris_core.predictor import EncodedImage, RISPredictor

MAX_BYTES = 512 * 1024**2


class Encodings:
    """Encoded images by the digest of what was given, at most `max_bytes` of them, those last used; for any number of threads.

    Threads that ask for the same new image at the same time wait for one of them to encode it. A file is known by its
    content, not by its name. What could not be encoded is not remembered.
    """

    def __init__(self, predictor: RISPredictor, max_bytes: int = MAX_BYTES):
        self.predictor = predictor
        self._known: LRUCache[Hashable, EncodedImage] = LRUCache(max_bytes, getsizeof=lambda encoded: encoded.nbytes)
        self._coming: dict[Hashable, Future[EncodedImage]] = {}
        self._lock = Lock()
        self.hits = self.misses = 0

    @property
    def nbytes(self) -> int:
        """Tell what is held, in bytes."""
        return int(self._known.currsize)

    def encode(self, image: ImageLike) -> EncodedImage:
        """Give what `RISPredictor.encode` does, remembered or new. Raises as that does."""
        image = _content(image)
        key = _digest(image)
        with self._lock:
            found = self._known.get(key)
            if found is not None:
                self.hits += 1
                return found
            coming = self._coming.get(key)
            if mine := coming is None:
                self.misses += 1
                coming = self._coming[key] = Future()
        assert coming is not None
        if not mine:
            return coming.result()
        try:
            encoded = self.predictor.encode(image)
        except BaseException as error:
            coming.set_exception(error)
            raise
        else:
            coming.set_result(encoded)
            with self._lock:
                if encoded.nbytes <= self._known.maxsize:
                    self._known[key] = encoded
            return encoded
        finally:
            with self._lock:
                del self._coming[key]


def _content(image: ImageLike) -> bytes | np.ndarray:
    """Give encoded bytes as they are, and those of a file; pixels of all else."""
    if isinstance(image, bytes):
        return image
    if isinstance(image, str | Path) and os.path.isfile(image):
        return Path(image).read_bytes()
    return read_image(image)


def _digest(image: bytes | np.ndarray) -> Hashable:
    if isinstance(image, bytes):
        return hashlib.sha256(image).digest()
    return image.shape, hashlib.sha256(image.tobytes()).digest()
