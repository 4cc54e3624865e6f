from pathlib import Path

import numpy as np
import pytest
from refer_fixture import OVERLAPPING, SmallDataset, small_dataset

from ris_core.data import masks
from ris_core.data.records import ImageRecord
from ris_core.data.refer import join as join_module
from ris_core.data.refer.join import build_records, exclude_images
from ris_core.data.refer.reader import DatasetName, read_refer
from ris_core.data.refer.rows import Problem
from ris_core.errors import ConfigError, DataError


def join(
    small: SmallDataset, root: Path, on_bad: str = "error", images: dict[int, Problem] | None = None
) -> tuple[list[ImageRecord], list[Problem]]:
    files = read_refer(small.write(root, image_folder=None), DatasetName.parse("refcoco_unc"))
    return build_records(files, {n: f"{n}.jpg" for n in files.images}, images or {}, on_bad=on_bad)


def ref_ids(records: list[ImageRecord]) -> list[int]:
    return sorted(ref.ref_id for record in records for ref in record.refs)


def test_records_hold_everything_of_an_image_in_order(tmp_path: Path) -> None:
    small = small_dataset()
    small.refs.reverse()
    small.images.reverse()
    small.annotations.reverse()
    records, _ = join(small, tmp_path)
    assert [record.image_id for record in records] == [1, 2, 3, 4, 5, 6]
    first = records[0]
    assert (first.file_name, first.height, first.width) == ("1.jpg", 80, 100)
    assert [ref.ref_id for ref in first.refs] == [1, 7]
    assert [(i.ann_id, i.category, i.iscrowd) for i in first.instances] == [
        (10, "thing", 0),
        (11, "thing", 0),
        (900, "crowd", 1),
    ]
    union = masks.decode(first.instances[0].counts, 80, 100)
    assert set(np.unique(union)) == {0, 1}
    assert union.sum() == masks.area(masks.segmentation_to_counts(OVERLAPPING, 80, 100), 80, 100)
    assert masks.decode(first.instances[2].counts, 80, 100)[:, 10].all()


def test_bad_annotations_that_nobody_needs_do_not_block(tmp_path: Path) -> None:
    records, problems = join(small_dataset(), tmp_path)
    assert ref_ids(records) == [1, 2, 3, 4, 5, 6, 7]
    assert [(problem.kind, problem.blocking) for problem in problems] == [("degenerate_segmentation", False)] * 2
    assert problems[0].message.startswith("annotation 901 of image 1: segmentation must be polygons")
    assert "annotation 902 of image 2: part 1 of 1: degenerate polygon of 4 numbers" in problems[1].message


def test_masks_that_other_processes_make_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = small_dataset()
    files = read_refer(small.write(tmp_path, image_folder=None), DatasetName.parse("refcoco_unc"))
    paths = {n: f"{n}.jpg" for n in files.images}
    alone = build_records(files, paths, {}, on_bad="skip")
    monkeypatch.setattr(join_module, "SHARED_FROM", 1)
    monkeypatch.setattr(join_module, "CHUNK", 3)
    assert len(files.annotations) > 3
    assert build_records(files, paths, {}, on_bad="skip", workers=2) == alone
    assert join_module._inherited == [], "nothing of it is kept here"


def spoilt_dataset() -> SmallDataset:
    """Only refs 6 and 7 are left without a fault."""
    small = small_dataset()
    small.ref(1)["ann_id"] = 901
    small.ref(2)["image_id"] = 999
    small.ref(3)["ann_id"] = 888
    small.ref(4)["ann_id"] = 51
    small.annotation(50)["segmentation"] = [[200, 100, 190, 100, 190, 110]]  # beside the image
    return small


