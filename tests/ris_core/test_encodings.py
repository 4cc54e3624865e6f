"""Images encoded once for many threads, within a bound of bytes, each client getting what it would get alone."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pipelines_world import export_untrained
from tiny_world import Tiny

from ris_core.data.images import ImageLike
from ris_core.encodings import Encodings
from ris_core.errors import DataError
from ris_core.predictor import EncodedImage, RISPredictor


@pytest.fixture(scope="module", params=["cris", "risclip", "lts", "global_local"])
def predictor(request: pytest.FixtureRequest, tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> RISPredictor:
    place = tmp_path_factory.mktemp("model") / request.param
    export_untrained(tiny, place, request.param)
    return RISPredictor.from_folder(place)


def pictures(count: int) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [
        np.asarray(Image.fromarray(random.integers(0, 255, (6, 8, 3), dtype=np.uint8)).resize((96, 72)))
        for _ in range(count)
    ]


class Counting:
    """A predictor that counts what it encodes, and takes its time."""

    def __init__(self, nbytes: int = 100):
        self.asked: list[ImageLike] = []
        self.encoded = EncodedImage(2, 2, None, np.zeros(nbytes, bool))

    def encode(self, image: ImageLike) -> EncodedImage:
        self.asked.append(image)
        time.sleep(0.02)
        if isinstance(image, bytes) and image == b"bad":
            raise DataError("no picture")
        return EncodedImage(2, 2, len(self.asked), self.encoded.proposals)


def test_many_threads_get_what_each_would_get_alone(predictor: RISPredictor) -> None:
    some, texts = pictures(5), ["the red star", "left"]
    alone = [[each.mask for each in predictor.answer(predictor.encode(image), texts)] for image in some]
    size = predictor.encode(some[0]).nbytes
    assert size > 1000
    shared = Encodings(predictor, max_bytes=3 * size)

    def ask(number: int) -> Sequence[np.ndarray]:
        return [each.mask for each in predictor.answer(shared.encode(some[number % 5]), texts)]

    with ThreadPoolExecutor(8) as threads:
        for number, found in enumerate(threads.map(ask, range(40))):
            assert all((a == b).all() for a, b in zip(found, alone[number % 5], strict=True))
            assert shared.nbytes <= 3 * size


def test_threads_that_ask_at_once_wait_for_one(tmp_path: Path) -> None:
    counting: Any = Counting()
    shared = Encodings(counting)
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda _: shared.encode(b"same"), range(8)))
    assert len(counting.asked) == 1
    assert {each.features for each in found} == {1}
    assert (shared.hits + shared.misses, shared.nbytes) == (shared.hits + 1, 100)


def test_the_last_used_stay_and_what_is_too_large_is_answered_all_the_same() -> None:
    counting: Any = Counting()
    shared = Encodings(counting, max_bytes=250)
    for image in (b"one", b"two", b"one", b"three", b"one", b"two"):
        shared.encode(image)
        assert shared.nbytes <= 250
    assert counting.asked == [b"one", b"two", b"three", b"two"]
    large: Any = Counting(nbytes=300)
    shared = Encodings(large, max_bytes=250)
    assert [shared.encode(b"one").features for _ in range(2)] == [1, 2]
    assert shared.nbytes == 0


def test_an_error_goes_to_all_that_waited_and_is_not_remembered() -> None:
    counting: Any = Counting()
    shared = Encodings(counting)

    def ask(_: int) -> str:
        try:
            shared.encode(b"bad")
        except DataError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(4) as threads:
        assert set(threads.map(ask, range(4))) == {"no picture"}
    before = len(counting.asked)
    ask(0)
    assert len(counting.asked) == before + 1
    assert shared.nbytes == 0


def test_a_file_is_known_by_its_content(tmp_path: Path) -> None:
    counting: Any = Counting()
    shared = Encodings(counting)
    for name in ("a.png", "b.png"):
        Image.fromarray(pictures(1)[0]).save(tmp_path / name)
    shared.encode(tmp_path / "a.png")
    shared.encode(str(tmp_path / "b.png"))
    assert len(counting.asked) == 1
    Image.fromarray(pictures(2)[1]).save(tmp_path / "a.png")
    shared.encode(tmp_path / "a.png")
    assert len(counting.asked) == 2
    with pytest.raises(DataError, match="no image at"):
        shared.encode(tmp_path / "none.png")
    pixels = pictures(1)[0]
    assert shared.encode(pixels) is shared.encode(pixels.copy()) is shared.encode(Image.fromarray(pixels))
