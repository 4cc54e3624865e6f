"""Where the image files of a dataset lie, and whether they can be decoded."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ris_core.data.images import BadImage, opened
from ris_core.data.refer.rows import ImageInfo, Problem
from ris_core.errors import DataError

# First the official layout (github.com/lichengunc/refer), then that of CRIS and others. Every RefCOCO image is in
# COCO's train2014 and, under a shorter name, again in train2017.
IMAGE_FOLDERS = (
    "images/mscoco/images/train2014",
    "images/train2014",
    "images/mscoco/images/train2017",
    "images/train2017",
)


@dataclass(frozen=True, slots=True)
class Decoded:
    """What a check of image files found: problems by image id, and how many images are not RGB (grey, CMYK, ...)."""

    problems: dict[int, Problem]
    not_rgb: int


def locate_images(root: Path, images: Iterable[ImageInfo]) -> tuple[dict[int, str], set[int]]:
    """Find every image's path relative to `root` with forward slashes, by image id, and the ids of the missing ones.

    A missing image gets the path where it would be expected. Each folder is listed once.
    """
    present = {folder: set(os.listdir(root / folder)) for folder in IMAGE_FOLDERS if (root / folder).is_dir()}
    expected = next(iter(present), IMAGE_FOLDERS[0])
    paths, missing = {}, set()
    for image in images:
        candidates = (f"{folder}/{name}" for folder, name in _places(image) if name in present.get(folder, ()))
        found = next(candidates, None)
        if found is None:
            missing.add(image.image_id)
        paths[image.image_id] = found or f"{expected}/{image.file_name}"
    return paths, missing


def check_images(
    root: Path, images: list[ImageInfo], paths: Mapping[int, str], missing: set[int], workers: int
) -> Decoded:
    """Decode every image on `workers` threads and compare its size with instances.json (EXIF rotation is ignored).

    Raises DataError when there is no image folder at all.
    """
    if not any((root / folder).is_dir() for folder in IMAGE_FOLDERS):
        raise DataError(
            f"{root}: no image folder; the images must be in one of {', '.join(IMAGE_FOLDERS)} below it. Unpack COCO's "
            "train2014.zip there, or link the folder. To read annotations alone, turn `check_images` off"
        )
    problems = {
        image.image_id: Problem("missing_image", f"image {image.image_id}: {paths[image.image_id]} is missing")
        for image in images
        if image.image_id in missing
    }
    there = [image for image in images if image.image_id not in missing]
    with ThreadPoolExecutor(workers) as pool:
        seen = list(pool.map(lambda image: _look(root, paths[image.image_id], image), there))
    problems |= {image.image_id: problem for image, (problem, _) in zip(there, seen, strict=True) if problem}
    return Decoded(problems, not_rgb=sum(mode not in ("RGB", "") for _, mode in seen))


def _places(image: ImageInfo) -> Iterable[tuple[str, str]]:
    """Give (folder, file name) pairs in the order in which they are tried."""
    for folder in IMAGE_FOLDERS:
        yield folder, image.file_name
        number = f"{image.image_id:012d}.jpg"
        yield folder, number if folder.endswith("2017") else f"COCO_train2014_{number}"


def _look(root: Path, path: str, image: ImageInfo) -> tuple[Problem | None, str]:
    """Tell what is wrong with an image file, if anything, and the pixel mode it is stored in ('' when unreadable)."""
    try:
        with opened(root / path, path) as picture:
            size, mode = picture.size, picture.mode
            if size == (image.width, image.height):
                # At an eighth of the size a JPEG is still read to its end, which finds cut files at half the cost.
                picture.draft(mode, (max(image.width // 8, 1), max(image.height // 8, 1)))
                picture.load()
    except BadImage as error:
        return Problem("undecodable_image", f"image {image.image_id}: {path} cannot be decoded ({error.reason})"), ""
    if size != (image.width, image.height):
        text = f"{path} is {size[0]}x{size[1]} pixels, instances.json says {image.width}x{image.height}"
        return Problem("wrong_image_size", f"image {image.image_id}: {text}"), mode
    return None, mode
