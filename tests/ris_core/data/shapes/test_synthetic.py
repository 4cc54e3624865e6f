"""The embedded datasets follow the official conventions, show what they say, and depend on nothing but their spec."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import pickletools
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ris_core.data import masks
from ris_core.data.refer.reader import DatasetName, read_refer
from ris_core.data.shapes import synthetic
from ris_core.data.shapes.flavours import FLAVOURS
from ris_core.data.shapes.scenes import COLOURS, ROUND, SHAPES, Thing, sample_scene, settle, visible_polygons
from ris_core.data.shapes.synthetic import IMAGE_FOLDER, Page, SyntheticSpec, write_dataset
from ris_core.errors import ConfigError, DataError

SPEC = SyntheticSpec(seed=3, canvas=128, train=24, val=10, test=8)
COCO_IDS_END = 600_000


class PlainUnpickler(pickle.Unpickler):
    """Refuses everything but builtin containers, numbers and strings."""

    def find_class(self, module: str, name: str) -> None:
        raise AssertionError(f"the pickle wants {module}.{name}")


def digests(root: Path) -> dict[str, str]:
    files = (path for path in sorted(root.rglob("*")) if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def load(root: Path, name: str) -> tuple[list[dict], dict]:
    if FLAVOURS[name].generalised:
        refs = json.loads((root / name / f"grefs({FLAVOURS[name].split_by}).json").read_bytes())
    else:
        refs = PlainUnpickler(io.BytesIO((root / name / f"refs({FLAVOURS[name].split_by}).p").read_bytes())).load()
    return refs, json.loads((root / name / "instances.json").read_bytes())


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root that holds all flavours."""
    folder = tmp_path_factory.mktemp("embedded")
    for name in FLAVOURS:
        write_dataset(folder, name, SPEC, progress=False)
    return folder


SINGLE = [name for name, flavour in FLAVOURS.items() if not flavour.generalised]
STAR = "shapes*"


@pytest.mark.parametrize("name", FLAVOURS)
def test_official_conventions(root: Path, name: str) -> None:
    refs, instances = load(root, name)
    assert set(instances) == {"info", "images", "licenses", "annotations", "categories"}
    images = {image["id"]: image for image in instances["images"]}
    annotations = {annotation["id"]: annotation for annotation in instances["annotations"]}
    assert len(images) == len(instances["images"])
    assert len(annotations) == len(instances["annotations"])
    assert min(images) > COCO_IDS_END
    assert [c["name"] for c in instances["categories"]] == list(SHAPES)
    for number, image in images.items():
        assert image["file_name"] == f"COCO_train2014_{number:012d}.jpg"
        assert set(image) == {
            "license",
            "file_name",
            "coco_url",
            "height",
            "width",
            "date_captured",
            "flickr_url",
            "id",
        }
    assert (
        len({ref["ref_id"] for ref in refs})
        == len({(ref["image_id"], str(ref["ann_id"])) for ref in refs})
        == len(refs)
    )
    sent_ids = [sent_id for ref in refs for sent_id in ref["sent_ids"]]
    assert len(set(sent_ids)) == len(sent_ids)
    for ref in refs:
        if name == STAR:
            check_targets(ref, annotations)
        else:
            annotation = annotations[ref["ann_id"]]
            assert (ref["image_id"], ref["category_id"]) == (annotation["image_id"], annotation["category_id"])
            suffix = ref["ann_id"] if name == "shapesg" else ref["ann_id"] % 10
            assert ref["file_name"] == f"COCO_train2014_{ref['image_id']:012d}_{suffix}.jpg"
        assert ref["split"] in FLAVOURS[name].splits
        assert [sentence["sent_id"] for sentence in ref["sentences"]] == ref["sent_ids"]
        for sentence in ref["sentences"]:
            assert set(sentence) == {"tokens", "raw", "sent", "sent_id"}
            assert sentence["sent"] == " ".join(sentence["tokens"]) == sentence["sent"].lower()
    kinds = json.loads((root / name / "kinds.json").read_bytes())
    assert sorted(kinds, key=int) == [str(sent_id) for sent_id in sorted(sent_ids)]


