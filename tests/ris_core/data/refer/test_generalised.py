import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from refer_fixture import SmallDataset, small_dataset

from ris_core.data import masks
from ris_core.data.records import ImageRecord, read_records, write_records
from ris_core.data.refer.audit import prepare
from ris_core.data.refer.generalised import parse_targets, target_id
from ris_core.data.refer.reader import DatasetName, read_refer
from ris_core.data.refer.rows import Problem
from ris_core.errors import DataError

NAME = "grefcoco_unc"


def generalised() -> SmallDataset:
    """Ref 1 means both objects of image 1, ref 2 none, ref 3 none by an empty list; the others one, as a list."""
    small = small_dataset(NAME)
    for ref in small.refs:
        ref.update(ann_id=[ref["ann_id"]], category_id=[ref["category_id"]], no_target=False)
    small.ref(1).update(ann_id=[10, 11], category_id=[1, 1])
    small.ref(2).update(ann_id=[-1], category_id=[-1], no_target=True)
    small.ref(3).update(ann_id=[], category_id=[], no_target=True)
    return small


def prepared(root: Path, on_bad: str = "error") -> tuple[list[ImageRecord], dict[str, Any]]:
    return prepare(root, NAME, on_bad=on_bad, strict=False, exclude={}, check_images=True, workers=1)


@pytest.mark.parametrize("as_json", [False, True])
def test_a_referent_has_the_union_of_its_annotations_or_nothing(tmp_path: Path, as_json: bool) -> None:
    root = generalised().write(tmp_path)
    if as_json:
        (root / "grefcoco/grefs(unc).p").unlink()
        (root / "grefcoco/grefs(unc).json").write_text(json.dumps(generalised().refs))
    records, report = prepared(root)
    assert report["refs"] == {"in_file": 7, "bad": 0, "excluded": 0, "kept": 7, "no_target": 2, "several_targets": 1}
    single, _ = prepare(
        small_dataset("shapes").write(tmp_path / "single"),
        "shapes",
        on_bad="error",
        strict=False,
        exclude={},
        check_images=True,
        workers=1,
    )
    plain = {instance.ann_id: instance for record in single for instance in record.instances}
    found = {instance.ann_id: instance for record in records for instance in record.instances}
    refs = {ref.ref_id: ref for record in records for ref in record.refs}
    assert {number: each for number, each in found.items() if number >= 0} == plain
    assert report["annotations"]["kept"] == len(plain)
    both = masks.decode(found[refs[1].ann_id].counts, 80, 100)
    assert np.array_equal(both, masks.decode(plain[10].counts, 80, 100) | masks.decode(plain[11].counts, 80, 100))
    for number in (2, 3):
        nothing = found[refs[number].ann_id]
        assert (nothing.area, nothing.bbox, nothing.iscrowd) == (0, (0, 0, 0, 0), 1)
        assert not masks.decode(nothing.counts, 80, 100).any()
    assert [refs[number].ann_id for number in (1, 2, 3)] == [target_id(number) for number in (1, 2, 3)]
    assert (refs[4].ann_id, refs[4].category_id) == (40, 1)
    assert set(report["problems"]) == {"degenerate_segmentation", "empty_sentence"}
    write_records(tmp_path / "records.parquet", records, NAME)
    assert read_records(tmp_path / "records.parquet") == records


def test_targets_that_cannot_be_made_are_told(tmp_path: Path) -> None:
    small = generalised()
    small.ref(1)["ann_id"] = [10, 20]  # of another image
    small.ref(2)["ann_id"] = [20, 999]
    small.ref(3)["ann_id"] = [31, 31]
    small.ref(4)["ann_id"] = ["40"]
    small.ref(5)["ann_id"] = [-7]
    small.ref(6)["ann_id"] = [60, 61]
    small.annotation(61)["area"] = "large"
    with pytest.raises(DataError) as caught:
        prepared(small.write(tmp_path))
    for text in (
        "6 of 7 refs cannot be used",
        "ref 1: its annotation 20 belongs to image 2, the ref says image 1",
        "ref 2: there is no annotation 999",
        "ref 3: 'ann_id' names an annotation twice, or by a negative id: [31, 31]",
        "ref 4: 'ann_id' must be a list of integers, found ['40']",
        "ref 5: 'ann_id' names an annotation twice, or by a negative id: [-7]",
        "ref 6: annotation 61: 'area' must be int or float",
    ):
        assert text in str(caught.value)
    records, _ = prepared(small.write(tmp_path), on_bad="skip")
    assert [ref.ref_id for record in records for ref in record.refs] == [7]


@pytest.mark.parametrize("entry", [None, [], {"ann_id": [1]}, {"ref_id": 1, "ann_id": [1], "category_id": "x"}])
def test_entries_that_are_none_are_problems(entry: Any) -> None:
    found = parse_targets(entry)
    assert isinstance(found, Problem) or found == (entry, ())


def test_who_has_none_of_it_is_told_where_it_is_given_out(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"grefs\(unc\)\.p: no such file\. gRefCOCO's files are given out by github"):
        prepared(tmp_path)


def test_data_of_that_kind_under_another_name_is_told_what_it_is(tmp_path: Path) -> None:
    root = generalised().write(tmp_path)
    (root / "refcoco").symlink_to(root / "grefcoco")
    unc = DatasetName.parse("refcoco_unc")
    with pytest.raises(
        DataError, match=r"This folder has grefs\(unc\)\.p\. grefs are gRefCOCO's.*name the dataset grefcoco_unc"
    ):
        read_refer(root, unc)
    (root / "grefcoco/refs(unc).p").write_bytes((root / "grefcoco/grefs(unc).p").read_bytes())
    with pytest.raises(DataError, match="lists of annotations are gRefCOCO's: name the dataset grefcoco_unc"):
        prepare(root, "refcoco_unc", on_bad="error", strict=False, exclude={}, check_images=False, workers=1)
