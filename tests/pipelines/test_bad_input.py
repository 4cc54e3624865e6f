"""Bad input at the door: `python -m pipelines.prepare` says what, where and what to do, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from pipelines_world import Workplace
from refer_fixture import HTML, IMAGES_2014, Malicious, small_dataset

NAME = "refcoco_unc"


def spoil_html(root: Path) -> None:
    (root / "refcoco" / "refs(unc).p").write_bytes(HTML)


def spoil_global(root: Path) -> None:
    (root / "refcoco" / "refs(unc).p").write_bytes(pickle.dumps([Malicious(root / "executed")], 2))


def spoil_pickle_end(root: Path) -> None:
    place = root / "refcoco" / "refs(unc).p"
    place.write_bytes(place.read_bytes()[:-200])


def spoil_instances(root: Path) -> None:
    (root / "refcoco" / "instances.json").unlink()


def spoil_instances_end(root: Path) -> None:
    place = root / "refcoco" / "instances.json"
    place.write_bytes(place.read_bytes()[:-200])


def spoil_image_folder(root: Path) -> None:
    os.rename(root / "images", root / "pictures")


def spoil_jpeg_end(root: Path) -> None:
    place = root / IMAGES_2014 / "COCO_train2014_000000000002.jpg"
    place.write_bytes(place.read_bytes()[:-1500])


def spoil_jpeg_there(root: Path) -> None:
    (root / IMAGES_2014 / "COCO_train2014_000000000003.jpg").unlink()


def spoil_nothing(root: Path) -> None:
    """A dataset that is asked for by a name nobody gave it."""


@dataclass(frozen=True)
class Case:
    spoil: Callable[[Path], None]
    told: tuple[str, ...]
    dataset: str = NAME


REFS, INSTANCES = "data/raw/refcoco_unc/refcoco/refs(unc).p", "data/raw/refcoco_unc/refcoco/instances.json"
FETCH = "Run `ris fetch refcoco_unc`, or unpack refcoco.zip there ("
CASES = [
    Case(spoil_html, (f"{REFS} is an HTML or XML page", FETCH, "sha256")),
    Case(spoil_global, (f"{REFS} asks for the Python object ", "Nothing was executed", "do not open it with", FETCH)),
    Case(spoil_pickle_end, (f"{REFS} is damaged, cut short or no pickle at all", FETCH)),
    Case(spoil_instances, (f"{INSTANCES}: no such file", FETCH)),
    Case(spoil_instances_end, (f"{INSTANCES} is damaged, cut short or no JSON at all", FETCH)),
    Case(spoil_nothing, ("there is no dataset 'refcocog_unc'", "did you mean refcocog_umd or"), "refcocog_unc"),
    Case(spoil_nothing, ("data/raw/refcoco+_unc/refcoco+/refs(unc).p: no such file", "refcoco+.zip"), "refcoco+_unc"),
    Case(spoil_image_folder, ("data/raw/refcoco_unc: no image folder", "Unpack COCO's train2014.zip there")),
    Case(
        spoil_jpeg_end,
        (
            "refcoco_unc: 1 of 7 refs cannot be used: 1 undecodable_image",
            "image 2: images/mscoco/images/train2014/COCO_train2014_000000000002.jpg cannot be decoded",
            "(needed by ref 2)",
            "Mend the files, or go on without these refs by on_bad='skip' (params.yaml: prepare.on_bad)",
        ),
    ),
    Case(
        spoil_jpeg_there,
        (
            "refcoco_unc: 1 of 7 refs cannot be used: 1 missing_image",
            "image 3: images/mscoco/images/train2014/COCO_train2014_000000000003.jpg is missing (needed by ref 3)",
        ),
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.spoil.__name__}-{case.dataset}")
def test_prepare_refuses(case: Case, workplace: Workplace) -> None:
    root = small_dataset(NAME).write(workplace.root / "data/raw/refcoco_unc")
    case.spoil(root)
    before = workplace.files()
    done = workplace.stage("prepare", "--dataset", case.dataset)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    for text in case.told:
        assert text in done.stderr
    assert workplace.files() == before  # no outputs, nothing half-written, nothing executed


def test_prepare_goes_on_without_bad_refs_when_told_to(workplace: Workplace) -> None:
    root = small_dataset(NAME).write(workplace.root / "data/raw/refcoco_unc")
    spoil_jpeg_end(root)
    spoil_jpeg_there(root)
    before = workplace.files()
    workplace.change(prepare={"on_bad": "skip"})
    done = workplace.stage("prepare", "--dataset", NAME)
    assert done.returncode == 0, done.stderr
    assert "refcoco_unc: 2 of 7 refs cannot be used and were left out" in done.stderr
    assert done.stdout == "data/records/refcoco_unc.parquet: 4 images\n"
    assert workplace.files() - before == {"data/records/refcoco_unc.parquet", "results/audit/refcoco_unc.json"}
    report = json.loads((workplace.root / "results/audit/refcoco_unc.json").read_text())
    assert report["refs"] == {"in_file": 7, "bad": 2, "excluded": 0, "kept": 5}
    assert {kind: report["problems"][kind] for kind in ("missing_image", "undecodable_image")} == {
        "missing_image": 1,
        "undecodable_image": 1,
    }


def test_a_split_that_was_never_released(workplace: Workplace) -> None:
    workplace.change(evaluate={"splits": ["val", "test"]})
    done = workplace.stage("evaluate", "--system", "cris", "--dataset", "refcocog_google")
    assert done.returncode == 1
    assert done.stderr == "error: refcocog_google has no split 'test'; it has train, val\n"
    assert workplace.files() == set()
