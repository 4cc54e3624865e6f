"""Several datasets as one, to train on all of them: what papers call mixed training.

`dataset.yaml` says `mixed: {refcoco_unc: 1, refcoco+_unc: 1, refcocog_umd: 2}`: folders beside its own, and how often the
training referents of each come in an epoch. Training referents on images that are val or test in any of them are left out
by `ris_core.data.refer.audit.prepare`, as in big_vision's combined RefCOCO (github.com/google-research/big_vision).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ris_core.data.records import Reference
from ris_core.data.refer.reader import MIXED, DatasetName, ReferFiles
from ris_core.errors import DataError

TRAIN = "train"
MOST = 100  # times that a referent comes in an epoch


def mixed_name(name: str, parts: Mapping[str, DatasetName]) -> DatasetName:
    """Name a mixed dataset, which has all splits of its parts in their order."""
    splits = tuple(dict.fromkeys(split for part in parts.values() for split in part.splits))
    return DatasetName(name, folder=".", split_by=MIXED, splits=splits)


def mix(name: DatasetName, parts: Mapping[str, ReferFiles], times: Mapping[str, int]) -> ReferFiles:
    """Join what was read of several datasets.

    Referents and sentences are numbered anew, as their ids mean nothing beside those of another dataset; images and
    annotations keep theirs, which have to mean the same everywhere, as in all datasets on COCO. Raises DataError where
    they do not.
    """
    _check_agreement(parts)
    mixed = ReferFiles(name, references=[], refs_in_file=0, inputs=[])
    sentence = 0
    for part, files in parts.items():
        mixed.images |= files.images
        mixed.annotations |= files.annotations
        mixed.categories |= files.categories
        mixed.bad_images |= files.bad_images
        mixed.bad_annotations |= files.bad_annotations
        mixed.problems += [replace(problem, message=f"{part}: {problem.message}") for problem in files.problems]
        mixed.inputs += [replace(entry, path=f"{part}/{entry.path}") for entry in files.inputs]
        mixed.refs_in_file += files.refs_in_file - len(files.references)
        for image, ref in files.references:
            for _ in range(times[part] if ref.split == TRAIN else 1):
                number = len(mixed.references) + 1
                mixed.references.append((image, _numbered(ref, number, sentence)))
                if ref.ref_id in files.targets:
                    mixed.targets[number] = files.targets[ref.ref_id]
                sentence += len(ref.sentences)
    mixed.refs_in_file += len(mixed.references)
    return mixed


def _numbered(ref: Reference, ref_id: int, first: int) -> Reference:
    sentences = tuple(replace(each, sent_id=first + place) for place, each in enumerate(ref.sentences))
    return replace(ref, ref_id=ref_id, sentences=sentences)


def _check_agreement(parts: Mapping[str, ReferFiles]) -> None:
    """Raise DataError for images, annotations and categories whose id means something else in another part."""
    seen: dict[tuple[str, int], tuple[str, Any]] = {}
    several = [part for part, files in parts.items() if files.targets]
    if len(several) > 1:
        raise DataError(f"{' and '.join(several)} cannot be mixed: each has referents with none or several targets")
    for part, files in parts.items():
        said: list[tuple[str, int, Any]] = [
            *(
                ("image", number, (image.file_name, image.height, image.width))
                for number, image in files.images.items()
            ),
            *(("annotation", number, each.image_id) for number, each in files.annotations.items()),
            *(("category", number, category) for number, category in files.categories.items()),
        ]
        for what, number, meaning in said:
            first, known = seen.setdefault((what, number), (part, meaning))
            if known != meaning:
                raise DataError(
                    f"{first} and {part} cannot be mixed: {what} {number} is {known} in the one and {meaning} in the other; "
                    "mix datasets on the same photos, or give one of them other ids"
                )


def mixture_problems(given: object) -> list[str]:
    """Tell what is wrong with the value of `mixed`."""
    if not isinstance(given, Mapping) or len(given) < 2:
        return ["mixed: expected two datasets or more with how often each comes, {refcoco_unc: 1, refcocog_umd: 2}"]
    return [
        f"mixed.{part}: expected how often it comes in an epoch, 1 to {MOST}; found {times!r:.40}"
        for part, times in given.items()
        if type(times) is not int or not 1 <= times <= MOST
    ]
