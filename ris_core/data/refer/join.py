"""From typed REFER rows to records: each referent joined to its annotation, mask and image.

The one place that decides which referents can be used and what happens to the others.
"""

from __future__ import annotations

import multiprocessing
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import chain

from tqdm import tqdm

from ris_core.data import masks
from ris_core.data.records import ImageRecord, Instance, Reference
from ris_core.data.refer.reader import ReferFiles
from ris_core.data.refer.rows import Annotation, ImageInfo, Problem
from ris_core.errors import ConfigError, DataError, list_problems

ON_BAD = ("error", "skip")
SHARED_FROM = 20_000  # annotations: below, other processes take longer to start than they spare
CHUNK = 1_000

_Wanted = tuple[Annotation, ImageInfo, str]  # and the category's name


def build_records(
    files: ReferFiles,
    image_paths: Mapping[int, str],
    image_problems: Mapping[int, Problem],
    *,
    on_bad: str,
    workers: int = 1,
) -> tuple[list[ImageRecord], list[Problem]]:
    """Give records of all images with usable referents (sorted by image id, refs and instances by theirs), and all problems.

    `image_paths` and `image_problems` (by image id) come from `ris_core.data.refer.photos`. A referent is bad when its entry
    is malformed, its annotation or image is absent or unusable, the two disagree, or its mask is empty. With bad
    referents `on_bad="error"` raises one DataError that lists every cause, "skip" leaves them out. Annotations that
    nobody refers to never block: bad ones are left out and reported. Raises DataError when no referent remains.
    Masks of many annotations are made by `workers` processes.
    """
    if on_bad not in ON_BAD:
        raise ConfigError(f"on_bad must be one of {', '.join(ON_BAD)}; found {on_bad!r}")
    used_images = {image_id for image_id, _ in files.references}
    instances, mask_problems, strays = _instances(files, used_images, workers)
    bad_annotations = {**files.bad_annotations, **mask_problems}
    bad_images = {**files.bad_images, **image_problems}
    problems = [*files.problems, *strays]
    spoilt: defaultdict[Problem, list[int]] = defaultdict(list)
    kept: defaultdict[int, list[Reference]] = defaultdict(list)
    for image_id, ref in files.references:
        culprits = [bad[key] for bad, key in ((bad_images, image_id), (bad_annotations, ref.ann_id)) if key in bad]
        for culprit in culprits:
            spoilt[culprit].append(ref.ref_id)
        faults = _join_faults(files, image_id, ref, bad_images, bad_annotations)
        problems += faults
        if not culprits and not any(fault.blocking for fault in faults):
            kept[image_id].append(ref)
    for problem in [*bad_images.values(), *bad_annotations.values()]:
        problems.append(_with_victims(problem, spoilt[problem]))
    bad_refs = files.refs_in_file - sum(map(len, kept.values()))
    if bad_refs and (on_bad == "error" or not kept):
        raise _unusable(files, problems, bad_refs)
    records = [_record(files.images[i], image_paths[i], instances[i], kept[i]) for i in sorted(kept)]
    return records, problems


def exclude_images(
    records: Sequence[ImageRecord], images: Collection[int], split: str = "train"
) -> tuple[list[ImageRecord], int]:
    """Give records without the referents of `split` on the given images, and how many referents were dropped.

    Images that keep no referent are dropped. This keeps what is val or test elsewhere out of training, as big_vision's
    combined RefCOCO does.
    """
    images = frozenset(images)
    kept, dropped = [], 0
    for record in records:
        refs = record.refs
        if record.image_id in images:
            refs = tuple(ref for ref in record.refs if ref.split != split)
            dropped += len(record.refs) - len(refs)
        if refs:
            kept.append(replace(record, refs=refs))
    return kept, dropped


def _instances(
    files: ReferFiles, images: set[int], workers: int
) -> tuple[dict[int, list[Instance]], dict[int, Problem], list[Problem]]:
    """Give instances of the given images, by image id; what is wrong with annotations without a usable mask, by id; strays."""
    instances: defaultdict[int, list[Instance]] = defaultdict(list)
    bad: dict[int, Problem] = {}
    wanted: list[_Wanted] = []
    for annotation in files.annotations.values():
        image = files.images.get(annotation.image_id)
        if image is None:
            text = f"{_where(annotation)}: that image is not usable"
            bad[annotation.ann_id] = Problem("dangling_annotation", text)
        elif annotation.image_id in images:
            wanted.append((annotation, image, files.categories[annotation.category_id]))
    strays: list[Problem] = []
    for (annotation, *_), made in zip(wanted, _made(wanted, workers), strict=True):
        if isinstance(made, Problem):
            bad[annotation.ann_id] = made
        else:
            instances[annotation.image_id].append(made)
            strays += _strays(annotation)
    return instances, bad, strays


