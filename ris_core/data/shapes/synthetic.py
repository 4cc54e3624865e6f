"""The embedded default: RefCOCO-style datasets of coloured shapes, written in exactly the official REFER files.

Under a root, `write_dataset` makes

    <name>/refs(<split_by>).p   <name>/instances.json   images/mscoco/images/train2014/COCO_train2014_<12 digits>.jpg

as the REFER toolbox reads them (lichengunc/refer), for `shapes*` `grefs(unc).json` in place of refs as gRefCOCO has it, and
two files of its own: `<name>/captions.json`, COCO captions of the training pictures for the pre-training of a small CLIP, and
`<name>/kinds.json`, which tells for each sent_id what singles out its referent (attribute, size, location, order,
relation; several, none), so that scores can be read kind by kind.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import shutil
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from ris_core.data.shapes.flavours import FLAVOURS, FOCUS, Expression, Flavour, describe, describe_sets
from ris_core.data.shapes.scenes import ROUND, SHAPES, Scene, paint, polygon_area, sample_scene, visible_polygons
from ris_core.data.shapes.wording import region_captions, scene_captions
from ris_core.errors import ConfigError, DataError, list_problems

IMAGE_FOLDER = Path("images/mscoco/images/train2014")
NO_TARGET = -1  # as gRefCOCO writes annotation and category of a ref that means nothing
MAX_SCENES = 100_000  # a split: the room its image ids have

Records = list[dict[str, Any]]

_SCENE, _CAPTIONS, _WORDS = range(3)  # streams of chance of one picture; each flavour has its own words


@dataclass(frozen=True, slots=True)
class SyntheticSpec:
    """How much to draw. Counts are images a split: `test` counts testA and testB each, or the one test of shapesg.

    canvas is the longest side in pixels; sentences_per_ref the least and the most, fewer where there is little to say.
    Raises ConfigError naming every bad field.
    """

    seed: int = 0
    canvas: int = 160
    train: int = 3200
    val: int = 300
    test: int = 150
    refs_per_image: int = 5
    sentences_per_ref: tuple[int, int] = (2, 3)
    jpeg_quality: int = 90

    def __post_init__(self) -> None:
        object.__setattr__(self, "sentences_per_ref", tuple(self.sentences_per_ref))  # YAML brings a list
        low, high = self.sentences_per_ref
        checks = {
            f"seed is {self.seed}: use 0 or more": self.seed >= 0,
            f"canvas is {self.canvas}: use 64 to 1024 pixels": 64 <= self.canvas <= 1024,
            f"train is {self.train}: use 1 to {MAX_SCENES} images": 1 <= self.train <= MAX_SCENES,
            f"val is {self.val}: use 1 to {MAX_SCENES} images": 1 <= self.val <= MAX_SCENES,
            f"test is {self.test}: use 1 to {MAX_SCENES} images": 1 <= self.test <= MAX_SCENES,
            f"refs_per_image is {self.refs_per_image}: use 1 or more": self.refs_per_image >= 1,
            f"sentences_per_ref is {low} to {high}: use 1 <= least <= most <= 5": 1 <= low <= high <= 5,
            f"jpeg_quality is {self.jpeg_quality}: use 1 to 95": 1 <= self.jpeg_quality <= 95,
        }
        problems = [problem for problem, fine in checks.items() if not fine]
        if problems:
            raise ConfigError(list_problems("The specification of the embedded data is wrong", problems))

    def images(self, split: str) -> int:
        """Tell how many pictures a split has."""
        return {"train": self.train, "val": self.val}.get(split, self.test)

    def drawing(self) -> dict[str, int]:
        """Give the fields on which the pictures depend."""
        fields = ("seed", "canvas", "train", "val", "test", "jpeg_quality")
        return {field: getattr(self, field) for field in fields}


@dataclass(frozen=True, slots=True)
class Page:
    """One picture to be: all that is drawn and said about it is a function of these."""

    spec: SyntheticSpec
    flavour: Flavour
    split: str
    index: int

    @property
    def image_id(self) -> int:
        """Give an id beyond all COCO ids; family, split and scene are its digits, so that sister flavours agree on it."""
        return (self.flavour.family * 10 + self.flavour.splits.index(self.split)) * MAX_SCENES + self.index

    @property
    def file_name(self) -> str:
        return f"COCO_train2014_{self.image_id:012d}.jpg"

    def draw(self) -> tuple[Scene, np.random.Generator]:
        """Draw the scene, and give the generator that goes on to paint it."""
        rng = np.random.default_rng(self._seeds(_SCENE))
        return sample_scene(rng, self.spec.canvas, FOCUS.get(self.split, SHAPES)), rng

    def describe(self, scene: Scene) -> list[tuple[tuple[int, ...], list[Expression]]]:
        """Give the things of each ref, exactly one but in generalised data, and expressions for them."""
        rng = self._random(_WORDS + list(FLAVOURS).index(self.flavour.name))
        things = [i for i, thing in enumerate(scene.things) if thing.shape in FOCUS.get(self.split, SHAPES)]
        targets = sorted(rng.sample(things, min(len(things), self.spec.refs_per_image)))
        found = describe(scene, targets, self.flavour, self.spec.sentences_per_ref, rng)
        single: list[tuple[tuple[int, ...], list[Expression]]] = [((target,), said) for target, said in found.items()]
        if not self.flavour.generalised:
            return single
        expressions = [expression for said in found.values() for expression in said]
        return [*single, *describe_sets(scene, expressions, self.spec.sentences_per_ref[1], rng)]

    def captions(self, scene: Scene) -> list[tuple[str, int | None]]:
        """Give captions, each with the thing it is about or None for the whole scene."""
        rng = self._random(_CAPTIONS)
        whole: list[tuple[str, int | None]] = [(caption, None) for caption in scene_captions(scene, rng)]
        return whole + [(text, i) for i in range(len(scene.things)) for text in region_captions(scene, i, rng)]

    def _seeds(self, stream: int) -> np.random.SeedSequence:
        split = self.flavour.splits.index(self.split)
        return np.random.SeedSequence([self.spec.seed, self.flavour.family, split, self.index, stream])

    def _random(self, stream: int) -> Random:
        return Random(int(self._seeds(stream).generate_state(1, np.uint64)[0]))


def write_dataset(
    root: Path, name: str, spec: SyntheticSpec, *, workers: int = 1, progress: bool = True
) -> dict[str, Any]:
    """Write the embedded dataset `name` (shapes, shapes+, shapesg, shapes*) under `root` and return its counts.

    Returns {"splits": {split: {"images", "refs", "sentences", "kinds": {kind: sentences}}}, "captions": n}. The bytes
    depend on `spec` alone, not on `workers`. Everything is first written to `<root>/.<name>.tmp` and moved in place at
    the end, pictures first and the dataset's folder last: a killed run leaves no folder that looks like a dataset.

    Raises ConfigError for an unknown name or worker count, DataError if `root` holds the sister flavour drawn with
    another spec (shapes, shapes+ and shapes* share their pictures).
    """
    if name not in FLAVOURS:
        raise ConfigError(f"There is no embedded dataset {name!r}: choose one of {', '.join(FLAVOURS)}")
    if workers < 1:
        raise ConfigError(f"workers is {workers}: use 1 or more")
    flavour = FLAVOURS[name]
    _check_sisters(root, flavour, spec)
    staging = root / f".{name}.tmp"
    if staging.exists():
        shutil.rmtree(staging)
    (staging / name).mkdir(parents=True)
    (staging / IMAGE_FOLDER).mkdir(parents=True)
    pages = [Page(spec, flavour, split, index) for split in flavour.splits for index in range(spec.images(split))]
    drawn = _draw_all(pages, staging / IMAGE_FOLDER, workers)
    records = list(tqdm(drawn, name, len(pages), unit="img", disable=None if progress else True))
    refs = [ref for page in records for ref in page["refs"]]
    kinds = _number(refs)
    # Through JSON, so that a pickle does not tell which strings happened to be one object: workers' never are.
    as_json = _json(refs)
    official = (
        {f"grefs({flavour.split_by}).json": as_json}
        if flavour.generalised
        else {f"refs({flavour.split_by}).p": pickle.dumps(json.loads(as_json), protocol=2)}
    )
    files = {
        "instances.json": _json(_instances(records, flavour, spec)),
        "captions.json": _json(_coco_captions(records, flavour)),
        "kinds.json": _json(kinds),
        **official,
    }
    for file, content in files.items():
        (staging / name / file).write_bytes(content)
    _publish(staging, root, flavour)
    return _counts(records, kinds, flavour)


def _check_sisters(root: Path, flavour: Flavour, spec: SyntheticSpec) -> None:
    for sister in FLAVOURS.values():
        file = root / sister.name / "instances.json"
        if sister.name == flavour.name or sister.family != flavour.family or not file.exists():
            continue
        theirs = json.loads(file.read_bytes())["info"].get("drawing")
        if theirs != spec.drawing():
            raise DataError(
                f"{file.parent} was drawn with {theirs}, {flavour.name} is to be drawn with {spec.drawing()}, but they "
                f"share their pictures: use the same values, another root, or remove {file.parent} first"
            )


def _draw_all(pages: list[Page], folder: Path, workers: int) -> Iterator[dict[str, Any]]:
    """Draw pages in order, in this process or in several fresh ones."""
    if workers == 1:
        yield from (_draw(page, folder) for page in pages)
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(partial(_draw, folder=folder), pages, chunksize=32)


def _draw(page: Page, folder: Path) -> dict[str, Any]:
    """Write one picture and return its records: {"split", "image", "annotations", "refs", "captions"}.

    Refs and captions still lack the ids that count through the whole dataset, and their sentences carry their kind.
    """
    scene, rng = page.draw()
    Image.fromarray(paint(scene, rng)).save(
        folder / page.file_name, "JPEG", quality=page.spec.jpeg_quality, subsampling="4:2:0"
    )
    annotations = [_annotation(scene, index, page.image_id) for index in range(len(scene.things))]
    captions = page.captions(scene) if page.split == "train" else []
    return {
        "split": page.split,
        "image": {
            "license": 1,
            "file_name": page.file_name,
            "coco_url": "",
            "height": scene.height,
            "width": scene.width,
            "date_captured": "",
            "flickr_url": "",
            "id": page.image_id,
        },
        "annotations": annotations,
        "refs": [
            _ref(page, [annotations[i] for i in things], number, said)
            for number, (things, said) in enumerate(page.describe(scene))
        ],
        "captions": [
            {"image_id": page.image_id, "caption": text} | ({} if i is None else {"bbox": annotations[i]["bbox"]})
            for text, i in captions
        ],
    }


def _annotation(scene: Scene, index: int, image_id: int) -> dict[str, Any]:
    """Make COCO's record of one thing: area is the polygons' shoelace sum, bbox their extent, both as in COCO."""
    polygons = visible_polygons(scene, index)
    low, high = np.concatenate(polygons).min(axis=0), np.concatenate(polygons).max(axis=0)
    return {
        "segmentation": [polygon.ravel().tolist() for polygon in polygons],
        "area": sum(polygon_area(polygon) for polygon in polygons),
        "iscrowd": 0,
        "image_id": image_id,
        "bbox": np.round(np.concatenate([low, high - low]), 2).tolist(),
        "category_id": SHAPES.index(scene.things[index].shape) + 1,
        "id": image_id * 10 + index,
    }


def _ref(page: Page, meant: Records, number: int, said: list[Expression]) -> dict[str, Any]:
    """Make the record of a ref, the `number`th of its picture, that means these annotations."""
    ids, categories = [each["id"] for each in meant], [each["category_id"] for each in meant]
    generalised = page.flavour.generalised
    # As in the originals, where refcocog's names end in the annotation's id and refcoco's in a count.
    suffix = number if generalised else ids[0] if page.flavour.long else ids[0] % 10
    return {
        "ann_id": (ids or [NO_TARGET]) if generalised else ids[0],
        "file_name": f"{page.file_name.removesuffix('.jpg')}_{suffix}.jpg",
        "image_id": page.image_id,
        "split": page.split,
        "category_id": (categories or [NO_TARGET]) if generalised else categories[0],
        "sentences": [
            {"tokens": list(e.tokens), "raw": e.raw, "sent": " ".join(e.tokens), "kind": e.kind} for e in said
        ],
        **({"no_target": not ids} if generalised else {}),
    }


def _number(refs: Records) -> dict[int, str]:
    """Give refs and sentences their ids in file order; return the kind of each sentence, taken out of it."""
    kinds: dict[int, str] = {}
    for ref_id, ref in enumerate(refs):
        ref["ref_id"] = ref_id
        ref["sent_ids"] = list(range(len(kinds), len(kinds) + len(ref["sentences"])))
        for sent_id, sentence in zip(ref["sent_ids"], ref["sentences"], strict=True):
            sentence["sent_id"] = sent_id
            kinds[sent_id] = sentence.pop("kind")
    return kinds


def _instances(pages: Records, flavour: Flavour, spec: SyntheticSpec) -> dict[str, Any]:
    return {
        "info": _info(flavour) | {"drawing": spec.drawing()},
        "licenses": [{"id": 1, "name": "drawn by a program", "url": ""}],
        "images": [page["image"] for page in pages],
        "annotations": [annotation for page in pages for annotation in page["annotations"]],
        "categories": [
            {"id": number, "name": shape, "supercategory": "round" if shape in ROUND else "angular"}
            for number, shape in enumerate(SHAPES, start=1)
        ],
    }


def _coco_captions(pages: Records, flavour: Flavour) -> dict[str, Any]:
    captions = (caption for page in pages for caption in page["captions"])
    return {
        "info": _info(flavour),
        "images": [page["image"] for page in pages if page["captions"]],
        "annotations": [{"id": number, **caption} for number, caption in enumerate(captions)],
    }


def _info(flavour: Flavour) -> dict[str, Any]:
    description = f"{flavour.name}: coloured shapes drawn by a program"
    return {"description": description, "url": "", "version": "1.0", "contributor": "", "date_created": ""}


def _counts(pages: Records, kinds: dict[int, str], flavour: Flavour) -> dict[str, Any]:
    """Give what write_dataset returns."""
    splits = {}
    for split in flavour.splits:
        mine = [page for page in pages if page["split"] == split]
        sent_ids = [sent_id for page in mine for ref in page["refs"] for sent_id in ref["sent_ids"]]
        splits[split] = {
            "images": len(mine),
            "refs": sum(len(page["refs"]) for page in mine),
            "sentences": len(sent_ids),
            "kinds": dict(sorted(Counter(kinds[sent_id] for sent_id in sent_ids).items())),
        }
    return {"splits": splits, "captions": sum(len(page["captions"]) for page in pages)}


def _json(content: Any) -> bytes:
    return json.dumps(content, separators=(",", ":")).encode()


def _publish(staging: Path, root: Path, flavour: Flavour) -> None:
    """Move a finished dataset in place of an older one; pictures of this family that it does not have go away."""
    if (root / flavour.name).exists():
        os.replace(root / flavour.name, staging / "replaced")
    folder = root / IMAGE_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    new = {file.name for file in (staging / IMAGE_FOLDER).iterdir()}
    for old in folder.glob(f"COCO_train2014_{flavour.family:06d}??????.jpg"):
        if old.name not in new:
            old.unlink()
    for file_name in new:
        os.replace(staging / IMAGE_FOLDER / file_name, folder / file_name)
    os.replace(staging / flavour.name, root / flavour.name)
    shutil.rmtree(staging)
