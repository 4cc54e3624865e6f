"""Stage `prepare` as a library: read a REFER dataset, check everything about it, and say what was found.

    records, report = prepare("data/raw/refcoco_unc", "refcoco_unc", on_bad="error", strict=False, exclude={},
                              check_images=True, workers=2)

The report is JSON-able and depends on the data alone: no paths outside the dataset, no times.
"""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from ris_core.data import masks
from ris_core.data.records import ImageRecord, Instance
from ris_core.data.refer.join import ON_BAD, build_records, exclude_images
from ris_core.data.refer.photos import Decoded, locate_images
from ris_core.data.refer.photos import check_images as decode_images
from ris_core.data.refer.reader import DATASETS, DatasetName, ReferFiles, facts, read_refer, read_references
from ris_core.data.refer.rows import PROBLEM_KINDS, Problem
from ris_core.errors import SHOWN_PROBLEMS, DataError, list_problems
from ris_core.options import option

log = logging.getLogger(__name__)

AREA_TOLERANCE = 1e-3  # relative, of the polygons' shoelace area; COCO itself is within 1e-6
RLE_AREA_TOLERANCE = 1e-2  # relative, of the pixel count, when the area may be that of a lost polygon
BBOX_TOLERANCE = 0.011  # pixels; COCO rounds to two digits
RLE_BBOX_TOLERANCE = 1.01  # pixels; a mask cannot tell where inside a pixel the outline ran


@dataclass
class PrepareParams:
    """How `prepare` reads a dataset, and what it makes of problems."""

    on_bad: str = option("error", choices=ON_BAD)
    strict: bool = False
    check_images: bool = True
    exclude_images_of: list[str] = option([], choices=tuple(DATASETS))


def prepare(
    root: str | Path,
    dataset: str | DatasetName,
    *,
    on_bad: str,
    strict: bool,
    exclude: Mapping[str, str | Path],
    check_images: bool,
    workers: int,
    read: Callable[[Path, DatasetName], ReferFiles] = read_refer,
) -> tuple[list[ImageRecord], dict[str, Any]]:
    """Make records and audit report of a dataset below `root`.

    on_bad: "error" raises one DataError that lists all referents that cannot be used and why, "skip" leaves them out.
    strict: differing from the published counts is an error, not a warning. exclude: roots of other datasets by name; no
    training referent stays on an image that is val or test there, or, of a mixed dataset, in any part. check_images: decode
    every image on `workers` threads; when off, images need not be there at all. Masks are made by as many processes. read:
    gives the files' rows; by default
    those of the official files.
    Raises DataError for files that cannot be used.
    """
    root = Path(root)
    dataset = dataset if isinstance(dataset, DatasetName) else DatasetName.parse(dataset)
    name = dataset.name
    others = {other: read_references(Path(place), DatasetName.parse(other)) for other, place in exclude.items()}
    files = read(root, dataset)
    used = {image_id for image_id, _ in files.references}
    images = [image for image in files.images.values() if image.image_id in used]
    located = locate_images(root, images)
    decoded = decode_images(root, images, located, workers) if check_images else None
    records, problems = build_records(
        files, located.paths, decoded.problems if decoded else {}, on_bad=on_bad, workers=workers
    )
    published = compare_with_published(dataset, records)
    differences = [text for text in map(_difference, published) if text]
    if strict and differences:
        remedy = "Get the whole official files, or turn `strict` off (params.yaml: prepare.strict)."
        raise DataError(list_problems(f"{name} differs from the published counts", differences, remedy))
    guards = [*others.values(), *([files] if dataset.is_mixed else [])]
    scored = {image for guard in guards for image, ref in guard.references if ref.split != "train"}
    written, excluded = exclude_images(records, scored)
    report = audit(files, written, problems, decoded, excluded)
    groups = _split_images(dataset, ((record.image_id, ref.split) for record in written for ref in record.refs))
    for refs in others.values():
        groups = {**_split_images(refs.name, ((image_id, ref.split) for image_id, ref in refs.references)), **groups}
    report["shared_images"] = image_leakage(groups)
    report["published"] = published
    report["warnings"] = [
        *_left_out(report["refs"]),
        *_turned(decoded, {record.image_id for record in written}),
        *differences,
        *_leaks(report["shared_images"]),
    ]
    for warning in report["warnings"]:
        log.warning("%s: %s", name, warning)
    return written, report


