from pathlib import Path

import pytest
from PIL import Image
from refer_fixture import HTML, IMAGES_2014, IMAGES_2017, small_dataset, write_jpeg

from ris_core.data.images import FORMATS
from ris_core.data.refer.photos import check_images, locate_images
from ris_core.data.refer.rows import ImageInfo
from ris_core.errors import DataError

IMAGES = [ImageInfo(n, f"COCO_train2014_{n:012d}.jpg", 80, 100) for n in range(1, 7)]


def problems_of(root: Path, images: list[ImageInfo] = IMAGES) -> dict[int, tuple[str, str]]:
    found = check_images(root, images, locate_images(root, images), workers=2).problems
    return {number: (problem.kind, problem.message) for number, problem in found.items()}


@pytest.mark.parametrize("folder", [IMAGES_2014, "images/train2014", IMAGES_2017, "images/train2017"])
def test_both_layouts_and_both_namings_are_found(tmp_path: Path, folder: str) -> None:
    small_dataset().write(tmp_path, image_folder=folder)
    located = locate_images(tmp_path, IMAGES)
    assert not located.missing
    stem = "" if folder.endswith("2017") else "COCO_train2014_"
    assert located.paths == {n: f"{folder}/{stem}{n:012d}.jpg" for n in range(1, 7)}
    decoded = check_images(tmp_path, IMAGES, located, workers=2)
    assert decoded.problems == {}
    assert decoded.not_rgb == 1  # image 3 is grey


def test_images_may_be_spread_over_folders(tmp_path: Path) -> None:
    small_dataset().write(tmp_path, image_folder=IMAGES_2014)
    small_dataset().write(tmp_path, image_folder=IMAGES_2017)
    (tmp_path / IMAGES_2014 / IMAGES[1].file_name).unlink()
    located = locate_images(tmp_path, IMAGES)
    assert not located.missing
    assert located.paths[1] == f"{IMAGES_2014}/COCO_train2014_000000000001.jpg"
    assert located.paths[2] == f"{IMAGES_2017}/000000000002.jpg"


def test_instances_of_2017_find_images_of_2014(tmp_path: Path) -> None:
    small_dataset().write(tmp_path, image_folder="images/train2014")
    images = [ImageInfo(n, f"{n:012d}.jpg", 80, 100) for n in range(1, 7)]
    located = locate_images(tmp_path, images)
    assert not located.missing
    assert located.paths[5] == "images/train2014/COCO_train2014_000000000005.jpg"


def test_without_images_the_official_place_is_named(tmp_path: Path) -> None:
    located = locate_images(tmp_path, IMAGES)
    assert located.missing.keys() == {1, 2, 3, 4, 5, 6}
    assert located.paths[1] == f"{IMAGES_2014}/COCO_train2014_000000000001.jpg"
    with pytest.raises(DataError, match=r"no image folder; .*images/train2014.*train2014\.zip.*`check_images` off"):
        check_images(tmp_path, IMAGES, located, workers=1)


def test_every_bad_image_is_named_with_its_fault(tmp_path: Path) -> None:
    small_dataset().write(tmp_path)
    places = {image.image_id: tmp_path / IMAGES_2014 / image.file_name for image in IMAGES}
    places[1].unlink()
    places[2].write_bytes(places[2].read_bytes()[:-200])
    places[3].write_bytes(HTML)
    write_jpeg(places[4], 80, 100)
    places[5].write_bytes(b"")
    name = f"{IMAGES_2014}/COCO_train2014_00000000000"
    unknown = f"it is none of the image formats read here ({', '.join(FORMATS)})"
    found = problems_of(tmp_path)
    assert found.pop(2)[1].startswith(f"image 2: {name}2.jpg cannot be decoded (image file is truncated")
    assert found == {
        1: ("missing_image", f"image 1: {name}1.jpg is missing"),
        3: ("undecodable_image", f"image 3: {name}3.jpg cannot be decoded ({unknown})"),
        4: ("wrong_image_size", f"image 4: {name}4.jpg is 80x100 pixels, instances.json says 100x80"),
        5: ("undecodable_image", f"image 5: {name}5.jpg cannot be decoded ({unknown})"),
    }


@pytest.mark.parametrize("size", [(640, 480), (33, 7), (1, 1)])
def test_a_cut_jpeg_is_found_at_any_size(tmp_path: Path, size: tuple[int, int]) -> None:
    width, height = size
    image = [ImageInfo(1, "COCO_train2014_000000000001.jpg", height, width)]
    (tmp_path / IMAGES_2014).mkdir(parents=True)
    place = tmp_path / IMAGES_2014 / image[0].file_name
    write_jpeg(place, width, height)
    assert problems_of(tmp_path, image) == {}
    whole = place.read_bytes()
    for share in (0.5, 0.9, 0.99):
        place.write_bytes(whole[: int(len(whole) * share)])
        assert problems_of(tmp_path, image)[1][0] == "undecodable_image"


