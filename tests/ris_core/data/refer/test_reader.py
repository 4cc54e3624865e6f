import json
import logging
import re
import tracemalloc
from array import array
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from refer_fixture import HTML, Malicious, annotation, python2_pickle, small_dataset

from ris_core.data.records import Sentence
from ris_core.data.refer.reader import DatasetName, facts, read_instances, read_refer, read_references
from ris_core.data.refer.rows import ImageInfo, Problem, parse_image
from ris_core.errors import DataError

UNC = DatasetName.parse("refcoco_unc")


@pytest.mark.parametrize(
    ("name", "refs_file", "splits"),
    [
        ("refcoco_unc", "refcoco/refs(unc).p", "train val testA testB"),
        ("refcoco_google", "refcoco/refs(google).p", "train val test"),
        ("refcoco+_unc", "refcoco+/refs(unc).p", "train val testA testB"),
        ("refcocog_umd", "refcocog/refs(umd).p", "train val test"),
        ("refcocog_google", "refcocog/refs(google).p", "train val"),
        ("shapes", "shapes/refs(unc).p", "train val testA testB"),
        ("shapes+", "shapes+/refs(unc).p", "train val testA testB"),
        ("shapesg", "shapesg/refs(umd).p", "train val test"),
        ("shapes*", "shapes*/grefs(unc).p", "train val testA testB"),
    ],
)
def test_dataset_names(name: str, refs_file: str, splits: str) -> None:
    dataset = DatasetName.parse(name)
    assert (dataset.refs_file, " ".join(dataset.splits)) == (refs_file, splits)
    assert dataset.check_split("val") == "val"


