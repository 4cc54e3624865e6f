"""The official REFER files of RefCOCO, RefCOCO+, RefCOCOg and the embedded datasets, read as typed rows.

    <root>/<folder>/refs(<split-by>).p     who is referred to, and how; or refs(<split-by>).json, the same as JSON
    <root>/<folder>/grefs(<split-by>).json or .p in their place, where a referent has none or several annotations
    <root>/<folder>/instances.json         COCO annotations of all images that have referents

Formats: github.com/lichengunc/refer. Nothing is joined here (`ris_core.data.refer.join` does) and no image is opened. What is
wrong with single entries is collected, so that everything can be told at once.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from ris_core.data.records import Reference
from ris_core.data.refer.generalised import CATEGORY, NAME, parse_targets, target
from ris_core.data.refer.rows import (
    Annotation,
    ImageInfo,
    Problem,
    pack_polygons,
    parse_annotation,
    parse_category,
    parse_image,
    parse_reference,
)
from ris_core.data.refer.untrusted import PICKLE_CAP_BYTES, InputFile, parse_pickle, read_input, read_json
from ris_core.errors import DataError

Row = TypeVar("Row")
log = logging.getLogger(__name__)

_UNC, _UMD, _GOOGLE = ("train", "val", "testA", "testB"), ("train", "val", "test"), ("train", "val", "test")
GENERALISED = ("grefcoco", "shapes*")  # folders of data in which a referent has none or several annotations
MIXED = "mixed"  # in place of a split-by
DATASETS = {
    "refcoco_unc": ("refcoco", "unc", _UNC),
    "refcoco_google": ("refcoco", "google", _GOOGLE),
    "refcoco+_unc": ("refcoco+", "unc", _UNC),
    "refcocog_umd": ("refcocog", "umd", _UMD),
    "refcocog_google": ("refcocog", "google", ("train", "val")),  # its test part was never released
    "grefcoco_unc": ("grefcoco", "unc", _UNC),
    "shapes": ("shapes", "unc", _UNC),
    "shapes+": ("shapes+", "unc", _UNC),
    "shapesg": ("shapesg", "umd", _UMD),
    "shapes*": ("shapes*", "unc", _UNC),
}


@dataclass(frozen=True, slots=True)
class DatasetName:
    """A dataset with its split-by, for example refcocog_umd: `<root>/<folder>/refs(<split_by>).p`."""

    name: str
    folder: str
    split_by: str
    splits: tuple[str, ...]

    @classmethod
    def parse(cls, name: str) -> DatasetName:
        """Give the dataset of that name. Raises DataError with the valid names for any other."""
        if name in DATASETS:
            return cls(name, *DATASETS[name])
        related = [known for known, (folder, *_) in DATASETS.items() if folder == name.split("_")[0]]
        hint = f"did you mean {' or '.join(related)}? " if related else ""
        raise DataError(
            f"there is no dataset '{name}': {hint}Valid names: {', '.join(DATASETS)}; one of your own has a file "
            "dataset.yaml in its folder, data/raw/<name>"
        )

    @property
    def is_mixed(self) -> bool:
        """Tell whether it is made of several datasets, see `ris_core.data.own.mixed`."""
        return self.split_by == MIXED

    @property
    def is_generalised(self) -> bool:
        """Tell whether a referent may have none or several annotations, see `ris_core.data.refer.generalised`."""
        return self.folder in GENERALISED

    @property
    def refs_file(self) -> str:
        """Give the path of the referents' pickle, relative to the dataset root."""
        return f"{self.folder}/{'grefs' if self.is_generalised else 'refs'}({self.split_by}).p"

    @property
    def instances_file(self) -> str:
        """Give the path of the COCO annotations, relative to the dataset root."""
        return f"{self.folder}/instances.json"

    def check_split(self, split: str) -> str:
        """Give `split` itself when the dataset has it; DataError that names the valid ones otherwise."""
        if split in self.splits:
            return split
        hint = " (the official reader's 'test' means testA and testB together)" if "testA" in self.splits else ""
        raise DataError(f"{self.name} has no split '{split}'; it has {', '.join(self.splits)}{hint}")


@dataclass(slots=True)
class ReferFiles:
    """Everything readable in the two files of a dataset.

    `references` are (image_id, reference) in file order. `bad_images` and `bad_annotations` hold, by id, what is wrong
    with entries that cannot be used; whether that matters depends on who refers to them. `targets` are those of generalised
    data alone: all other referents have the annotation that they name.
    """

    name: DatasetName
    references: list[tuple[int, Reference]]
    refs_in_file: int
    inputs: list[InputFile]
    problems: list[Problem] = field(default_factory=list)
    images: dict[int, ImageInfo] = field(default_factory=dict)
    bad_images: dict[int, Problem] = field(default_factory=dict)
    annotations: dict[int, Annotation] = field(default_factory=dict)
    bad_annotations: dict[int, Problem] = field(default_factory=dict)
    categories: dict[int, str] = field(default_factory=dict)
    targets: dict[int, tuple[int, ...]] = field(default_factory=dict)  # annotations by ref_id, of generalised data


def read_refer(root: Path, name: DatasetName) -> ReferFiles:
    """Read and type-check both files of a dataset.

    Raises DataError when a file as a whole cannot be used (missing, a web page, cut short, not plain data, ...); what
    is wrong with single entries is listed in the result.
    """
    files = read_references(root, name)
    files.inputs.append(read_instances(root, name.instances_file, how_to_get(name), files))
    add_targets(files)
    return files