def audit(
    files: ReferFiles,
    records: Sequence[ImageRecord],
    problems: Sequence[Problem],
    decoded: Decoded | None,
    excluded: int,
) -> dict[str, Any]:
    """Give counts and problems of what was read (`files`, `problems`) and of what is used (`records`), JSON-able.

    `decoded` is None when images were not checked; `excluded` is the number of refs left out on purpose. Numbers are in
    dicts, which `dvc metrics` shows, tables and texts in lists, which it passes over.
    """
    kept = sum(len(record.refs) for record in records)
    instances = [each for record in records for each in record.instances if each.ann_id >= 0]  # no targets
    problems = [*problems, *_odd_texts(records), *_odd_shapes(files, records)]
    counts = Counter(problem.kind for problem in problems)
    return {
        "dataset": files.name.name,
        "refs": {
            "in_file": files.refs_in_file,
            "bad": files.refs_in_file - kept - excluded,
            "excluded": excluded,
            "kept": kept,
            **_numbers_of_targets(files, records),
        },
        "images": {
            "in_file": len(files.images.keys() | files.bad_images.keys()),
            "kept": len(records),
            "checked": decoded is not None,
            "not_rgb": decoded.not_rgb if decoded else None,
            "exif_turned": len(decoded.turned) if decoded else None,
        },
        "annotations": {
            "in_file": sum(number >= 0 for number in files.annotations.keys() | files.bad_annotations.keys()),
            "kept": len(instances),
            "crowds": sum(instance.iscrowd for instance in instances),
        },
        "splits": {split: _count(records, split) for split in files.name.splits},
        "problems": {kind: counts[kind] for kind in PROBLEM_KINDS if counts[kind]},
        "messages": [text for kind in PROBLEM_KINDS for text in _first(problems, kind)],
        "sentences": [{"split": split, **_describe_texts(records, split)} for split in files.name.splits],
        "inputs": [asdict(entry) for entry in files.inputs],
    }


def _numbers_of_targets(files: ReferFiles, records: Sequence[ImageRecord]) -> dict[str, int]:
    """Count referents with none and with several targets; nothing of data that has neither."""
    if not files.targets:
        return {}
    kept = [len(files.targets.get(ref.ref_id, [ref.ann_id])) for record in records for ref in record.refs]
    return {"no_target": kept.count(0), "several_targets": sum(number > 1 for number in kept)}


def compare_with_published(name: DatasetName, records: Sequence[ImageRecord]) -> list[dict[str, Any]]:
    """Give one row for each published count of the dataset: split, what, found, published. Empty for embedded datasets."""
    rows = []
    for split, published in facts()["counts"].get(name.name, {}).items():
        found = _count(records, None if split == "total" else split)
        rows += [
            {"split": split, "what": what, "found": found[what], "published": number}
            for what, number in published.items()
        ]
    return rows


def image_leakage(groups: Mapping[str, set[int]]) -> list[dict[str, Any]]:
    """Count the images that each two groups share: a row (first, second, images) for each pair, in the order given.

    Groups are image ids by name, of the splits of one dataset or of several that draw on the same pictures.
    """
    return [
        {"first": first, "second": second, "images": len(groups[first] & groups[second])}
        for first, second in combinations(groups, 2)
    ]


def _split_images(name: DatasetName, located: Iterable[tuple[int, str]]) -> dict[str, set[int]]:
    """Give image ids by `<dataset>/<split>`, from (image_id, split) pairs; splits in the dataset's own order."""
    images: defaultdict[str, set[int]] = defaultdict(set)
    for image_id, split in located:
        images[split].add(image_id)
    return {f"{name.name}/{split}": images[split] for split in name.splits}


def _difference(row: Mapping[str, Any]) -> str:
    if row["found"] == row["published"]:
        return ""
    return f"{row['split']}: {row['found']} {row['what']}, published are {row['published']}"


def _left_out(refs: Mapping[str, int]) -> list[str]:
    return [f"{refs['bad']} of {refs['in_file']} refs cannot be used and were left out"] if refs["bad"] else []


def _turned(decoded: Decoded | None, used: Collection[int]) -> list[str]:
    """Warn of photos that viewers show otherwise than they are stored; COCO's own annotations are drawn on the latter."""
    paths = [path for image_id, path in decoded.turned.items() if image_id in used] if decoded else []
    if not paths:
        return []
    shown = ", ".join(paths[:3]) + (", ..." if len(paths) > 3 else "")
    return [
        f"{len(paths)} photos have an EXIF orientation, which turns or mirrors them where they are displayed ({shown}). Their "
        "annotations are taken as drawn on the pixels as stored (TIFFs: as displayed). If they were drawn otherwise, every "
        "such mask lies on wrong pixels: save these photos upright (PIL.ImageOps.exif_transpose) and prepare again"
    ]


def _leaks(shared: Sequence[Mapping[str, Any]]) -> list[str]:
    """Give a warning for each pair of a training split and another that share images."""
    return [
        f"{row['first']} and {row['second']} share {row['images']} images"
        for row in shared
        if row["images"] and row["first"].endswith("/train") != row["second"].endswith("/train")
    ]


def _count(records: Sequence[ImageRecord], split: str | None) -> dict[str, int]:
    """Count refs, sentences and images of one split, or of all together."""
    refs = [(record.image_id, ref) for record in records for ref in record.refs if split in (None, ref.split)]
    return {
        "refs": len(refs),
        "sentences": sum(len(ref.sentences) for _, ref in refs),
        "images": len({image_id for image_id, _ in refs}),
    }