@pytest.mark.parametrize("name", ["refcocog_unc", "refcoco", "refcoco+_google", "", "coco", "Shapes"])
def test_unknown_datasets_are_refused_with_the_valid_names(name: str) -> None:
    with pytest.raises(DataError, match=re.escape(f"no dataset '{name}'")) as caught:
        DatasetName.parse(name)
    assert "refcocog_umd, refcocog_google, grefcoco_unc, shapes, shapes+, shapesg, shapes*" in str(caught.value)
    if name == "refcocog_unc":
        assert "did you mean refcocog_umd or refcocog_google?" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        ("refcocog_google", "test", "refcocog_google has no split 'test'; it has train, val"),
        ("refcoco_unc", "test", "testA, testB (the official reader's 'test' means testA and testB together)"),
        ("refcocog_umd", "testA", "refcocog_umd has no split 'testA'; it has train, val, test"),
    ],
)
def test_unknown_splits_are_refused_with_the_valid_ones(name: str, split: str, message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        DatasetName.parse(name).check_split(split)


@pytest.mark.parametrize("name", list(facts()["counts"]))
def test_published_counts_add_up_and_name_real_splits(name: str) -> None:
    published = dict(facts()["counts"][name])
    total = published.pop("total")
    assert set(published) == set(DatasetName.parse(name).splits)
    assert sum(split["refs"] for split in published.values()) == total["refs"]
    if all("sentences" in split for split in published.values()):
        assert sum(split["sentences"] for split in published.values()) == total["sentences"]


@pytest.mark.parametrize("protocol", [0, 1, 2])
def test_a_dataset_is_read_as_written(tmp_path: Path, protocol: int) -> None:
    small = small_dataset()
    files = read_refer(small.write(tmp_path, protocol=protocol, image_folder=None), UNC)
    assert files.problems == []
    assert files.bad_images == files.bad_annotations == {}
    assert [ref.ref_id for _, ref in files.references] == [1, 2, 3, 4, 5, 6, 7]
    image_id, ref = files.references[-1]
    assert (image_id, ref.ann_id, ref.category_id, ref.split) == (1, 11, 1, "train")
    # Nothing is de-duplicated or dropped: evaluation counts every sentence.
    assert [s.sent for s in ref.sentences] == ["right one", "right one", "", "café cup"]
    assert ref.sentences[3] == Sentence(73, "café cup", "Café cup.")
    assert files.annotations[11].bbox == (46.0, 11.0, 30.0, 30.0)
    assert files.annotations[900].iscrowd == 1
    assert files.categories == {1: "thing", 3: "crowd"}
    assert [entry.path for entry in files.inputs] == ["refcoco/refs(unc).p", "refcoco/instances.json"]


def test_latin1_texts_are_read_with_a_loud_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    small = small_dataset()
    root = small.write(tmp_path, image_folder=None)
    for encoding, loud in (("utf-8", False), ("latin-1", True)):
        (root / UNC.refs_file).write_bytes(python2_pickle(small.refs, encoding))
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            files = read_references(root, UNC)
        assert files.references[-1][1].sentences[3].sent == "café cup"
        assert ("were read as Latin-1" in caplog.text) == loud
        assert [problem.kind for problem in files.problems] == ["not_utf8"] * loud


def test_damaged_refs_end_in_problems_or_a_data_error(tmp_path: Path) -> None:
    root = small_dataset().write(tmp_path, protocol=0, image_folder=None)
    whole = (root / UNC.refs_file).read_bytes()
    rng = np.random.default_rng(1)
    outcomes = {"as before": 0, "problems": 0, "refused": 0}
    for position, value in zip(rng.integers(0, len(whole), 400), rng.integers(32, 127, 400), strict=True):
        damaged = bytearray(whole)
        damaged[position] = value
        (root / UNC.refs_file).write_bytes(damaged)
        try:
            outcomes["problems" if read_references(root, UNC).problems else "as before"] += 1
        except DataError:
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 10


def test_a_malicious_pickle_is_refused_by_name(tmp_path: Path) -> None:
    small = small_dataset()
    small.refs.append(Malicious(tmp_path / "created"))
    root = small.write(tmp_path, image_folder=None)
    with pytest.raises(DataError, match=r"refcoco/refs\(unc\)\.p asks for the Python object .*open"):
        read_refer(root, UNC)
    assert not (tmp_path / "created").exists()


def test_missing_and_foreign_files_say_where_to_get_the_right_ones(tmp_path: Path) -> None:
    with pytest.raises(
        DataError,
        match=r"refs\(unc\)\.p: no such file\. Run `ris fetch refcoco_unc`.* refcoco\.zip .*sha256 7f924bb7.*archive\.org",
    ):
        read_refer(tmp_path, UNC)
    with pytest.raises(DataError, match=r"no such file\. It is written by `dvc repro synthesize`"):
        read_refer(tmp_path, DatasetName.parse("shapes"))
    small_dataset("refcoco_google").write(tmp_path, image_folder=None)
    with pytest.raises(DataError, match=r"refs\(unc\)\.p: no such file\. This folder has refs\(google\)\.p"):
        read_refer(tmp_path, UNC)
    small_dataset().write(tmp_path, image_folder=None)
    (tmp_path / UNC.refs_file).write_bytes(HTML)
    with pytest.raises(DataError, match=r"refs\(unc\)\.p is an HTML or XML page"):
        read_refer(tmp_path, UNC)


def test_unusable_instances_files_are_named(tmp_path: Path) -> None:
    root = small_dataset().write(tmp_path, image_folder=None)
    place = root / UNC.instances_file
    whole = place.read_bytes()
    for content, message in (
        (whole[:-10], "is damaged, cut short or no JSON"),
        (HTML, "is an HTML or XML page"),
        (b"[1]", "is no COCO file: it has no list of images, annotations, categories"),
        (b'{"images": [], "categories": {}}', "is no COCO file: it has no list of annotations, categories"),
    ):
        place.write_bytes(content)
        with pytest.raises(DataError, match=rf"instances\.json {message}"):
            read_refer(root, UNC)
    place.unlink()
    with pytest.raises(DataError, match=r"instances\.json: no such file"):
        read_refer(root, UNC)


@pytest.mark.parametrize("value", [{}, [], 3])
def test_a_pickle_without_refs_is_refused(tmp_path: Path, value: Any) -> None:
    small = small_dataset()
    small.refs = value
    with pytest.raises(DataError, match="holds no list of referents but"):
        read_refer(small.write(tmp_path, image_folder=None), UNC)


def test_every_malformed_entry_is_told(tmp_path: Path) -> None:
    small = small_dataset()
    small.ref(1)["ref_id"] = True
    small.ref(2)["split"] = "test"
    small.ref(3).update(sent_ids=[30, 99], ann_id="30")
    small.ref(4)["sent_ids"] = [40, 99]
    small.ref(5).update(sentences=[], sent_ids=[])
    del small.ref(6)["sentences"][1]["raw"]
    small.ref(7)["sentences"][0]["sent"] = 5
    small.refs += [None, {**small_dataset().ref(1), "ref_id": 2**70}]
    small.images[0]["height"] = 0
    small.images[1]["file_name"] = "../../secret.jpg"
    small.images.append({**small.images[5]})
    small.annotation(20)["bbox"] = [1, 2, 3]
    small.annotation(30)["area"] = float("inf")
    small.annotation(31)["iscrowd"] = 2
    small.annotation(40)["category_id"] = 77
    small.annotations += [small.annotation(50), "text", {"id": 1.5}]
    small.categories.append({"id": 9})
    files = read_refer(small.write(tmp_path, image_folder=None), UNC)
    assert files.refs_in_file == 9
    assert files.references == []
    assert [(problem.kind, problem.message) for problem in files.problems] == [
        ("malformed_ref", "ref at position 0: 'ref_id' must be int, found bool True"),
        ("unknown_split", "ref 2: its split 'test' is not one of train, val, testA, testB"),
        ("malformed_ref", "ref 3: 'ann_id' must be int, found str '30'"),
        ("malformed_ref", "ref 4: sent_ids [40, 99] are not the ids of its sentences"),
        ("no_sentences", "ref 5: it has no sentences"),
        ("malformed_ref", "ref 6: sentence 1: no 'raw'"),
        ("malformed_ref", "ref 7: sentence 0: 'sent' must be str, found int 5"),
        ("malformed_ref", "ref at position 7: expected a dict, found NoneType"),
        ("malformed_ref", "ref 1180591620717411303424: 'ref_id' is out of range: 1180591620717411303424"),
        ("malformed_category", "category 9: no 'name'"),
        ("malformed_annotation", "annotation at position 16: expected a dict, found str"),
        (
            "malformed_annotation",
            "annotation at position 17: 'id' must be int, found float 1.5; no 'image_id'; no 'category_id'; "
            "no 'segmentation'",
        ),
    ]
    assert {number: problem.message for number, problem in files.bad_images.items()} == {
        1: "image 1: impossible size of 100x0 pixels",
        2: "image 2: file_name '../../secret.jpg' names no file below the dataset",
        6: "id 6 at position 6 is used twice",
    }
    assert {number: problem.message for number, problem in files.bad_annotations.items()} == {
        20: "annotation 20: bbox must be four numbers, found [1, 2, 3]",
        30: "annotation 30: 'area' is out of range: inf",
        31: "annotation 31: iscrowd must be 0 or 1, found 2",
        40: "annotation 40: category_id 77 is not among the categories",
        50: "id 50 at position 15 is used twice",
    }


def test_referents_as_json_are_the_same(tmp_path: Path) -> None:
    root = small_dataset().write(tmp_path, image_folder=None)
    pickled = read_refer(root, UNC)
    place = (root / UNC.refs_file).with_suffix(".json")
    place.write_text(json.dumps(small_dataset().refs))
    assert read_refer(root, UNC).inputs == pickled.inputs  # the official file goes first
    (root / UNC.refs_file).unlink()
    as_json = read_refer(root, UNC)
    assert (as_json.references, as_json.problems) == (pickled.references, pickled.problems)
    assert [entry.path for entry in as_json.inputs] == ["refcoco/refs(unc).json", "refcoco/instances.json"]
    place.write_text("[{")
    with pytest.raises(DataError, match=r"refs\(unc\)\.json is damaged, cut short or no JSON"):
        read_refer(root, UNC)


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ("a.jpg", "a.jpg"),
        ("images/1/a.jpg", "images/1/a.jpg"),
        ("./images//a.jpg", "images/a.jpg"),
        ("images\\1\\a.jpg", "images/1/a.jpg"),
        ("/data/upload/1/a.jpg", "a.jpg"),
        ("C:\\photos\\a.jpg", "a.jpg"),
        ("https://host/photos/a.jpg", "a.jpg"),
        ("..", None),
        (".", None),
        ("", None),
        ("a/../../b.jpg", None),
        ("a\0.jpg", None),
    ],
)
def test_file_names_of_labelling_tools(given: str, read: str | None) -> None:
    found = parse_image({"id": 1, "file_name": given, "height": 2, "width": 3}, 0)
    if read is None:
        assert isinstance(found, Problem)
        assert "names no file below the dataset" in found.message
    else:
        assert found == ImageInfo(1, read, 2, 3)


