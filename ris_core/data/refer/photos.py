"""Where the image files of a dataset lie, and whether they can be decoded."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from PIL import ExifTags, Image
from tqdm import tqdm

from ris_core.data.images import BadImage, check_depth, opened
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
OWN_FOLDER = "images"  # and the folders in it: where people put photos of their own
SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that exchange height and width


@dataclass(frozen=True, slots=True)
class Located:
    """Paths of images by id, relative to the dataset's root, with forward slashes; and what is wrong where there is none.

    A missing image has the path where it would be expected.
    """

    paths: dict[int, str]
    missing: dict[int, Problem]


@dataclass(frozen=True, slots=True)
class Decoded:
    """What a check of image files found.

    problems: by image id. not_rgb: how many images are not RGB (grey, CMYK, ...). turned: paths of images with an EXIF
    orientation, which viewers show turned or mirrored, by image id.
    """

    problems: dict[int, Problem]
    not_rgb: int
    turned: dict[int, str]


def locate_images(root: Path, images: Iterable[ImageInfo]) -> Located:
    """Find the files of images below `root`. Each folder is listed once.

    A name with folders is tried as it is, from the root and from `images/`. A bare name is looked for in COCO's folders, in
    `images/` and in the folders there; in more than one of the latter it could be either picture, so it is neither.
    """
    images = list(images)
    official = {folder: set(os.listdir(root / folder)) for folder in IMAGE_FOLDERS if (root / folder).is_dir()}
    own = {folder: set(os.listdir(root / folder)) for folder in _own_folders(root) if folder not in official}
    expected = next(iter([*official, *own]), IMAGE_FOLDERS[0])
    shared = Counter(PurePosixPath(image.file_name).name for image in images)
    paths: dict[int, str] = {}
    missing: dict[int, Problem] = {}
    for image in images:
        bare = PurePosixPath(image.file_name).name
        whole = [f"{start}{image.file_name}" for start in ("", f"{OWN_FOLDER}/") if bare != image.file_name]
        found = [path for path in whole if (root / path).is_file()][:1]
        if not found and shared[bare] == 1:
            places = _places(image.image_id, bare)
            found = [f"{folder}/{name}" for folder, name in places if name in official.get(folder, ())][:1]
            found = found or [f"{folder}/{bare}" for folder, names in own.items() if bare in names]
        paths[image.image_id] = found[0] if len(found) == 1 else f"{expected}/{bare}"
        if len(found) != 1:
            missing[image.image_id] = _missing(image, paths[image.image_id], found, shared[bare])
    return Located(paths, missing)


def check_images(root: Path, images: list[ImageInfo], located: Located, workers: int) -> Decoded:
    """Decode every image on `workers` threads and compare its size, as stored, with instances.json.

    Raises DataError when there is no image folder at all.
    """
    if not (root / OWN_FOLDER).is_dir() and len(located.missing) == len(images):
        raise DataError(
            f"{root}: no image folder; the images must be in one of {', '.join((*IMAGE_FOLDERS, OWN_FOLDER))} below it. "
            "Unpack COCO's train2014.zip there, or link the folder. To read annotations alone, turn `check_images` off"
        )
    there = [image for image in images if image.image_id not in located.missing]
    with ThreadPoolExecutor(workers) as pool:
        looked = pool.map(lambda image: _look(root, located.paths[image.image_id], image), there)
        seen = list(tqdm(looked, "looking at images", len(there), unit="img", disable=None, leave=False))
    problems = dict(located.missing)
    turned = {}
    for image, (problem, _, orientation) in zip(there, seen, strict=True):
        if problem is not None:
            problems[image.image_id] = problem
        if orientation != 1:
            turned[image.image_id] = located.paths[image.image_id]
    return Decoded(problems, sum(mode not in ("RGB", "") for _, mode, _ in seen), turned)


def _own_folders(root: Path) -> list[str]:
    """List `images` and the folders in it."""
    top = root / OWN_FOLDER
    if not top.is_dir():
        return []
    return [OWN_FOLDER, *sorted(f"{OWN_FOLDER}/{entry.name}" for entry in os.scandir(top) if entry.is_dir())]


def _places(image_id: int, name: str) -> Iterable[tuple[str, str]]:
    """Give (folder, file name) pairs of COCO's in the order in which they are tried."""
    for folder in IMAGE_FOLDERS:
        yield folder, name
        number = f"{image_id:012d}.jpg"
        yield folder, number if folder.endswith("2017") else f"COCO_train2014_{number}"


def _missing(image: ImageInfo, path: str, found: list[str], sharing: int) -> Problem:
    where = f"image {image.image_id}:"
    if found:
        return Problem("missing_image", f"{where} it may be {' or '.join(found)}; write the folder into its file_name")
    if sharing > 1:
        text = f"{image.file_name} is missing, and {sharing} images have the name {PurePosixPath(path).name}"
        return Problem("missing_image", f"{where} {text}; keep the folders of file_name")
    return Problem("missing_image", f"{where} {path} is missing")


def _look(root: Path, path: str, image: ImageInfo) -> tuple[Problem | None, str, int]:
    """Tell what is wrong with an image file, if anything, its pixel mode ("" when unreadable) and its EXIF orientation."""
    try:
        with opened(root / path, path) as picture:
            size, mode, kind, orientation = picture.size, picture.mode, picture.format, _orientation(picture)
            check_depth(picture, path)
            if size == (image.width, image.height):
                # At an eighth of the size a JPEG is still read to its end, which finds cut files at half the cost.
                picture.draft(mode, (max(image.width // 8, 1), max(image.height // 8, 1)))
                picture.load()
    except BadImage as error:
        return Problem("undecodable_image", f"image {image.image_id}: {path} cannot be decoded ({error.reason})"), "", 1
    if size != (image.width, image.height):
        text = f"{path} is {size[0]}x{size[1]} pixels, instances.json says {image.width}x{image.height}"
        if orientation in SIDEWAYS and size == (image.height, image.width):
            text += f", its size as displayed (EXIF orientation {orientation})"
            if kind == "TIFF":  # which Pillow turns itself
                text += ", as TIFFs are read: the annotations were drawn on the pixels as stored; take the tag off"
            else:
                text += (
                    ": the annotations were drawn on the turned picture; save it upright (PIL.ImageOps.exif_transpose)"
                )
        return Problem("wrong_image_size", f"image {image.image_id}: {text}"), mode, orientation
    return None, mode, orientation


def _orientation(picture: Image.Image) -> int:
    """Give the EXIF orientation: 1 is upright, and what is none of the eight is shown as if it were."""
    given = picture.getexif().get(ExifTags.Base.Orientation, 1)
    return given if given in range(1, 9) else 1
