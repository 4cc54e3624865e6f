"""The one decoder: every kind of image gives the same pixels, and what is no image says so without being obeyed."""

from __future__ import annotations

import base64
import struct
import subprocess
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, ImageFile, ImageOps

from ris_core.data.images import FORMATS, BadImage, decode_image, from_base64, load_image, opened, read_image
from ris_core.errors import DataError

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 6\n%%EndComments\n0 0 9 6 rectfill\nshowpage\n%%EOF\n"
UNKNOWN = f"it is none of the image formats read here ({', '.join(FORMATS)})"


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8)


@pytest.fixture
def picture(pixels: np.ndarray, tmp_path: Path) -> Path:
    """A file that loses nothing."""
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


@pytest.fixture
def jpeg(tmp_path: Path) -> Path:
    colours = np.random.default_rng(1).integers(0, 256, (60, 90, 3), np.uint8)
    Image.fromarray(colours).save(tmp_path / "photo.jpg")
    return tmp_path / "photo.jpg"


def png_that_claims(width: int, height: int) -> bytes:
    """The beginning of a PNG of that size, as a decoder meets it before any pixel."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)  # 8 bits of grey
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64))


def test_every_kind_of_image_gives_the_same_pixels(pixels: np.ndarray, picture: Path) -> None:
    with Image.open(picture) as image:
        for given in (picture, str(picture), picture.read_bytes(), image, pixels):
            found = read_image(given)
            assert (found.dtype, found.shape) == (np.uint8, (6, 9, 3))
            assert np.array_equal(found, pixels)
    assert np.array_equal(load_image(picture), pixels)
    assert np.array_equal(decode_image(picture.read_bytes()), pixels)


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_named_is_read_by_what_it_holds(format: str, pixels: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "no-ending"
    Image.fromarray(pixels).save(path, format)
    with Image.open(path) as image:
        expected = np.asarray(image.convert("RGB"))
    assert np.array_equal(read_image(path), expected)
    assert np.array_equal(read_image(path.read_bytes()), expected)


def test_a_photo_with_a_second_picture_in_it_is_its_first(tmp_path: Path) -> None:
    """MPO, as cameras write: a JPEG that others follow."""
    red, blue = (Image.new("RGB", (9, 6), colour) for colour in ("red", "blue"))
    red.save(tmp_path / "stereo.jpg", "MPO", save_all=True, append_images=[blue])
    with Image.open(tmp_path / "stereo.jpg") as image:
        assert image.format == "MPO"
    assert read_image(tmp_path / "stereo.jpg")[0, 0].tolist() == [254, 0, 0]


def test_grey_palette_transparent_and_print_images_become_rgb(tmp_path: Path) -> None:
    for mode in ("L", "P", "RGBA", "CMYK", "1", "LA"):
        place = tmp_path / "picture.tif"
        Image.new(mode, (9, 6)).save(place)
        for given in (place, place.read_bytes(), Image.new(mode, (9, 6))):
            found = read_image(given)
            assert (found.dtype, found.shape) == (np.uint8, (6, 9, 3))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_users_picture_is_turned_upright_and_a_datasets_photo_stays_as_coco_annotates_it(
    orientation: int, pixels: np.ndarray, tmp_path: Path
) -> None:
    stored = {  # what a camera held so writes, whose viewer sees `pixels`
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.transpose(1, 0, 2),
        6: pixels.transpose(1, 0, 2)[::-1],
        7: pixels[::-1, ::-1].transpose(1, 0, 2),
        8: pixels.transpose(1, 0, 2)[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    place = tmp_path / "turned.png"
    Image.fromarray(np.ascontiguousarray(stored)).save(place, exif=exif)
    with Image.open(place) as image:
        for given in (place, str(place), place.read_bytes(), image):
            shown = read_image(given)
            viewer = np.asarray(ImageOps.exif_transpose(Image.open(place)))
            assert np.array_equal(shown, viewer)
            if orientation in (1, 2, 3, 4):
                assert np.array_equal(shown, pixels)
            assert shown.shape == pixels.shape
    assert np.array_equal(load_image(place), stored)
    assert np.array_equal(decode_image(place.read_bytes()), stored)


@pytest.mark.parametrize("kind", ["png", "tif", "pgm", "big-endian tif"])
def test_sixteen_bits_keep_their_shades(kind: str, tmp_path: Path) -> None:
    shades = np.linspace(0, 65_535, 54).astype(np.uint16).reshape(6, 9)
    place = tmp_path / f"grey.{kind.split()[-1]}"
    if kind.startswith("big"):
        Image.frombytes("I;16B", (9, 6), shades.astype(">u2").tobytes()).save(place)
    elif kind == "pgm":
        place.write_bytes(b"P5 9 6 65535\n" + shades.astype(">u2").tobytes())
    else:
        Image.fromarray(shades).save(place)
    expected = np.repeat(np.rint(shades / 257).astype(np.uint8)[:, :, None], 3, axis=2)
    for given in (place, place.read_bytes()):
        assert np.array_equal(read_image(given), expected)
    assert np.array_equal(load_image(place), expected)


@pytest.mark.parametrize(("dtype", "kind"), [(np.int32, "integers of 32 bits"), (np.float32, "floating-point numbers")])
def test_pixels_without_a_known_black_and_white_are_refused(dtype: type, kind: str, tmp_path: Path) -> None:
    place = tmp_path / "measured.tif"
    Image.fromarray(np.arange(54, dtype=dtype).reshape(6, 9)).save(place)
    for read in (read_image, load_image):
        with pytest.raises(BadImage, match=f"its pixels are {kind}.*8 bits a channel"):
            read(place)


@pytest.mark.parametrize("size", [(70_000, 1), (1, 70_000), (9_000, 8_000), (1_780_000, 100)])
def test_more_pixels_than_memory_are_refused_before_they_are_decoded(size: tuple[int, int]) -> None:
    with pytest.raises(BadImage, match=r"give a smaller copy of it"):
        read_image(png_that_claims(*size))


def test_no_program_is_started_for_an_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[object] = []

    class Started(Exception):
        pass

    def start(*arguments: object, **_: object) -> None:
        started.append(arguments)
        raise Started

    monkeypatch.setattr(subprocess, "Popen", start)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", "gs")
    places = [tmp_path / name for name in ("drawing.eps", "drawing.jpg")]
    for place in places:
        place.write_bytes(EPS)
    with pytest.raises(Started), Image.open(places[0]) as image:
        image.load()  # what Pillow alone does with it
    assert len(started) == 1
    for given in (*places, *map(str, places), EPS):
        with pytest.raises(BadImage) as caught:
            read_image(given)
        assert caught.value.reason == UNKNOWN
    assert len(started) == 1


def test_too_many_pixels_are_refused_with_the_limit(tmp_path: Path) -> None:
    place = tmp_path / "bomb.png"
    place.write_bytes(png_that_claims(20_000, 20_000))
    for given in (place, place.read_bytes()):
        with pytest.raises(BadImage) as caught:
            read_image(given)
        assert caught.value.reason.startswith("it has more than 64 million pixels")
        assert caught.value.reason.endswith("give a smaller copy of it")
        assert "give a JPEG or PNG" not in str(caught.value)
        assert "attack" not in str(caught.value)


@pytest.mark.parametrize("address", ["http://example.org/a.jpg", "https://example.org/a.jpg?size=1"])
def test_an_address_is_not_fetched(address: str) -> None:
    with pytest.raises(DataError) as caught:
        read_image(address)
    assert str(caught.value) == (
        f"{address} is an address, and nothing is fetched here: download the image and give its path"
    )


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for given in (tmp_path / "nowhere.jpg", str(tmp_path / "nowhere.jpg")):
        with pytest.raises(DataError) as caught:
            read_image(given)
        assert str(caught.value) == f"no image at {tmp_path}/nowhere.jpg"
    with pytest.raises(BadImage) as missed:
        load_image(tmp_path / "nowhere.jpg")
    assert missed.value.reason == "No such file or directory"


def test_a_text_is_no_image(tmp_path: Path) -> None:
    place = tmp_path / "page.jpg"
    place.write_text("<html>404 Not Found</html>")
    with pytest.raises(BadImage) as caught:
        read_image(place)
    assert str(caught.value) == f"{place} cannot be used: {UNKNOWN}"
    with pytest.raises(BadImage) as caught:
        read_image(b"no image")
    assert str(caught.value) == f"an image of 8 bytes cannot be used: {UNKNOWN}"
    with pytest.raises(BadImage, match=r"an image of 0 bytes cannot be used: it is none of"):
        read_image(b"")


def test_a_folder_is_no_image(tmp_path: Path) -> None:
    with pytest.raises(BadImage) as caught:
        read_image(tmp_path)
    assert str(caught.value) == f"{tmp_path} cannot be used: Is a directory"


@pytest.mark.parametrize("share", [0.3, 0.9, 0.99])
def test_a_cut_photo_is_refused_not_filled_with_grey(share: float, jpeg: Path) -> None:
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    content = jpeg.read_bytes()
    jpeg.write_bytes(content[: int(share * len(content))])
    with pytest.raises(BadImage, match=r"photo\.jpg cannot be used: ") as caught:
        read_image(jpeg)
    assert "truncated" in caught.value.reason
    assert str(jpeg.parent) not in caught.value.reason
    with pytest.raises(BadImage, match=r"an image of \d+ bytes cannot be used: .*truncated"):
        read_image(jpeg.read_bytes())


def test_damage_that_pillow_calls_a_syntax_error(picture: Path) -> None:
    content = bytearray(picture.read_bytes())
    content[37:41] = b"\xff\xff\xff\xff"  # the length of a chunk
    picture.write_bytes(content)
    with pytest.raises(BadImage, match=r"picture\.png cannot be used: "):
        read_image(picture)


@pytest.mark.parametrize("array", [np.zeros((4, 5, 3)), np.zeros((4, 5), np.uint8), np.zeros((0, 5, 3), np.uint8)])
def test_an_array_must_hold_rgb_bytes(array: np.ndarray) -> None:
    with pytest.raises(DataError) as caught:
        read_image(array)
    assert str(caught.value) == f"an image array must be uint8 (H, W, 3) RGB; got {array.dtype} {array.shape}"


def test_an_open_image_is_closed_afterwards(picture: Path) -> None:
    with opened(picture, "it") as image:
        file = image.fp
        assert image.size == (9, 6)
        assert file is not None
        assert not file.closed
    assert file.closed


def test_what_goes_wrong_inside_the_block_has_the_given_name(jpeg: Path) -> None:
    jpeg.write_bytes(jpeg.read_bytes()[:-900])
    with (
        pytest.raises(BadImage, match="the photo cannot be used: image file is truncated"),
        opened(jpeg, "the photo") as p,
    ):
        p.load()


CONTENT = bytes(range(256)) + b"?>?"  # in base64 with + and /, which URLs write otherwise


@pytest.mark.parametrize(
    "text",
    [
        base64.b64encode(CONTENT).decode(),
        base64.b64encode(CONTENT).decode() + "\n",
        base64.encodebytes(CONTENT).decode(),
        base64.encodebytes(CONTENT).decode().replace("\n", "\r\n"),
        base64.urlsafe_b64encode(CONTENT).decode(),
        base64.b64encode(CONTENT + b"!").decode().rstrip("="),
        "data:image/png;base64," + base64.b64encode(CONTENT).decode(),
        " data:image/jpeg;name=a.jpg;BASE64," + base64.urlsafe_b64encode(CONTENT).decode().rstrip("="),
    ],
)
def test_base64_is_read_in_all_its_forms(text: str) -> None:
    assert from_base64(text).startswith(CONTENT)


@pytest.mark.parametrize(
    "text",
    ["", "====", "street.jpg", "straße", "data:image/png,abcd", "data:text/plain;base64,", "a,b,c", "QUJ DR\0UY", "Q"],
)
def test_what_is_no_base64_is_refused_and_not_repeated(text: str) -> None:
    with pytest.raises(
        DataError, match=rf"^an image text of {len(text)} characters is not base64 of an encoded image$"
    ):
        from_base64(text)