def test_a_repeated_ref_id_and_a_broken_letter_are_told(tmp_path: Path) -> None:
    small = small_dataset()
    small.refs.append(small_dataset().ref(3))
    small.ref(4)["sentences"][0]["raw"] = "SURROGATE"
    root = small.write(tmp_path, protocol=0, image_folder=None)
    place = root / UNC.refs_file
    place.write_bytes(
        place.read_bytes().replace(b"VSURROGATE", rb"V\ud800")
    )  # half a letter, which no writer would write
    assert [(problem.kind, problem.message) for problem in read_references(root, UNC).problems] == [
        ("malformed_ref", "ref 4: sentence 0: 'raw' is not valid Unicode: '\\ud800'"),
        ("duplicate_id", "ref 3 at position 7: an earlier entry has the same ref_id"),
    ]


def test_polygons_are_held_packed_and_given_as_they_are(tmp_path: Path) -> None:
    """What is no list of numbers is left for the mask codec to refuse."""
    small = small_dataset()
    kept = [[0.5, 1, 2**40, 4.25, 5, 6], [], [True, 1, 2, 3, 4, 5], ["1", 2], [10**400] * 6, None, {"counts": [3]}]
    small.annotation(11)["segmentation"] = kept
    small.write(tmp_path)
    read = read_refer(tmp_path, DatasetName.parse("refcoco_unc")).annotations[11]
    assert read.segmentation == kept
    assert [type(part) for part in read.stored] == [array, array, list, list, list, type(None), dict]


def test_large_instances_are_not_held_as_python_has_them(tmp_path: Path) -> None:
    """Memory at its highest, beside the file: its bytes and its text, or its text and what is kept of it, not all at once."""
    small = small_dataset()
    outline = np.random.default_rng(0).uniform(1, 79, 400).round(2).tolist()
    small.annotations = [annotation(number, 1, [outline]) for number in range(500)]
    small.write(tmp_path)
    name = DatasetName.parse("refcoco_unc")
    size = (tmp_path / name.instances_file).stat().st_size
    files = read_references(tmp_path, name)
    tracemalloc.start()
    read_instances(tmp_path, name.instances_file, "", files)
    held, highest = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(files.annotations) == 500
    assert held < 2 * size
    assert highest < 3 * size