def check_targets(ref: dict, annotations: dict[int, dict]) -> None:
    """As in gRefCOCO: lists of equal length, [-1] and [-1] where nothing is meant."""
    assert ref["no_target"] == (ref["ann_id"] == [-1]) == (ref["category_id"] == [-1])
    if not ref["no_target"]:
        assert ref["ann_id"] == sorted(set(ref["ann_id"])) != []
        meant = [annotations[number] for number in ref["ann_id"]]
        assert {annotation["image_id"] for annotation in meant} == {ref["image_id"]}
        assert ref["category_id"] == [annotation["category_id"] for annotation in meant]
    assert re.fullmatch(rf"COCO_train2014_{ref['image_id']:012d}_\d+\.jpg", ref["file_name"])


def test_a_generalised_ref_is_of_the_kinds_that_its_sentences_have(root: Path) -> None:
    refs, _ = load(root, STAR)
    kinds = json.loads((root / STAR / "kinds.json").read_bytes())
    for ref in refs:
        own = {kinds[str(sent_id)] for sent_id in ref["sent_ids"]}
        meant = "none" if ref["no_target"] else "several" if len(ref["ann_id"]) > 1 else None
        assert own == {meant} if meant else not own & {"none", "several"}
    assert len({ref["file_name"] for ref in refs}) == len(refs)


@pytest.mark.parametrize("name", SINGLE)
def test_pickle_is_plain_and_old(root: Path, name: str) -> None:
    content = (root / name / f"refs({FLAVOURS[name].split_by}).p").read_bytes()
    opcodes = {opcode.name for opcode, _, _ in pickletools.genops(content)}
    assert not opcodes & {"GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD", "FRAME"}
    assert content[:2] == b"\x80\x02"


@pytest.mark.parametrize("name", FLAVOURS)
def test_our_own_reader_finds_nothing_wrong(root: Path, name: str) -> None:
    files = read_refer(root, DatasetName.parse(name))
    refs, instances = load(root, name)
    assert not files.problems
    assert not files.bad_images
    assert not files.bad_annotations
    assert len(files.references) == len(refs)
    assert sum(number >= 0 for number in files.annotations) == len(instances["annotations"])  # others are targets


@pytest.mark.parametrize("name", FLAVOURS)
def test_every_picture_has_its_size_and_a_ref(root: Path, name: str) -> None:
    refs, instances = load(root, name)
    spoken_of = {ref["image_id"] for ref in refs}
    shapes = set()
    for image in instances["images"]:
        with Image.open(root / IMAGE_FOLDER / image["file_name"]) as picture:
            assert picture.size == (image["width"], image["height"])
            assert picture.mode == "RGB"
        assert max(image["width"], image["height"]) == SPEC.canvas
        shapes.add((image["width"], image["height"]))
    assert spoken_of == {image["id"] for image in instances["images"]}
    assert len(shapes) >= 3


def test_splits_have_their_images_and_share_none(root: Path) -> None:
    for name, flavour in FLAVOURS.items():
        refs, instances = load(root, name)
        split_of = {ref["image_id"]: ref["split"] for ref in refs}
        assert all(split_of[ref["image_id"]] == ref["split"] for ref in refs)
        assert Counter(split_of.values()) == {split: SPEC.images(split) for split in flavour.splits}
        contents = {(root / IMAGE_FOLDER / image["file_name"]).read_bytes() for image in instances["images"]}
        assert len(contents) == len(instances["images"])


def test_test_a_is_round_and_test_b_is_not(root: Path) -> None:
    for name in ("shapes", "shapes+"):
        refs, _ = load(root, name)
        shapes = {
            split: {SHAPES[r["category_id"] - 1] for r in refs if r["split"] == split}
            for split in ("testA", "testB", "val")
        }
        assert shapes["testA"] == set(ROUND)
        assert shapes["testB"] == set(SHAPES) - set(ROUND)
        assert shapes["val"] == set(SHAPES)


def test_sisters_share_pictures_and_nothing_else_does(root: Path) -> None:
    (refs, shapes), (plus_refs, plus), (_, long), (star_refs, star) = (load(root, name) for name in FLAVOURS)
    assert shapes["images"] == plus["images"] == star["images"]
    assert shapes["annotations"] == plus["annotations"] == star["annotations"]
    pictures = [{(ref["image_id"], ref["split"]) for ref in each} for each in (refs, plus_refs, star_refs)]
    assert pictures[0] == pictures[1] == pictures[2]
    assert not {image["id"] for image in shapes["images"]} & {image["id"] for image in long["images"]}
    everything = {path.name: path.read_bytes() for path in (root / IMAGE_FOLDER).iterdir()}
    assert len(everything) == len(set(everything.values())) == len(shapes["images"]) + len(long["images"])


