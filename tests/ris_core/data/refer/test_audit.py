import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from refer_fixture import HTML, IMAGES_2014, IMAGES_2017, SmallDataset, small_dataset

from ris_core.data.records import ImageRecord, read_records, write_records
from ris_core.data.refer.audit import compare_with_published, image_leakage, prepare
from ris_core.data.refer.reader import DatasetName
from ris_core.errors import DataError


def run(root: Path, name: str = "refcoco_unc", **changes: Any) -> tuple[list[ImageRecord], dict[str, Any]]:
    options = {"on_bad": "error", "strict": False, "exclude": {}, "check_images": True, "workers": 2}
    return prepare(root, name, **{**options, **changes})


def test_the_report_of_a_good_dataset(tmp_path: Path) -> None:
    records, report = run(small_dataset("shapes").write(tmp_path), "shapes", strict=True)
    assert sum(len(record.refs) for record in records) == 7
    assert report["refs"] == {"in_file": 7, "bad": 0, "excluded": 0, "kept": 7}
    assert report["images"] == {"in_file": 6, "kept": 6, "checked": True, "not_rgb": 1, "exif_turned": 0}
    assert report["annotations"] == {"in_file": 15, "kept": 13, "crowds": 1}
    assert report["splits"] == {
        "train": {"refs": 4, "sentences": 10, "images": 3},
        "val": {"refs": 1, "sentences": 2, "images": 1},
        "testA": {"refs": 1, "sentences": 2, "images": 1},
        "testB": {"refs": 1, "sentences": 2, "images": 1},
    }
    assert report["sentences"][0] == {
        "split": "train",
        "empty": 1,
        "non_ascii": 1,
        "repeated": 1,
        "mean_words": 2.1,
        "words": [1, 0, 6, 3],
    }
    assert report["problems"] == {"empty_sentence": 1, "degenerate_segmentation": 2}
    assert report["messages"][0] == "empty_sentence: ref 7: sentence 72 is empty"
    assert report["published"] == report["warnings"] == []


def test_the_report_depends_on_the_data_alone(tmp_path: Path) -> None:
    texts = []
    for place, workers in ((tmp_path / "a", 1), (tmp_path / "b" / "c", 3)):
        small = small_dataset()
        small.ref(2)["ann_id"] = 999
        small.write(place)
        (place / IMAGES_2014 / small.images[2]["file_name"]).write_bytes(HTML)
        os.utime(place / "refcoco" / "instances.json", (1, workers))
        records, report = run(place, on_bad="skip", workers=workers)
        texts.append(json.dumps(report))
        write_records(place / "r.parquet", records, "refcoco_unc")
        assert read_records(place / "r.parquet") == records
    assert texts[0] == texts[1]
    assert str(tmp_path) not in texts[0]
    assert (tmp_path / "a" / "r.parquet").read_bytes() == (tmp_path / "b" / "c" / "r.parquet").read_bytes()