def add_targets(files: ReferFiles) -> None:
    """Make an annotation of the target of each referent that has not exactly one."""
    files.categories |= {CATEGORY: NAME} if files.targets else {}
    for image_id, ref in files.references:
        ids = files.targets.get(ref.ref_id, (ref.ann_id,))
        if len(ids) != 1 and image_id in files.images:
            made = target(ref.ref_id, files.images[image_id], ids, files.annotations, files.bad_annotations)
            if isinstance(made, Problem):
                files.bad_annotations[ref.ann_id] = made
            else:
                files.annotations[ref.ann_id] = made


def _meant(files: list[str], name: DatasetName) -> str:
    """Tell what files of referents are that a dataset does not have."""
    if name.is_generalised or not any(file.startswith("grefs") for file in files):
        return ""
    return (
        "grefs are gRefCOCO's, whose referents have none or several annotations: lay them out as "
        "grefcoco/grefs(unc).json beside grefcoco/instances.json, and name the dataset grefcoco_unc. "
    )


def read_instances(root: Path, path: str, remedy: str, files: ReferFiles) -> InputFile:
    """Read a COCO instances file below `root` into the tables of `files`, and give its identity. Raises as `read_refer` does."""
    tables, identity = read_json(root, path, remedy, pack_polygons)
    wanted = ("images", "annotations", "categories")
    absent = [key for key in wanted if not isinstance(tables, dict) or not isinstance(tables.get(key), list)]
    if absent:
        raise DataError(f"{root / path} is no COCO file: it has no list of {', '.join(absent)}. {remedy}")
    files.categories, bad_categories, unnamed = _collect(tables["categories"], parse_category)
    files.problems += [*bad_categories.values(), *unnamed]
    files.images, files.bad_images, unnamed = _collect(tables["images"], parse_image)
    files.problems += unnamed
    parse = partial(parse_annotation, categories=files.categories)
    files.annotations, files.bad_annotations, unnamed = _collect(tables["annotations"], parse)
    files.problems += unnamed
    return identity


def read_references(root: Path, name: DatasetName) -> ReferFiles:
    """Read and type-check the referents alone, which is cheap. Raises DataError as `read_refer` does."""
    remedy, place = how_to_get(name), root / name.refs_file
    others = sorted(path.name for path in place.parent.glob("*refs(*).*") if path != place)
    if others and not place.exists():
        remedy = f"This folder has {', '.join(others)}. {_meant(others, name)}{remedy}"
    as_json = Path(name.refs_file).with_suffix(".json")  # what converters and hubs give
    if not place.exists() and (root / as_json).exists():
        (entries, identity), encoding = read_json(root, str(as_json), remedy), "utf-8"
        place = root / as_json
    else:
        content, identity = read_input(root, name.refs_file, remedy, PICKLE_CAP_BYTES)
        entries, encoding = parse_pickle(content, place, remedy)
    if not isinstance(entries, list) or not entries:
        raise DataError(f"{place} holds no list of referents but {entries!r:.60}. {remedy}")
    files = ReferFiles(name, references=[], refs_in_file=len(entries), inputs=[identity])
    if encoding != "utf-8":
        text = f"{name.refs_file}: its texts are not UTF-8 and were read as Latin-1; accented letters may be wrong"
        log.warning(text)
        files.problems.append(Problem("not_utf8", text))
    seen: set[int] = set()
    for position, entry in enumerate(entries):
        given = parse_targets(entry) if name.is_generalised else (entry, ())
        row = given if isinstance(given, Problem) else parse_reference(given[0], position, name.splits)
        if isinstance(row, Problem):
            files.problems.append(row)
        elif row[1].ref_id in seen:
            text = f"ref {row[1].ref_id} at position {position}: an earlier entry has the same ref_id"
            files.problems.append(Problem("duplicate_id", text, blocking=True))
        else:
            seen.add(row[1].ref_id)
            files.references.append(row)
            if name.is_generalised and not isinstance(given, Problem):
                files.targets[row[1].ref_id] = given[1]
    return files


def _collect(
    entries: list[Any], parse: Callable[[Any, int], Row | Problem]
) -> tuple[dict[int, Row], dict[int, Problem], list[Problem]]:
    """Give rows by id, problems by id, and the problems of entries that have no id. An id used twice is a problem, too.

    Entries go as their rows come, so that memory holds one of both.
    """
    rows: dict[int, Row] = {}
    bad: dict[int, Problem] = {}
    unnamed: list[Problem] = []
    for position, entry in enumerate(entries):
        entries[position] = None
        row = parse(entry, position)
        if not isinstance(row, Problem):
            if entry["id"] in rows:
                bad[entry["id"]] = Problem("duplicate_id", f"id {entry['id']} at position {position} is used twice")
            rows.setdefault(entry["id"], row)
        elif isinstance(entry, dict) and type(entry.get("id")) is int:
            bad[entry["id"]] = row
        else:
            unnamed.append(row)
    return rows, bad, unnamed


def how_to_get(name: DatasetName) -> str:
    """Tell what to do about a missing or broken file of this dataset, as a sentence."""
    if name.folder == "grefcoco":
        return "gRefCOCO's files are given out by github.com/henghuiding/gRefCOCO; docs/generalised.md says where they lie here."
    archive = facts()["archives"].get(name.folder)
    if archive is None:
        return f"It is written by `dvc repro synthesize` ({name.name} is an embedded dataset)."
    return (
        f"Run `ris fetch {name.name}`, or unpack {name.folder}.zip there ({archive['bytes']:,} bytes, sha256 "
        f"{archive['sha256']}); the original server is gone, a copy is at {archive['url']}"
    )


@cache
def facts() -> Mapping[str, Any]:
    """Give published counts and archives of the real datasets: the packaged expected_counts.json."""
    content = resources.files("ris_core.data.refer").joinpath("expected_counts.json").read_text(encoding="utf-8")
    return dict(json.loads(content))
