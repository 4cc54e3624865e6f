from pathlib import Path
from typing import Any

import pytest
from refer_fixture import IMAGES_2014, small_dataset

from ris_core.data.own.description import named, read_parts
from ris_core.data.own.mixed import mix
from ris_core.data.own.reader import read_any
from ris_core.data.records import ImageRecord
from ris_core.data.refer.audit import prepare
from ris_core.errors import ConfigError, DataError


def mixture(place: Path, mixed: str = "{refcoco_unc: 1, refcocog_umd: 2}") -> Path:
    """Two datasets on the same six photos, which lie in the first, and a mixture that links them.

    RefCOCO's refs 1..7 are train, train, val, testA, testB, train, train on images 1..6 and 1; RefCOCOg's refs are train,
    train, val, test, train, train and train.
    """
    for name in ("refcoco_unc", "refcocog_umd"):
        small_dataset(name).write(place / name)
    root = place / "both"
    root.mkdir()
    (root / "images").symlink_to(place / "refcoco_unc" / "images")
    (root / "dataset.yaml").write_text(f"mixed: {mixed}\n")
    return root


def prepared(root: Path, on_bad: str = "error") -> tuple[list[ImageRecord], dict[str, Any]]:
    return prepare(
        root, named(root), on_bad=on_bad, strict=True, exclude={}, check_images=True, workers=2, read=read_any
    )


def test_a_mixture_has_the_referents_of_all_and_none_that_leaks(tmp_path: Path) -> None:
    root = mixture(tmp_path)
    assert named(root).splits == ("train", "val", "testA", "testB", "test")
    records, report = prepared(root)
    refs = [(record.image_id, ref.ann_id, ref.split) for record in records for ref in record.refs]
    once = [
        (1, 10, "train"),
        (2, 20, "train"),
        (6, 60, "train"),
        (1, 11, "train"),
    ]  # of either; image 5 is testB in RefCOCO
    scored = [(3, 30, "val"), (4, 40, "testA"), (5, 50, "testB"), (3, 30, "val"), (4, 40, "test")]
    assert sorted(refs) == sorted(3 * once + scored)
    ids = [ref.ref_id for record in records for ref in record.refs]
    sentences = [each.sent_id for record in records for ref in record.refs for each in ref.sentences]
    assert len(set(ids)) == len(ids)
    assert len(set(sentences)) == len(sentences)
    assert report["refs"] == {"in_file": 7 + 2 * 5 + 2, "bad": 0, "excluded": 2, "kept": 17}
    first = [entry["path"] for entry in report["inputs"]][:2]
    assert first == ["refcoco_unc/refcoco/refs(unc).p", "refcoco_unc/refcoco/instances.json"]
    photos = f"{IMAGES_2014}/COCO_train2014_"
    assert [record.file_name for record in records] == [f"{photos}{n:012d}.jpg" for n in range(1, 7)]


def test_referents_with_several_targets_are_counted_in_a_mixture_too(tmp_path: Path) -> None:
    root = mixture(tmp_path)
    parts = {name: read_any(tmp_path / name, named(tmp_path / name)) for name in ("refcoco_unc", "refcocog_umd")}
    parts["refcocog_umd"].targets = {1: (), 3: (10, 11), 5: (50,)}
    mixed = mix(named(root), parts, {"refcoco_unc": 2, "refcocog_umd": 1})
    count = len(mixed.references) - len(parts["refcocog_umd"].references)
    assert mixed.targets == {count + 1: (), count + 3: (10, 11), count + 5: (50,)}


def test_parts_that_mean_other_things_by_an_id_are_not_mixed(tmp_path: Path) -> None:
    root = mixture(tmp_path)
    other = small_dataset("refcocog_umd")
    other.images[2]["file_name"] = "other.jpg"
    other.write(tmp_path / "refcocog_umd")
    with pytest.raises(
        DataError, match=r"refcoco_unc and refcocog_umd cannot be mixed: image 3 is \('COCO_.*'other\.jpg'"
    ):
        prepared(root)


def test_what_is_wrong_in_a_part_is_told_with_its_name(tmp_path: Path) -> None:
    root = mixture(tmp_path)
    small = small_dataset("refcocog_umd")
    small.ref(1)["split"] = "testA"
    small.write(tmp_path / "refcocog_umd")
    with pytest.raises(DataError, match="refcocog_umd: ref 1: its split 'testA' is not one of"):
        prepared(root)
    records, report = prepared(root, on_bad="skip")
    assert report["refs"]["bad"] == 1
    assert len(records) == 6


@pytest.mark.parametrize(
    ("mixed", "message"),
    [
        ("[refcoco_unc, refcocog_umd]", "mixed: expected two datasets or more"),
        ("{refcoco_unc: 1}", "mixed: expected two datasets or more"),
        ("{refcoco_unc: 0, refcocog_umd: 1.5}", r"mixed\.refcoco_unc: .*found 0\n.*mixed\.refcocog_umd: .*found 1\.5"),
        ("{refcoco_unc: 1, refcocog_umd: 1}\nval: 0.5", "val: a mixed dataset has nothing but `mixed`"),
    ],
)
def test_bad_mixtures_are_refused(tmp_path: Path, mixed: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_parts(mixture(tmp_path, mixed))


def test_parts_have_to_exist_and_be_no_mixtures(tmp_path: Path) -> None:
    root = mixture(tmp_path, "{refcoco_unc: 1, refcoco: 1}")
    with pytest.raises(DataError, match="there is no dataset 'refcoco'"):
        named(root)
    (root / "dataset.yaml").write_text("mixed: {refcoco_unc: 1, both: 1}\n")
    with pytest.raises(ConfigError, match="both is mixed itself"):
        named(root)
