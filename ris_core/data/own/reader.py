"""A dataset of one's own, read as the official files are: typed rows, and everything that is wrong with single ones.

    <root>/dataset.yaml        what the dataset is made of (`ris_core.data.own.description`)
    <root>/expressions.csv     image, text, and annotation or mask; perhaps split
    <root>/instances.json      COCO annotations, unless there are masks
    <root>/images/...          the photos

`ris_core.data.refer.join` makes records of it, and `ris_core.data.refer.audit` checks it, as of any other dataset.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from ris_core.data.images import BadImage, opened
from ris_core.data.own.description import (
    FILE,
    SPLITS,
    Description,
    describes_own,
    named,
    read_description,
    read_parts_of,
)
from ris_core.data.own.masks import read_mask
from ris_core.data.own.mixed import mix
from ris_core.data.own.splits import draw
from ris_core.data.own.table import Row, read_table
from ris_core.data.records import Reference, Sentence
from ris_core.data.refer.generalised import CATEGORY, target_id
from ris_core.data.refer.photos import OWN_FOLDER, locate_images
from ris_core.data.refer.reader import DatasetName, ReferFiles, add_targets, read_instances, read_refer
from ris_core.data.refer.rows import Annotation, ImageInfo, Problem, relative
from ris_core.data.refer.untrusted import read_input
from ris_core.errors import DataError, short

OBJECT = 1  # the category of masks, which have none
LONGEST = 19  # digits of ids, which fit 64 bits


@dataclass(slots=True)
class _Said:
    """Expressions about one object: the image's name as the table has it, and the annotation's id or the mask as given."""

    image: str
    target: Any
    split: str | None
    texts: list[tuple[int, str]] = field(default_factory=list)  # number of the expression, text


def read_any(root: Path, name: DatasetName) -> ReferFiles:
    """Read the dataset in a folder: official files, one's own, or a mixture of datasets in folders beside it.

    Raises ConfigError or DataError as `read_own`, `read_refer` and `mix` do.
    """
    parts = read_parts_of(root)
    if parts:
        files = {part: read_any(root.parent / part, named(root.parent / part)) for part in parts}
        return mix(name, files, parts)
    return read_own(root, name) if describes_own(root) else read_refer(root, name)


def read_own(root: Path, name: DatasetName) -> ReferFiles:
    """Read and type-check a dataset of one's own.

    Rows about the same annotation, or mask, of the same image are expressions of one referent; a list of annotations means
    all of them, an empty one that nothing is there. ref_ids and sent_ids count in the order of the table. Raises ConfigError
    for a `dataset.yaml`, DataError for a file, that cannot be used as a whole; what is wrong with single rows is listed in
    the result.
    """
    description = read_description(root)
    files = ReferFiles(name, references=[], refs_in_file=0, inputs=[])
    for path in (FILE, description.expressions):
        content, identity = read_input(root, path, f"{root / FILE} names it.")
        files.inputs.append(identity)
    rows = read_table(content, root / description.expressions)
    if description.annotations is not None:
        remedy = f"{root / FILE} names it as `annotations`."
        files.inputs.append(read_instances(root, description.annotations, remedy, files))
    told = _by_referent(rows, description, files)
    if not told:
        raise DataError(_nothing(root / description.expressions, rows, files))
    _check_splits(told, root / description.expressions)
    if description.annotations is None:
        _images_of_names(root, told, files)
    _number(root, told, description, files)
    add_targets(files)
    return files


def _by_referent(rows: list[tuple[str, Row]], description: Description, files: ReferFiles) -> list[_Said]:
    """Gather the expressions of each referent, in order of appearance; what is wrong with rows goes into `files`."""
    target = "mask" if description.annotations is None else "annotation"
    found: dict[tuple[str, str], _Said] = {}
    number = 0
    for where, row in rows:
        wrong, texts = _wrong_in(row, target)
        if wrong:
            text = f"{description.expressions} {where}: {'; '.join(wrong)}"
            files.problems.append(Problem("malformed_ref", text, blocking=True))
            files.refs_in_file += 1
            continue
        image, split = str(row["image"]), row.get("split")
        given = _annotations(row[target]) if target == "annotation" else row[target]
        said = found.setdefault((image, str(given)), _Said(image, given, split))
        if said.split != split:
            there = f"an earlier row about the same object has {short(said.split)}"
            text = f"{description.expressions} {where}: split {short(split)}, {there}"
            files.problems.append(Problem("unknown_split", text, blocking=True))
            files.refs_in_file += 1
            continue
        for each in texts:
            said.texts.append((number, each))
            number += 1
    files.refs_in_file += len(found)
    return list(found.values())


def _wrong_in(row: Any, target: str) -> tuple[list[str], list[str]]:
    """Tell what is wrong with a row; and its texts."""
    if not isinstance(row, Mapping):
        return [f"expected columns image, text, {target}; found {type(row).__name__} {short(row)}"], []
    wrong = [f"no '{key}'" for key in ("image", "text", target) if row.get(key) is None or row[key] == ""]
    if not wrong:
        if type(row["image"]) not in (str, int):
            wrong.append(f"'image' must be an id or a file name, found {short(row['image'])}")
        if target == "annotation" and _annotations(row[target]) is None:
            wrong.append(
                f"'annotation' must be the id of a COCO annotation, or a list of ids, found {short(row[target])}"
            )
        if row.get("split") not in (None, *SPLITS):
            wrong.append(f"split {short(row['split'])} is not one of {', '.join(SPLITS)}")
    texts = row.get("text")
    texts = texts if isinstance(texts, list) else [texts]
    if not wrong and not all(isinstance(text, str) and text.strip() and _is_unicode(text) for text in texts):
        wrong.append(f"'text' must be an expression, or a list of them; found {short(row['text'])}")
    return wrong, texts


def _annotations(given: object) -> tuple[int, ...] | None:
    """Give the annotations that a row refers to; a list may name several of them, or none.

    10.0 is 10: pandas writes whole columns of integers so where one of them was missing.
    """
    numbers: list[Any] = given if isinstance(given, list) else [given]
    texts = [str(number).removesuffix(".0") if type(number) in (int, float, str) else "" for number in numbers]
    if not all(text.isdecimal() and len(text) < LONGEST for text in texts):
        return None
    return tuple(dict.fromkeys(map(int, texts)))


def _is_unicode(text: str) -> bool:
    return text.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in text)


def _check_splits(told: list[_Said], path: Path) -> None:
    """Raise DataError where some rows have a split and others none."""
    without = sum(said.split is None for said in told)
    if 0 < without < len(told):
        raise DataError(
            f"{path}: {without} of {len(told)} objects have no `split`: fill the column everywhere, or leave it out, and "
            "images are drawn"
        )


def _images_of_names(root: Path, told: list[_Said], files: ReferFiles) -> None:
    """List the images that the table names, with ids in the order of their names and sizes of the files as stored."""
    given = {_plain(said.image) or "-": said.image for said in told}
    images = [ImageInfo(number, name or "-", 0, 0) for name, number in _numbers_of_names(told).items()]
    located = locate_images(root, images)
    for image in images:
        name = given[image.file_name]
        try:
            if image.image_id in located.missing:
                why = located.missing[image.image_id].message.removeprefix(f"image {image.image_id}: ")
                raise BadImage(name, f"there is no such file ({why})")
            with opened(root / located.paths[image.image_id], name) as picture:
                width, height = picture.size
            files.images[image.image_id] = ImageInfo(image.image_id, image.file_name, height, width)
        except BadImage as error:
            text = f"image {short(name)}: {error.reason}"
            files.bad_images[image.image_id] = Problem("missing_image", text)
    files.categories[OBJECT] = "object"


def _number(root: Path, told: list[_Said], description: Description, files: ReferFiles) -> None:
    """Give ids to referents, and make annotations of masks."""
    image_of = _image_ids(told, description, files)
    images = [image_of(said) for said in told]
    names = [_name_of(image, said, files) for image, said in zip(images, told, strict=True)]
    drawn = draw(names, description.val, description.test, description.seed)
    for ref_id, (said, image_id, name) in enumerate(zip(told, images, names, strict=True), start=1):
        ann_id, category = said.target, OBJECT
        if isinstance(image_id, Problem):
            files.problems.append(image_id)
            continue
        if description.annotations is None:
            ann_id = ref_id
            try:
                segmentation = read_mask(said.target, root)
                files.annotations[ann_id] = Annotation(ann_id, image_id, OBJECT, 0, None, None, segmentation)
            except DataError as error:
                text = f"{description.expressions}: {error}"
                files.bad_annotations[ann_id] = Problem("malformed_annotation", text)
        elif len(said.target) != 1:
            ann_id, category = target_id(ref_id), CATEGORY
            files.targets[ref_id] = said.target
        else:
            (ann_id,) = said.target
            category = files.annotations[ann_id].category_id if ann_id in files.annotations else OBJECT
        sentences = tuple(Sentence(number, " ".join(text.lower().split()), text) for number, text in said.texts)
        split = said.split or drawn[name]
        files.references.append((image_id, Reference(ref_id, ann_id, category, split, sentences)))


def _image_ids(told: list[_Said], description: Description, files: ReferFiles) -> Callable[[_Said], int | Problem]:
    """Give the function that finds the id of the image that a row is about, by its id, or by its file name."""
    if description.annotations is None:
        numbers = _numbers_of_names(told)
        return lambda said: numbers[_plain(said.image)]
    known = {*files.images, *files.bad_images}
    by_name: dict[str, set[int]] = {}
    for image in files.images.values():
        for name in {image.file_name, PurePosixPath(image.file_name).name}:
            by_name.setdefault(name, set()).add(image.image_id)

    def find(said: _Said) -> int | Problem:
        if said.image.isdecimal() and len(said.image) < LONGEST and int(said.image) in known:
            return int(said.image)
        ids = by_name.get(relative(said.image)) or by_name.get(_plain(said.image), set())
        if len(ids) == 1:
            return next(iter(ids))
        why = "several images have that name" if ids else f"{description.annotations} has no such image"
        text = f"{description.expressions}: image {short(said.image)}, annotation {short(list(said.target))}: {why}"
        return Problem("dangling_ref", text, blocking=True)

    return find


def _plain(name: str) -> str:
    """Give an image's name as a path in the folder of photos, so that two ways to write it are one; "" where it is none."""
    return relative(name).removeprefix(f"{OWN_FOLDER}/")


def _numbers_of_names(told: list[_Said]) -> dict[str, int]:
    """Give numbers to images that only the table names, in the order of their names."""
    return {name: number for number, name in enumerate(sorted({_plain(said.image) for said in told}), start=1)}


def _name_of(image: int | Problem, said: _Said, files: ReferFiles) -> str:
    """Give what the draw knows an image by: its own name, however the table writes it, by an id or by a path."""
    found = None if isinstance(image, Problem) else files.images.get(image)
    return _plain(said.image if found is None else found.file_name)


def _nothing(path: Path, rows: list[tuple[str, Row]], files: ReferFiles) -> str:
    if not files.problems:
        return f"{path} has no expressions"
    more = f" (and {len(files.problems) - 1} more)" if len(files.problems) > 1 else ""
    columns = dict.fromkeys(str(key) for _, row in rows if isinstance(row, Mapping) for key in row)
    between = " (they are told apart by commas)" if any(mark in key for key in columns for mark in ";\t") else ""
    found = f"; its columns are {', '.join(map(short, columns))}{between}" if columns else ""
    return f"{path} has no row that can be used: {files.problems[0].message}{more}{found}"