@pytest.mark.parametrize("name", ["shapes", "shapesg"])
def test_masks_are_what_is_seen(root: Path, name: str) -> None:
    """Decoded polygons match the visible pixels, follow COCO's area and bbox, and cover the right colour."""
    _, instances = load(root, name)
    images = {image["id"]: image for image in instances["images"]}
    by_image: dict[int, list[dict]] = {}
    for annotation in instances["annotations"]:
        by_image.setdefault(annotation["image_id"], []).append(annotation)
    names, palette = list(COLOURS), np.array(list(COLOURS.values()))
    for split in FLAVOURS[name].splits:
        for index in range(SPEC.images(split)):
            page = Page(SPEC, FLAVOURS[name], split, index)
            scene, _ = page.draw()
            pixels = np.asarray(Image.open(root / IMAGE_FOLDER / images[page.image_id]["file_name"]), float)
            assert len(by_image[page.image_id]) == len(scene.things)
            for number, (thing, annotation) in enumerate(zip(scene.things, by_image[page.image_id], strict=True)):
                counts = masks.segmentation_to_counts(annotation["segmentation"], scene.height, scene.width)
                mask = masks.decode(counts, scene.height, scene.width) > 0
                visible = scene.visible_mask(number)
                assert (mask & visible).sum() > 0.95 * (mask | visible).sum()
                assert visible.sum() >= 0.6 * scene.areas[number]
                assert SHAPES[annotation["category_id"] - 1] == thing.shape
                seen = np.median(pixels[mask], axis=0)
                assert names[int(np.argmin(np.linalg.norm(palette - seen, axis=1)))] == thing.colour
                check_area_and_bbox(annotation)


def check_area_and_bbox(annotation: dict) -> None:
    polygons = [np.array(polygon).reshape(-1, 2) for polygon in annotation["segmentation"]]
    area = 0.0
    for polygon in polygons:
        assert len(polygon) >= 3
        (x0, y0), (x1, y1) = polygon.T, np.roll(polygon, -1, axis=0).T
        area += abs(float(np.sum(x0 * y1 - x1 * y0))) / 2
    assert annotation["area"] == pytest.approx(area, abs=1e-6)
    corners = np.concatenate(polygons)
    low, size = corners.min(axis=0), np.ptp(corners, axis=0)
    assert annotation["bbox"] == pytest.approx([*low, *size], abs=0.0051)
    assert annotation["bbox"] == [round(value, 2) for value in annotation["bbox"]]


def test_a_ring_keeps_its_hole_and_a_split_thing_its_pieces() -> None:
    ring = Thing("ring", "red", "large", 60, 60, 30, 0.0, (200.0, 0.0, 0.0))
    bar = Thing("square", "blue", "small", 60, 60, 16, 0.0, (0.0, 0.0, 200.0))
    alone = settle(128, 128, [ring])
    (outline,) = visible_polygons(alone, 0)
    mask = masks.decode(masks.segmentation_to_counts([outline.ravel().tolist()], 128, 128), 128, 128)
    assert mask[60, 60] == 0
    assert mask[60, 60 + 22] == mask[60 - 22, 60] == 1
    # Three squares side by side cut the ring into an upper and a lower piece.
    cut = settle(128, 128, [ring, *(Thing("square", "blue", "small", x, 60, 16, 0.0, bar.tint) for x in (34, 60, 86))])
    pieces = visible_polygons(cut, 0)
    assert len(pieces) == 2
    parts = masks.segmentation_to_counts([piece.ravel().tolist() for piece in pieces], 128, 128)
    mask, visible = masks.decode(parts, 128, 128) > 0, cut.visible_mask(0)
    assert (mask & visible).sum() > 0.95 * (mask | visible).sum()