def test_bad_refs_are_one_error_or_left_out_aloud(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    small = small_dataset("shapes")
    small.ref(3)["ann_id"] = 902
    small.write(tmp_path)
    folder = tmp_path / IMAGES_2014
    (folder / small.images[0]["file_name"]).unlink()
    cut = folder / small.images[3]["file_name"]
    cut.write_bytes(cut.read_bytes()[:-100])
    with pytest.raises(DataError) as caught:
        run(tmp_path, "shapes")
    for text in (
        "shapes: 4 of 7 refs cannot be used: ",
        "COCO_train2014_000000000001.jpg is missing (needed by ref 1, 7)",
        "COCO_train2014_000000000004.jpg cannot be decoded (image file is truncated",
        "annotation 902 of image 2: part 1 of 1: degenerate polygon of 4 numbers",
        "ref 3: its annotation 902 belongs to image 2, the ref says image 3",
    ):
        assert text in str(caught.value)
    with caplog.at_level(logging.WARNING):
        records, report = run(tmp_path, "shapes", on_bad="skip")
    assert [ref.ref_id for record in records for ref in record.refs] == [2, 5, 6]
    assert report["refs"] == {"in_file": 7, "bad": 4, "excluded": 0, "kept": 3}
    assert report["problems"]["missing_image"] == report["problems"]["undecodable_image"] == 1
    assert report["warnings"] == ["4 of 7 refs cannot be used and were left out"]
    assert "shapes: 4 of 7 refs cannot be used and were left out" in caplog.text


def test_images_are_needed_only_when_checked(tmp_path: Path) -> None:
    root = small_dataset().write(tmp_path, image_folder=None)
    with pytest.raises(DataError, match="no image folder"):
        run(root)
    records, report = run(root, check_images=False)
    assert report["images"]["checked"] is False
    assert records[0].file_name == f"{IMAGES_2014}/COCO_train2014_000000000001.jpg"
    small_dataset().write(tmp_path, image_folder=IMAGES_2017)
    assert run(root)[0][0].file_name == f"{IMAGES_2017}/000000000001.jpg"


def test_only_the_first_messages_of_a_kind_are_kept_with_the_count(tmp_path: Path) -> None:
    small = small_dataset("shapes")
    small.annotations += [{**small.annotation(901), "id": 1000 + k} for k in range(30)]
    _, report = run(small.write(tmp_path), "shapes")
    assert report["problems"]["degenerate_segmentation"] == 32
    lines = [text for text in report["messages"] if text.startswith("degenerate_segmentation")]
    assert len(lines) == 21
    assert lines[-1] == "degenerate_segmentation: ... and 12 more"


def test_areas_and_boxes_that_do_not_follow_from_the_shape(tmp_path: Path) -> None:
    small = small_dataset("shapes")
    small.annotation(20)["area"] += 2
    small.annotation(30)["bbox"][2] += 0.02
    small.annotation(40)["bbox"][0] += 0.01  # a matter of rounding
    small.annotation(50)["area"] *= 1.0005  # within tolerance
    small.annotation(21)["area"] = 150.0  # run lengths, 200 pixels
    small.annotation(900)["bbox"] = [10.0, 0.0, 4.0, 80.0]
    _, report = run(small.write(tmp_path), "shapes")
    assert report["problems"]["area_mismatch"] == report["problems"]["bbox_mismatch"] == 2
    for text in (
        "area_mismatch: annotation 20 of image 2: area 902, its shape has 900",
        "area_mismatch: annotation 21 of image 2: area 150, its shape has 200",
        "bbox_mismatch: annotation 30 of image 3: bbox [8.0, 13.0, 30.02, 30.0], its shape has [8.0, 13.0, 30.0, 30.0]",
        "bbox_mismatch: annotation 900 of image 1: bbox [10.0, 0.0, 4.0, 80.0], its shape has [10.0, 0.0, 1.0, 80.0]",
    ):
        assert text in report["messages"]


def test_photos_that_are_displayed_turned_are_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = small_dataset("shapes").write(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 3
    name = f"{IMAGES_2014}/COCO_train2014_{2:012d}.jpg"
    Image.new("RGB", (100, 80)).save(root / name, exif=exif)
    _, report = run(root, "shapes")
    assert report["images"]["exif_turned"] == 1
    assert report["warnings"][0].startswith(
        f"1 photos have an EXIF orientation, which turns or mirrors them where they are displayed ({name})"
    )
    assert "every such mask lies on wrong pixels" in caplog.text
    assert "stray_polygon" not in report["problems"]


def test_strays_and_absent_boxes_are_not_held_against_an_annotation(tmp_path: Path) -> None:
    small = small_dataset("shapes")
    small.annotation(20)["segmentation"].append([90.0, 70.0, 91.0, 71.0])
    for key in ("bbox", "area"):
        del small.annotation(30)[key]
    _, report = run(small.write(tmp_path), "shapes")
    assert report["problems"] == {
        **run(small_dataset("shapes").write(tmp_path), "shapes")[1]["problems"],
        "stray_polygon": 1,
    }


def test_shared_annotations_and_sentence_ids_are_told(tmp_path: Path) -> None:
    small = small_dataset("shapes")
    small.ref(7)["ann_id"] = 10
    small.ref(2)["sentences"][0]["sent_id"] = small.ref(2)["sent_ids"][0] = 10
    records, report = run(small.write(tmp_path), "shapes")
    assert sum(len(record.refs) for record in records) == 7
    assert "shared_annotation: annotation 10 is that of refs [1, 7]" in report["messages"]
    assert "duplicate_id: sent_id 10 is used more than once, by refs [1, 2]" in report["messages"]


def test_published_counts_are_compared(tmp_path: Path) -> None:
    root = small_dataset().write(tmp_path)
    _, report = run(root)
    assert {"split": "testA", "what": "sentences", "found": 2, "published": 5657} in report["published"]
    assert "train: 4 refs, published are 42404" in report["warnings"]
    with pytest.raises(
        DataError, match=r"refcoco_unc differs from the published counts \(15 problems\):\n.*total: 7 refs"
    ):
        run(root, strict=True)


def test_counts_that_agree_make_no_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = {"val": {"refs": 1, "images": 1}, "total": {"sentences": 16}}
    monkeypatch.setattr("ris_core.data.refer.audit.facts", lambda: {"counts": {"refcoco_unc": counts}})
    records, report = run(small_dataset().write(tmp_path), strict=True)
    assert report["warnings"] == []
    assert [row["found"] for row in compare_with_published(DatasetName.parse("refcoco_unc"), records)] == [1, 1, 16]


def moved(small: SmallDataset, split_of: dict[int, str]) -> SmallDataset:
    for ref_id, split in split_of.items():
        small.ref(ref_id)["split"] = split
    return small


def test_training_images_that_are_scored_elsewhere_are_excluded(tmp_path: Path) -> None:
    mine = small_dataset("shapes").write(tmp_path / "mine")  # 3 val, 4 testA, 5 testB
    other = moved(small_dataset("shapes+"), {1: "val", 7: "val", 2: "testA", 3: "train"}).write(tmp_path / "other")
    records, report = run(mine, "shapes", exclude={"shapes+": other})
    assert [(ref.ref_id, ref.split) for record in records for ref in record.refs] == [
        (3, "val"),
        (4, "testA"),
        (5, "testB"),
        (6, "train"),
    ]
    assert report["refs"] == {"in_file": 7, "bad": 0, "excluded": 3, "kept": 4}
    assert report["splits"]["train"]["images"] == 1
    shared = {(row["first"], row["second"]): row["images"] for row in report["shared_images"]}
    assert shared["shapes+/testA", "shapes/train"] == 0
    assert shared["shapes+/train", "shapes/val"] == 1
    assert report["warnings"] == ["shapes+/train and shapes/val share 1 images"]
    with pytest.raises(DataError, match="there is no dataset 'shape'"):
        run(mine, "shapes", exclude={"shape": other})


def test_images_shared_by_splits_are_a_warning(tmp_path: Path) -> None:
    small = moved(small_dataset("refcoco_google"), {7: "test"})  # ref 1, on the same image, is in train
    _, report = run(small.write(tmp_path), "refcoco_google")
    assert "refcoco_google/train and refcoco_google/test share 1 images" in report["warnings"]


def test_leakage_counts_each_pair_once() -> None:
    assert image_leakage({"a": {1, 2, 3}, "b": {2, 3, 4}, "c": set()}) == [
        {"first": "a", "second": "b", "images": 2},
        {"first": "a", "second": "c", "images": 0},
        {"first": "b", "second": "c", "images": 0},
    ]


@pytest.mark.parametrize("name", ["refcocog_unc", "refcoco"])
def test_unknown_datasets_are_refused_before_anything_is_read(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=f"there is no dataset '{name}'"):
        run(tmp_path / "absent", name)