def save_turned(root: Path, orientation: int, width: int = 100, height: int = 80, kind: str = "JPEG") -> None:
    (root / IMAGES_2014).mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (width, height)).save(root / IMAGES_2014 / IMAGES[0].file_name, kind, exif=exif)


@pytest.mark.parametrize("orientation", range(10))
def test_exif_rotation_does_not_change_the_size_but_is_counted(tmp_path: Path, orientation: int) -> None:
    save_turned(tmp_path, orientation)
    decoded = check_images(tmp_path, IMAGES[:1], locate_images(tmp_path, IMAGES[:1]), workers=1)
    assert decoded.problems == {}
    turned = {} if orientation in (0, 1, 9) else {1: f"{IMAGES_2014}/{IMAGES[0].file_name}"}
    assert decoded.turned == turned


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_annotations_of_the_size_as_displayed_are_told_so(tmp_path: Path, orientation: int) -> None:
    save_turned(tmp_path, orientation, width=80, height=100)
    told = problems_of(tmp_path, IMAGES[:1])[1][1]
    assert told.startswith(f"image 1: {IMAGES_2014}/{IMAGES[0].file_name} is 80x100 pixels, instances.json says 100x80")
    assert (f"EXIF orientation {orientation}): the annotations were drawn on the turned picture" in told) is (
        orientation != 3
    )


def test_a_tiff_is_turned_where_it_is_read(tmp_path: Path) -> None:
    save_turned(tmp_path, 6, width=80, height=100, kind="TIFF")
    assert problems_of(tmp_path, IMAGES[:1]) == {}
    save_turned(tmp_path, 6, kind="TIFF")
    told = problems_of(tmp_path, IMAGES[:1])[1][1]
    assert (
        "as displayed (EXIF orientation 6), as TIFFs are read: the annotations were drawn on the pixels as stored"
        in told
    )


@pytest.mark.parametrize(
    ("mode", "message"),
    [("I;16", None), ("L", None), ("I", "integers of 32 bits"), ("F", "floating-point numbers")],
)
def test_depths_that_cannot_be_read_are_found_before_anything_is_made_of_them(
    tmp_path: Path, mode: str, message: str | None
) -> None:
    (tmp_path / "images").mkdir()
    Image.new(mode, (100, 80)).save(tmp_path / "images" / IMAGES[0].file_name, format="TIFF")
    found = problems_of(tmp_path, IMAGES[:1])
    assert not found if message is None else message in found[1][1]


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("a.jpg", "images/a.jpg"),
        ("a.jpg", "images/val2014/a.jpg"),
        ("cats/a.jpg", "images/cats/a.jpg"),
        ("images/1/a.jpg", "images/1/a.jpg"),
        ("images/1/a.jpg", "images/train2014/a.jpg"),
        ("deep/er/a.jpg", "images/deep/er/a.jpg"),
    ],
)
def test_photos_of_ones_own_may_lie_in_images_and_its_folders(tmp_path: Path, name: str, place: str) -> None:
    (tmp_path / place).parent.mkdir(parents=True)
    write_jpeg(tmp_path / place, 100, 80)
    image = [ImageInfo(1, name, 80, 100)]
    assert locate_images(tmp_path, image).paths == {1: place}
    assert problems_of(tmp_path, image) == {}


def test_a_name_that_may_mean_two_pictures_means_none(tmp_path: Path) -> None:
    for folder in ("cats", "dogs"):
        (tmp_path / "images" / folder).mkdir(parents=True)
        write_jpeg(tmp_path / "images" / folder / "1.jpg", 100, 80)
    bare = [ImageInfo(1, "1.jpg", 80, 100)]
    assert "it may be images/cats/1.jpg or images/dogs/1.jpg; write the folder" in problems_of(tmp_path, bare)[1][1]
    both = [ImageInfo(1, "cats/1.jpg", 80, 100), ImageInfo(2, "dogs/1.jpg", 80, 100)]
    assert locate_images(tmp_path, both).paths == {1: "images/cats/1.jpg", 2: "images/dogs/1.jpg"}
    (tmp_path / "images/dogs/1.jpg").unlink()
    assert "dogs/1.jpg is missing, and 2 images have the name 1.jpg" in problems_of(tmp_path, both)[2][1]