def _describe_texts(records: Sequence[ImageRecord], split: str) -> dict[str, Any]:
    """Give figures about the sentences of a split.

    `repeated` counts sentences that say the same as another of their ref; `words` is the histogram of lengths from 0.
    """
    refs = [ref for record in records for ref in record.refs if ref.split == split]
    texts = [sentence.sent for ref in refs for sentence in ref.sentences]
    words = np.array([len(text.split()) for text in texts], dtype=np.int64)
    return {
        "empty": int((words == 0).sum()),
        "non_ascii": sum(not text.isascii() for text in texts),
        "repeated": sum(len(ref.sentences) - len({s.sent for s in ref.sentences}) for ref in refs),
        "mean_words": round(float(words.mean()), 4) if texts else 0.0,
        "words": np.bincount(words).tolist(),
    }


def _odd_texts(records: Sequence[ImageRecord]) -> list[Problem]:
    """Tell what is unusual but usable about referents: empty sentences, ids used twice, annotations with several refs."""
    problems: list[Problem] = []
    speakers: defaultdict[int, list[int]] = defaultdict(list)
    owners: defaultdict[int, list[int]] = defaultdict(list)
    for ref in (ref for record in records for ref in record.refs):
        owners[ref.ann_id].append(ref.ref_id)
        for sentence in ref.sentences:
            speakers[sentence.sent_id].append(ref.ref_id)
            if not sentence.sent.strip():
                problems.append(Problem("empty_sentence", f"ref {ref.ref_id}: sentence {sentence.sent_id} is empty"))
    for ann_id, ids in owners.items():
        if len(ids) > 1:
            problems.append(Problem("shared_annotation", f"annotation {ann_id} is that of refs {ids}"))
    for sent_id, ids in speakers.items():
        if len(ids) > 1:
            problems.append(Problem("duplicate_id", f"sent_id {sent_id} is used more than once, by refs {ids}"))
    return problems


def _odd_shapes(files: ReferFiles, records: Sequence[ImageRecord]) -> list[Problem]:
    """List annotations whose area or bbox does not follow from their segmentation."""
    problems = []
    for record in records:
        for instance in record.instances:
            where = f"annotation {instance.ann_id} of image {record.image_id}"
            given = files.annotations[instance.ann_id]
            if given.area is None and given.bbox is None:
                continue
            segmentation = masks.without_strays(given.segmentation)
            if masks.is_polygons(segmentation):
                area, bbox = _polygon_shape(segmentation)
                tolerances = AREA_TOLERANCE, BBOX_TOLERANCE
            else:
                area, bbox = _mask_shape(instance, record)
                tolerances = RLE_AREA_TOLERANCE, RLE_BBOX_TOLERANCE
            if given.area is not None and abs(instance.area - area) > max(tolerances[0] * area, 0.01):
                problems.append(Problem("area_mismatch", f"{where}: area {instance.area:g}, its shape has {area:g}"))
            apart = max(abs(a - b) for a, b in zip(instance.bbox, bbox, strict=True))
            if given.bbox is not None and apart > tolerances[1]:
                extent = [round(number, 2) for number in bbox]
                problems.append(
                    Problem("bbox_mismatch", f"{where}: bbox {list(instance.bbox)}, its shape has {extent}")
                )
    return problems


def _polygon_shape(polygons: list[list[float]]) -> tuple[float, list[float]]:
    """Give the sum of the polygons' shoelace areas, and their common extent (x, y, width, height)."""
    area = 0.0
    for polygon in polygons:
        x, y = np.asarray(polygon[0::2]), np.asarray(polygon[1::2])
        open_sum = np.dot(x[:-1], y[1:]) - np.dot(x[1:], y[:-1])
        area += 0.5 * abs(float(open_sum + x[-1] * y[0] - x[0] * y[-1]))
    xs = [number for polygon in polygons for number in polygon[0::2]]
    ys = [number for polygon in polygons for number in polygon[1::2]]
    return area, [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]


def _mask_shape(instance: Instance, record: ImageRecord) -> tuple[float, list[float]]:
    """Give the pixel count of a mask, and its extent (x, y, width, height)."""
    mask = masks.decode(instance.counts, record.height, record.width)
    xs, ys = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    return float(mask.sum()), [float(xs[0]), float(ys[0]), float(xs[-1] - xs[0] + 1), float(ys[-1] - ys[0] + 1)]


def _first(problems: Sequence[Problem], kind: str) -> list[str]:
    """Give the first messages of a kind, and how many more there are."""
    messages = [f"{kind}: {problem.message}" for problem in problems if problem.kind == kind]
    rest = len(messages) - SHOWN_PROBLEMS
    return messages[:SHOWN_PROBLEMS] + ([f"{kind}: ... and {rest} more"] if rest > 0 else [])