def test_one_error_lists_every_cause_with_ref_annotation_and_image(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        join(spoilt_dataset(), tmp_path)
    text = str(caught.value)
    title = "refcoco_unc: 5 of 7 refs cannot be used: 2 dangling_ref, 2 image_mismatch, 1 empty_mask"
    assert text.startswith(f"{title}, 1 degenerate_segmentation (6 problems):\n")
    for line in (
        "annotation 901 of image 1: segmentation must be polygons or run lengths; found [] (needed by ref 1)",
        "ref 2: there is no image 999",
        "ref 2: its annotation 20 belongs to image 2, the ref says image 999",
        "ref 3: there is no annotation 888",
        "ref 4: its annotation 51 belongs to image 5, the ref says image 4",
        "annotation 50 of image 5: its mask has no pixel (needed by ref 5)",
    ):
        assert f"  - {line}\n" in text
    assert "annotation 902" not in text  # nobody needs it
    assert text.endswith("go on without these refs by on_bad='skip' (params.yaml: prepare.on_bad).")


def test_skip_leaves_out_exactly_the_bad_refs(tmp_path: Path) -> None:
    records, problems = join(spoilt_dataset(), tmp_path, on_bad="skip")
    assert ref_ids(records) == [6, 7]
    assert [record.image_id for record in records] == [1, 6]
    assert sum(problem.blocking for problem in problems) == 6
    clean, _ = join(small_dataset(), tmp_path)
    assert records[1] == clean[5]


def test_a_bad_image_takes_all_its_refs(tmp_path: Path) -> None:
    images = {1: Problem("missing_image", "image 1: 1.jpg is missing")}
    with pytest.raises(
        DataError, match=r"2 of 7 refs .* 1 missing_image .*\n.*1\.jpg is missing \(needed by ref 1, 7\)"
    ):
        join(small_dataset(), tmp_path, images=images)
    records, _ = join(small_dataset(), tmp_path, on_bad="skip", images=images)
    assert ref_ids(records) == [2, 3, 4, 5, 6]


def test_annotations_of_other_tools_need_no_box_area_or_crowd(tmp_path: Path) -> None:
    small = small_dataset()
    for key in ("iscrowd", "bbox", "area"):
        del small.annotation(20)[key]
    records, problems = join(small, tmp_path)
    assert {problem.kind for problem in problems} == {"degenerate_segmentation"}  # of annotations that nobody needs
    whole, _ = join(small_dataset(), tmp_path)
    with_box, without = (found[1].instances[0] for found in (whole, records))
    assert (without.iscrowd, without.counts) == (0, with_box.counts)
    assert without.area == masks.area(without.counts, 80, 100)
    assert without.bbox == pytest.approx(with_box.bbox, abs=1)


@pytest.mark.parametrize("stray", [[5.0, 5.0, 6.0, 6.0], [5.0, 5.0]])
def test_a_stray_polygon_beside_a_good_one_is_left_out_and_told(tmp_path: Path, stray: list[float]) -> None:
    small = small_dataset()
    small.annotation(20)["segmentation"].append(stray)
    records, problems = join(small, tmp_path)
    clean, _ = join(small_dataset(), tmp_path)
    assert records == clean
    text = "annotation 20 of image 2: 1 of its 2 polygons have fewer than three points and were left out"
    assert Problem("stray_polygon", text) in problems
    small.annotation(20)["segmentation"] = [stray, stray]
    with pytest.raises(DataError, match=r"part 1 of 2: degenerate polygon of . numbers.*part 2 of 2"):
        join(small, tmp_path)


def test_contradictions_that_leave_the_mask_alone_are_only_told(tmp_path: Path) -> None:
    small = small_dataset()
    small.ref(2)["category_id"] = 3
    small.ref(7)["ann_id"] = 900
    records, problems = join(small, tmp_path)
    assert len(ref_ids(records)) == 7
    assert {problem.message for problem in problems if problem.kind in ("category_mismatch", "ref_to_crowd")} == {
        "ref 2: its annotation 20 has category 1, the ref says 3",
        "ref 7: its annotation 900 has category 3, the ref says 1",
        "ref 7: its annotation 900 is a crowd, not one object",
    }


def test_malformed_rows_and_entries_used_twice_are_blamed(tmp_path: Path) -> None:
    small = small_dataset()
    small.images.append(small.images[1])
    small.annotation(30)["category_id"] = 77
    small.annotation(31)["image_id"] = 555
    del small.ref(4)["sentences"]
    with pytest.raises(DataError) as caught:
        join(small, tmp_path)
    assert "3 of 7 refs cannot be used" in str(caught.value)
    assert "id 2 at position 6 is used twice (needed by ref 2)" in str(caught.value)
    assert "annotation 30: category_id 77 is not among the categories (needed by ref 3)" in str(caught.value)
    assert "ref 4: no 'sentences'" in str(caught.value)
    records, problems = join(small, tmp_path, on_bad="skip")
    assert ref_ids(records) == [1, 5, 6, 7]
    loose = [problem for problem in problems if problem.kind == "dangling_annotation"]
    assert loose == [Problem("dangling_annotation", "annotation 31 of image 555: that image is not usable")]


def test_nothing_left_is_an_error_even_when_skipping(tmp_path: Path) -> None:
    small = small_dataset()
    small.images.clear()
    with pytest.raises(DataError, match=r"7 of 7 refs cannot be used.*\n(.*\n)+No ref is left to go on with"):
        join(small, tmp_path, on_bad="skip")


def test_on_bad_must_be_known(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="on_bad must be one of error, skip; found 'ignore'"):
        join(small_dataset(), tmp_path, on_bad="ignore")


def test_excluding_images_drops_training_refs_only(tmp_path: Path) -> None:
    small = small_dataset()
    small.ref(7)["split"] = "val"  # image 1 then has a train and a val ref, as in the google splits
    records, _ = join(small, tmp_path)
    kept, dropped = exclude_images(records, {1, 2, 3, 777})
    assert dropped == 2
    assert ref_ids(kept) == [3, 4, 5, 6, 7]
    assert [record.image_id for record in kept] == [1, 3, 4, 5, 6]
    assert kept[1:] == records[2:]
    assert exclude_images(records, set()) == (records, 0)