def _made(wanted: list[_Wanted], workers: int) -> Iterator[Instance | Problem]:
    """Give what becomes of annotations, in their order; of many by processes, to which a fork hands all that is wanted."""
    bar = partial(tqdm, desc="masks", total=len(wanted), unit="ann", disable=None, leave=False)
    if workers == 1 or len(wanted) < SHARED_FROM:
        yield from bar(_instance(*each) for each in wanted)
        return
    starts = range(0, len(wanted), CHUNK)
    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(workers, fork, _inherit, (wanted,)) as pool:
        yield from bar(chain.from_iterable(pool.map(_chunk, starts)))


_inherited: list[_Wanted] = []  # of a process of the pool: what it was forked for


def _inherit(wanted: list[_Wanted]) -> None:
    _inherited[:] = wanted


def _chunk(start: int) -> list[Instance | Problem]:
    return [_instance(*each) for each in _inherited[start : start + CHUNK]]


def _where(annotation: Annotation) -> str:
    return f"annotation {annotation.ann_id} of image {annotation.image_id}"


def _instance(annotation: Annotation, image: ImageInfo, category: str) -> Instance | Problem:
    where = _where(annotation)
    segmentation = masks.without_strays(annotation.segmentation)
    try:
        counts = masks.segmentation_to_counts(segmentation, image.height, image.width)
    except DataError as error:
        return Problem("degenerate_segmentation", f"{where}: {error}")
    area = masks.area(counts, image.height, image.width)
    if area == 0 and not annotation.is_target:
        return Problem("empty_mask", f"{where}: its mask has no pixel")
    return Instance(
        ann_id=annotation.ann_id,
        category_id=annotation.category_id,
        category=category,
        iscrowd=annotation.iscrowd,
        bbox=annotation.bbox or masks.extent(counts, image.height, image.width),
        area=float(area) if annotation.area is None else annotation.area,
        counts=counts,
    )


def _strays(annotation: Annotation) -> list[Problem]:
    """Tell of polygons that cover nothing and were left out."""
    left = len(annotation.segmentation) - len(masks.without_strays(annotation.segmentation))
    if not left:
        return []
    what = f"{left} of its {len(annotation.segmentation)} polygons have fewer than three points and were left out"
    return [Problem("stray_polygon", f"{_where(annotation)}: {what}")]


def _join_faults(
    files: ReferFiles, image_id: int, ref: Reference, bad_images: Collection[int], bad_annotations: Collection[int]
) -> list[Problem]:
    """Tell what does not fit between a reference and what it points to, beyond the known bad images and annotations."""
    where, faults = f"ref {ref.ref_id}", []
    if image_id not in files.images and image_id not in bad_images:
        faults.append(Problem("dangling_ref", f"{where}: there is no image {image_id}", blocking=True))
    annotation = files.annotations.get(ref.ann_id)
    if annotation is None:
        if ref.ann_id not in bad_annotations:
            faults.append(Problem("dangling_ref", f"{where}: there is no annotation {ref.ann_id}", blocking=True))
        return faults
    where = f"{where}: its annotation {ref.ann_id}"
    if annotation.image_id != image_id:
        text = f"{where} belongs to image {annotation.image_id}, the ref says image {image_id}"
        faults.append(Problem("image_mismatch", text, blocking=True))
    if annotation.category_id != ref.category_id:
        text = f"{where} has category {annotation.category_id}, the ref says {ref.category_id}"
        faults.append(Problem("category_mismatch", text))
    if annotation.iscrowd and not annotation.is_target:
        faults.append(Problem("ref_to_crowd", f"{where} is a crowd, not one object"))
    return faults


def _with_victims(problem: Problem, ref_ids: list[int]) -> Problem:
    if not ref_ids:
        return problem
    shown = ", ".join(map(str, ref_ids[:5])) + (", ..." if len(ref_ids) > 5 else "")
    return Problem(problem.kind, f"{problem.message} (needed by ref {shown})", blocking=True)


def _record(image: ImageInfo, path: str, instances: list[Instance], refs: list[Reference]) -> ImageRecord:
    return ImageRecord(
        image_id=image.image_id,
        file_name=path,
        height=image.height,
        width=image.width,
        instances=tuple(sorted(instances, key=lambda instance: instance.ann_id)),
        refs=tuple(sorted(refs, key=lambda ref: ref.ref_id)),
    )


def _unusable(files: ReferFiles, problems: list[Problem], bad_refs: int) -> DataError:
    blocking = [problem for problem in problems if problem.blocking]
    kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(p.kind for p in blocking).most_common())
    title = f"{files.name.name}: {bad_refs} of {files.refs_in_file} refs cannot be used: {kinds}"
    remedy = "Mend the files, or go on without these refs by on_bad='skip' (params.yaml: prepare.on_bad)."
    if bad_refs == files.refs_in_file:
        remedy = "No ref is left to go on with: check that the files and images belong together."
    return DataError(list_problems(title, [problem.message for problem in blocking], f"{_unread(problems)}{remedy}"))


def _unread(problems: list[Problem]) -> str:
    """Tell of entries that nobody is known to refer to because they could not be read: what refers to them finds nothing."""
    entries = [p.message for p in problems if p.kind in ("malformed_image", "malformed_annotation") and not p.blocking]
    return (
        f"{len(entries)} entries of images or annotations cannot be read, the first: {entries[0]}. " if entries else ""
    )
