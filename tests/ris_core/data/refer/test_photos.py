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
    paths, missing = locate_images(root, images)
    found = check_images(root, images, paths, missing, workers=2).problems
    return {number: (problem.kind, problem.message) for number, problem in found.items()}


@pytest.mark.parametrize("folder", [IMAGES_2014, "images/train2014", IMAGES_2017, "images/train2017"])
def test_both_layouts_and_both_namings_are_found(tmp_path: Path, folder: str) -> None:
    small_dataset().write(tmp_path, image_folder=folder)
    paths, missing = locate_images(tmp_path, IMAGES)
    assert not missing
    stem = "" if folder.endswith("2017") else "COCO_train2014_"
    assert paths == {n: f"{folder}/{stem}{n:012d}.jpg" for n in range(1, 7)}
    decoded = check_images(tmp_path, IMAGES, paths, missing, workers=2)
    assert decoded.problems == {}
    assert decoded.not_rgb == 1  # image 3 is grey


def test_images_may_be_spread_over_folders(tmp_path: Path) -> None:
    small_dataset().write(tmp_path, image_folder=IMAGES_2014)
    small_dataset().write(tmp_path, image_folder=IMAGES_2017)
    (tmp_path / IMAGES_2014 / IMAGES[1].file_name).unlink()
    paths, missing = locate_images(tmp_path, IMAGES)
    assert not missing
    assert paths[1] == f"{IMAGES_2014}/COCO_train2014_000000000001.jpg"
    assert paths[2] == f"{IMAGES_2017}/000000000002.jpg"


def test_instances_of_2017_find_images_of_2014(tmp_path: Path) -> None:
    small_dataset().write(tmp_path, image_folder="images/train2014")
    images = [ImageInfo(n, f"{n:012d}.jpg", 80, 100) for n in range(1, 7)]
    paths, missing = locate_images(tmp_path, images)
    assert not missing
    assert paths[5] == "images/train2014/COCO_train2014_000000000005.jpg"


def test_without_images_the_official_place_is_named(tmp_path: Path) -> None:
    paths, missing = locate_images(tmp_path, IMAGES)
    assert missing == {1, 2, 3, 4, 5, 6}
    assert paths[1] == f"{IMAGES_2014}/COCO_train2014_000000000001.jpg"
    with pytest.raises(DataError, match=r"no image folder; .*images/train2014.*train2014\.zip.*`check_images` off"):
        check_images(tmp_path, IMAGES, paths, missing, workers=1)


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


def test_exif_rotation_does_not_change_the_size(tmp_path: Path) -> None:
    (tmp_path / IMAGES_2014).mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees
    Image.new("RGB", (100, 80)).save(tmp_path / IMAGES_2014 / IMAGES[0].file_name, exif=exif)
    assert problems_of(tmp_path, IMAGES[:1]) == {}