def test_scenes_hold_distractors_and_some_hide_each_other() -> None:
    scenes = [sample_scene(np.random.default_rng([1, index]), 160) for index in range(200)]
    counts = Counter(len(scene.things) for scene in scenes)
    assert set(counts) == {3, 4, 5}
    hidden = [1 - shares[i] for scene in scenes for i, shares in enumerate(scene.hidden)]
    assert 0.05 < np.mean([share > 0.05 for share in hidden]) < 0.3
    assert max(hidden) <= 0.4
    alike = [
        any(t.shape == o.shape or t.colour == o.colour for o in scene.things[:i])
        for scene in scenes
        for i, t in enumerate(scene.things)
        if i
    ]
    assert np.mean(alike) > 0.75
    assert 0.04 < np.mean([mask.mean() for s in scenes for mask in map(s.visible_mask, range(len(s.things)))]) < 0.08


def test_captions_are_of_training_pictures_only(root: Path) -> None:
    refs, instances = load(root, "shapes")
    captions = json.loads((root / "shapes/captions.json").read_bytes())
    train = {ref["image_id"] for ref in refs if ref["split"] == "train"}
    assert {image["id"] for image in captions["images"]} == train
    annotations = captions["annotations"]
    assert {caption["image_id"] for caption in annotations} == train
    assert [caption["id"] for caption in annotations] == list(range(len(annotations)))
    boxes = {(a["image_id"], *a["bbox"]) for a in instances["annotations"] if a["image_id"] in train}
    assert {(c["image_id"], *c["bbox"]) for c in annotations if "bbox" in c} == boxes
    assert Counter(c["image_id"] for c in annotations if "bbox" not in c) == dict.fromkeys(train, 3)
    words = {word.strip(",") for c in annotations for word in c["caption"].split()}
    assert {"left", "right", "top", "bottom", "largest", "small", "first", "second", "from"} <= words
    for sister in ("shapes+", STAR):
        assert json.loads((root / sister / "captions.json").read_bytes())["annotations"] == annotations


def test_bytes_depend_on_the_spec_alone(root: Path, tmp_path: Path) -> None:
    counts = write_dataset(tmp_path / "two", "shapes", SPEC, workers=2, progress=False)
    assert write_dataset(tmp_path / "one", "shapes", SPEC, progress=False) == counts
    two = digests(tmp_path / "two")
    assert digests(tmp_path / "one") == two
    assert two.items() <= digests(root).items()
    other = SyntheticSpec(seed=4, canvas=128, train=24, val=10, test=8)
    write_dataset(tmp_path / "other", "shapes", other, progress=False)
    assert not set(digests(tmp_path / "other").values()) & set(two.values())


# Of the files that SPEC makes. Whoever changes them on purpose writes the new ones here, and makes the records anew.
WRITTEN = {
    "shapes/captions.json": "b66695bf662147f6a32bec5ffc493fe30b9e11215d9ef3c8d1ef1ff54f60fb3c",
    "shapes/instances.json": "108a84920a40d88eb6929590bc1ae5450dae8cd10870d957f740177d5664d404",
    "shapes/kinds.json": "007c8936df2b816fe26244abb94eae31bde9b3bb7126d53bdbf358cabe010394",
    "shapes/refs(unc).p": "0cfedb447b2308569e0e58d1ab1536b152e50fb76d98268d6bdcdd3f4ea90f9e",
    "shapes+/kinds.json": "f851a25dd3208d7cc26cbcb3d71c328557829c38ff79d726850110626e03c68b",
    "shapes+/refs(unc).p": "7d36e8374815e23645785afb48f02d00cd9c8f0f771e3c847f9b5cad55fc7cda",
    "shapesg/captions.json": "4825fc12540bd2b86b39b93bf20e2a1ca2dabb44f0e53fcb077a61549c465b38",
    "shapesg/instances.json": "4cdaa885f769505f4927627f45b0f5a58f6f52a347e0344c24f5c2092f8d48c7",
    "shapesg/kinds.json": "877062aeac5a55664dd89d59281f695c2669459afb7931e0c4aa5ccf73a515e1",
    "shapesg/refs(umd).p": "2ee00699a3ec8d3b4502cc63623de4b480a1f1fa769e546326a8bd6416ea2598",
}


def test_flavours_of_one_target_are_what_they_always_were(root: Path) -> None:
    assert WRITTEN.items() <= digests(root).items()


@pytest.mark.parametrize("kernels", ["Prescott", "Haswell"])
def test_bytes_do_not_depend_on_the_processor(root: Path, tmp_path: Path, kernels: str) -> None:
    """As on a machine whose numpy takes other instructions: BLAS' for older processors, and its own least ones."""
    code = (
        "import sys; from pathlib import Path; from ris_core.data.shapes.synthetic import SyntheticSpec, write_dataset; "
        f"write_dataset(Path(sys.argv[1]), 'shapes', {SPEC!r}, progress=False)"
    )
    other = {"OPENBLAS_CORETYPE": kernels, "NPY_DISABLE_CPU_FEATURES": "X86_V4 AVX512_ICL AVX512_SPR"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=os.environ | other, check=True)
    assert digests(tmp_path).items() <= digests(root).items()


def test_counts_tell_what_was_written(tmp_path: Path) -> None:
    counts = write_dataset(tmp_path, "shapesg", SPEC, progress=False)
    refs, _ = load(tmp_path, "shapesg")
    for split, told in counts["splits"].items():
        mine = [ref for ref in refs if ref["split"] == split]
        assert told["images"] == SPEC.images(split)
        assert told["refs"] == len(mine)
        assert told["sentences"] == sum(told["kinds"].values()) == sum(len(ref["sentences"]) for ref in mine)
    captions = json.loads((tmp_path / "shapesg/captions.json").read_bytes())
    assert counts["captions"] == len(captions["annotations"])


@pytest.mark.parametrize("moves", [0, 5, 42])
def test_a_killed_run_leaves_nothing_that_looks_whole(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch, moves: int
) -> None:
    """Killed while drawing (0) or after so many moves into place: no dataset folder, and a rerun mends everything."""
    done = Counter[str]()

    def move(source: Path, target: Path) -> None:
        done["moves"] += 1
        if done["moves"] > moves:
            raise KeyboardInterrupt
        real_move(source, target)

    def fail(*_: object) -> bytes:
        raise KeyboardInterrupt

    real_move = os.replace
    with monkeypatch.context() as patch:
        patch.setattr(synthetic.os, "replace", move)
        if moves == 0:
            patch.setattr(synthetic, "_json", fail)
        with pytest.raises(KeyboardInterrupt):
            write_dataset(tmp_path, "shapes", SPEC, progress=False)
    assert not (tmp_path / "shapes").exists()
    with pytest.raises(DataError):
        read_refer(tmp_path, DatasetName.parse("shapes"))
    write_dataset(tmp_path, "shapes", SPEC, progress=False)
    assert digests(tmp_path).items() <= digests(root).items()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "shapes"]


def test_rewriting_replaces_everything_of_its_own(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root, tmp_path, dirs_exist_ok=True)
    foreign = tmp_path / IMAGE_FOLDER / "COCO_train2014_000000581857.jpg"
    foreign.write_bytes(b"a photo")
    before = digests(tmp_path)
    small = SyntheticSpec(seed=3, canvas=128, train=2, val=1, test=1)
    write_dataset(tmp_path, "shapesg", small, progress=False)
    after = digests(tmp_path)
    kept = {
        path: digest for path, digest in before.items() if "COCO_train2014_000002" not in path and "shapesg" not in path
    }
    assert kept.items() <= after.items()
    assert sum("COCO_train2014_000002" in path for path in after) == 4


def test_sisters_drawn_otherwise_are_refused(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root, tmp_path, dirs_exist_ok=True)
    before = digests(tmp_path)
    with pytest.raises(DataError, match=r"shapes\+ is to be drawn with .*share their pictures: use the same values"):
        write_dataset(tmp_path, "shapes+", SyntheticSpec(seed=9, canvas=128, train=2, val=1, test=1), progress=False)
    assert digests(tmp_path) == before


def test_bad_requests_are_told_all_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no embedded dataset 'refcoco': choose one of shapes, shapes\+, shapesg"):
        write_dataset(tmp_path, "refcoco", SPEC)
    with pytest.raises(ConfigError, match="workers is 0"):
        write_dataset(tmp_path, "shapes", SPEC, workers=0)
    with pytest.raises(ConfigError) as caught:
        SyntheticSpec(seed=-1, canvas=8, train=0, sentences_per_ref=(3, 2), jpeg_quality=100)
    message = str(caught.value)
    assert "5 problems" in message
    for text in ("seed is -1", "canvas is 8", "train is 0", "sentences_per_ref is 3 to 2", "jpeg_quality is 100"):
        assert text in message
    assert list(tmp_path.iterdir()) == []
