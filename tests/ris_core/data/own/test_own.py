import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from ris_core.data import masks
from ris_core.data.own.description import Description, own_name, read_description
from ris_core.data.own.masks import read_mask
from ris_core.data.own.reader import read_own
from ris_core.data.own.splits import draw
from ris_core.data.records import ImageRecord
from ris_core.data.refer.audit import prepare
from ris_core.errors import ConfigError, DataError

HEIGHT, WIDTH = 40, 60
NAMES = ("a.jpg", "b.jpg", "c.jpg", "d.jpg")


def own(root: Path, rows: str, description: str = "annotations: instances.json\nval: 0.25\ntest: 0.25\n") -> Path:
    """Four photos, two annotated squares on each (10n and 10n + 1 on image n), and the expressions given."""
    (root / "images").mkdir(parents=True)
    for name in NAMES:
        Image.new("RGB", (WIDTH, HEIGHT), (200, 10, 10)).save(root / "images" / name)
    images = [{"id": n, "file_name": name, "height": HEIGHT, "width": WIDTH} for n, name in enumerate(NAMES, start=1)]
    annotations = [
        {"id": 10 * n + k, "image_id": n, "category_id": 0, "segmentation": [square(5 + 25 * k, 5, 20)]}
        for n in range(1, 5)
        for k in (0, 1)
    ]
    tables = {"images": images, "annotations": annotations, "categories": [{"id": 0, "name": "square"}]}
    (root / "instances.json").write_text(json.dumps(tables))
    (root / "expressions.csv").write_text(rows)
    (root / "dataset.yaml").write_text(description)
    return root


def square(x: int, y: int, side: int) -> list[int]:
    return [x, y, x + side, y, x + side, y + side, x, y + side]


def prepared(root: Path, on_bad: str = "error") -> tuple[list[ImageRecord], dict[str, Any]]:
    return prepare(
        root, own_name("mine"), on_bad=on_bad, strict=True, exclude={}, check_images=True, workers=2, read=read_own
    )


def said(records: list[ImageRecord]) -> dict[tuple[str, int], tuple[str, list[str]]]:
    """Split and texts, by image and annotation."""
    return {
        (record.file_name, ref.ann_id): (ref.split, [sentence.raw for sentence in ref.sentences])
        for record in records
        for ref in record.refs
    }


ROWS = """image,annotation,text,split
a.jpg,10,The left square,train
a.jpg,10,"left, and red",train
1,11,right one,train
b.jpg,20,left one,val
images/c.jpg,31,right one,test
"""


def test_a_table_beside_coco_annotations(tmp_path: Path) -> None:
    records, report = prepared(own(tmp_path, ROWS.replace("images/c.jpg", "c.jpg")))
    assert said(records) == {
        ("images/a.jpg", 10): ("train", ["The left square", "left, and red"]),
        ("images/a.jpg", 11): ("train", ["right one"]),
        ("images/b.jpg", 20): ("val", ["left one"]),
        ("images/c.jpg", 31): ("test", ["right one"]),
    }
    first = records[0]
    assert [ref.sentences[0].sent for ref in first.refs] == ["the left square", "right one"]
    assert [sentence.sent_id for record in records for ref in record.refs for sentence in ref.sentences] == [
        0,
        1,
        2,
        3,
        4,
    ]
    assert [instance.category for instance in first.instances] == ["square", "square"]
    assert first.instances[0].area == masks.area(first.instances[0].counts, HEIGHT, WIDTH) > 0
    assert report["splits"]["train"] == {"refs": 2, "sentences": 3, "images": 1}
    assert (report["problems"], report["warnings"], report["published"]) == ({}, [], [])
    assert [entry["path"] for entry in report["inputs"]] == ["dataset.yaml", "expressions.csv", "instances.json"]


TABLE = [
    {"image": "a.jpg", "annotation": 10, "text": ["left", "the left one"]},
    {"image": "b.jpg", "annotation": 20, "text": ["left"]},
    {"image": "c.jpg", "annotation": 30, "text": ["left"]},
    {"image": "d.jpg", "annotation": 40, "text": ["left"]},
]


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".parquet", ".csv"])
def test_every_kind_of_table_says_the_same(tmp_path: Path, ending: str) -> None:
    root = own(tmp_path, "", f"annotations: instances.json\nexpressions: table{ending}\nval: 0.25\ntest: 0.25\n")
    place = root / f"table{ending}"
    if ending == ".jsonl":
        place.write_text("\ufeff" + "\n".join(map(json.dumps, TABLE)) + "\n\n", encoding="utf-8")
    elif ending == ".json":
        place.write_text(json.dumps(TABLE))
    elif ending == ".parquet":
        pq.write_table(pa.Table.from_pylist(TABLE), place)
    else:
        lines = [f"{row['image']},{row['annotation']},{text}" for row in TABLE for text in row["text"]]  # type: ignore[attr-defined]
        place.write_text("\r\n".join(["image,annotation,text", *lines]))
    found = said(prepared(root)[0])
    assert {key: texts for key, (_, texts) in found.items()} == {
        (f"images/{row['image']}", row["annotation"]): row["text"] for row in TABLE
    }
    assert sorted(split for split, _ in found.values()) == ["test", "train", "train", "val"]


def test_numbers_and_outlines_as_tools_write_them(tmp_path: Path) -> None:
    """Ids of a column in which pandas missed one, a truth value for `iscrowd`, VIA's polygon without a list around it."""
    root = own(tmp_path, "image,annotation,text,split\na.jpg,10.0,left,train\nb.jpg,20,left,val\n")
    tables = json.loads((root / "instances.json").read_text())
    expected = said(prepared(root)[0])
    for annotation in tables["annotations"]:
        annotation |= {"iscrowd": False, "segmentation": annotation["segmentation"][0]}
    (root / "instances.json").write_text(json.dumps(tables))
    records, report = prepared(root)
    assert said(records) == expected
    assert list(expected) == [("images/a.jpg", 10), ("images/b.jpg", 20)]
    assert {instance.iscrowd for record in records for instance in record.instances} == {0}
    assert report["problems"] == {}


@pytest.mark.parametrize(
    ("table", "key", "value", "message"),
    [
        (
            "annotations",
            "id",
            "10",
            "8 entries .* cannot be read, the first: annotation at position 0: 'id' must be int",
        ),
        (
            "images",
            "width",
            60.0,
            "4 entries .* cannot be read, the first: image 1: 'width' must be int, found float 60",
        ),
    ],
)
def test_where_nothing_is_found_it_is_told_what_could_not_be_read(
    tmp_path: Path, table: str, key: str, value: object, message: str
) -> None:
    root = own(tmp_path, ROWS.replace("\n1,", "\na.jpg,"))
    tables = json.loads((root / "instances.json").read_text())
    for entry in tables[table]:
        entry[key] = value
    (root / "instances.json").write_text(json.dumps(tables))
    with pytest.raises(DataError, match=message):
        prepared(root)


@pytest.mark.parametrize("masks", [False, True])
def test_an_image_is_one_however_a_table_writes_it(tmp_path: Path, masks: bool) -> None:
    """By its id, its name, or a path to it: it is in one split, and with masks alone it has one id."""
    rle = {"size": [HEIGHT, WIDTH], "counts": [100, 50, HEIGHT * WIDTH - 150]}
    ways = [[name, f"./images/{name}", f"images/{name}", name if masks else str(n)] for n, name in enumerate(NAMES, 1)]
    rows = [
        {"image": way, "text": f"{n} {k}", **({"mask": rle} if masks else {"annotation": 10 * n + k % 2})}
        for n, each in enumerate(ways, start=1)
        for k, way in enumerate(each)
    ]
    shares = "val: 0.25\ntest: 0.25\n"
    root = own(tmp_path, "", f"{'' if masks else 'annotations: instances.json'}\nexpressions: said.jsonl\n{shares}")
    (root / "said.jsonl").write_text("\n".join(map(json.dumps, rows)))
    records, report = prepared(root)
    assert [record.file_name for record in records] == [f"images/{name}" for name in NAMES]
    assert {row["images"] for row in report["shared_images"]} == {0}
    by_name = own(tmp_path / "by name", "", (root / "dataset.yaml").read_text())
    first = [{**row, "image": NAMES[number // 4]} for number, row in enumerate(rows)]
    (by_name / "said.jsonl").write_text("\n".join(map(json.dumps, first)))
    splits = [{record.file_name: record.refs[0].split for record in each} for each in (records, prepared(by_name)[0])]
    assert splits[0] == splits[1]


def test_a_name_that_two_photos_have_is_told_with_both(tmp_path: Path) -> None:
    root = own(tmp_path, "", "expressions: said.jsonl\n")
    for folder in ("x", "y"):
        (root / "images" / folder).mkdir()
        Image.new("RGB", (WIDTH, HEIGHT)).save(root / "images" / folder / "e.jpg")
    row = {"image": "e.jpg", "mask": {"size": [HEIGHT, WIDTH], "counts": [2400]}, "text": "x", "split": "train"}
    (root / "said.jsonl").write_text(json.dumps(row))
    with pytest.raises(DataError, match=r"no such file \(it may be images/x/e\.jpg or images/y/e\.jpg"):
        prepared(root)


def test_a_row_may_mean_several_annotations_or_none(tmp_path: Path) -> None:
    root = own(tmp_path, "", "annotations: instances.json\nexpressions: said.jsonl\n")
    rows = [
        {"image": "a.jpg", "annotation": [10, 11], "text": "both", "split": "train"},
        {"image": "b.jpg", "annotation": [], "text": "the circle", "split": "val"},
        {"image": "c.jpg", "annotation": [30], "text": "left", "split": "test"},
    ]
    (root / "said.jsonl").write_text("\n".join(map(json.dumps, rows)))
    records, report = prepared(root)
    areas = [
        next(instance.area for instance in record.instances if instance.ann_id == ref.ann_id)
        for record in records
        for ref in record.refs
    ]
    assert areas == [800, 0, 400]
    assert (report["refs"]["no_target"], report["refs"]["several_targets"]) == (1, 1)


def test_the_draw_is_of_images_and_follows_names_and_seed_alone() -> None:
    names = [f"{number}.jpg" for number in range(100)]
    drawn = draw(names, 0.1, 0.2, seed=0)
    assert draw(reversed(names + names), 0.1, 0.2, seed=0) == drawn
    counts = {split: list(drawn.values()).count(split) for split in ("train", "val", "test")}
    assert counts == {"train": 70, "val": 10, "test": 20}
    assert draw(names, 0.1, 0.2, seed=1) != drawn
    more = draw([*names, "new.jpg"], 0.1, 0.2, seed=0)
    assert sum(more[name] != drawn[name] for name in names) <= 2
    assert set(draw(names, 0.0, 0.2, seed=0).values()) == {"train", "test"}
    assert set(draw(names[:3], 0.01, 0.01, seed=0).values()) == {"train", "val", "test"}


def test_masks_in_place_of_annotations(tmp_path: Path) -> None:
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[5:20, 10:30] = 1
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    for name in NAMES[:3]:
        Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "images" / name)
    Image.fromarray(mask * 255).save(tmp_path / "masks" / "grey.png")
    palette = Image.fromarray(mask).convert("P")
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.save(tmp_path / "masks" / "palette.png")
    rgba = np.dstack([mask * 9, mask, mask, np.full_like(mask, 255)])
    Image.fromarray(rgba).save(tmp_path / "masks" / "rgba.png")
    rle = coco_mask.encode(np.asfortranarray(mask))
    run_lengths = {"size": rle["size"], "counts": rle["counts"].decode()}
    rows = [
        {"image": "a.jpg", "mask": "masks/grey.png", "text": "one", "split": "train"},
        {"image": "a.jpg", "mask": "masks/grey.png", "text": "the one", "split": "train"},
        {"image": "a.jpg", "mask": "masks/palette.png", "text": "two", "split": "train"},
        {"image": "b.jpg", "mask": "masks/rgba.png", "text": "three", "split": "val"},
        {"image": "images/c.jpg", "mask": run_lengths, "text": "four", "split": "test"},
        {"image": "images/c.jpg", "mask": json.dumps(run_lengths), "text": "five", "split": "test"},
    ]
    (tmp_path / "dataset.yaml").write_text("expressions: said.jsonl\n")
    (tmp_path / "said.jsonl").write_text("\n".join(map(json.dumps, rows)))
    records, report = prepared(tmp_path)
    assert [len(ref.sentences) for record in records for ref in record.refs] == [2, 1, 1, 1, 1]
    for record in records:
        for instance in record.instances:
            assert np.array_equal(masks.decode(instance.counts, HEIGHT, WIDTH), mask)
            assert (instance.bbox, instance.area, instance.category) == ((10, 5, 20, 15), 300, "object")
    assert report["problems"] == {}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("a.jpg,10,,train", "line 2: no 'text'"),
        ("a.jpg,ten,left,train", "'annotation' must be the id of a COCO annotation, or a list of ids, found 'ten'"),
        ("a.jpg,10,left,dev", "split 'dev' is not one of train, val, test"),
        ("z.jpg,10,left,train", "image 'z.jpg', annotation [10]: instances.json has no such image"),
        (f"{'9' * 5000},10,left,train", "instances.json has no such image"),
        ("a.jpg,99,left,train", "there is no annotation 99"),
        ("b.jpg,10,left,train", "its annotation 10 belongs to image 1, the ref says image 2"),
        (
            "a.jpg,11,left,val\na.jpg,11,other,train",
            "line 3: split 'train', an earlier row about the same object has 'val'",
        ),
    ],
)
def test_what_is_wrong_with_a_row_is_told_and_may_be_skipped(tmp_path: Path, row: str, message: str) -> None:
    good = "d.jpg,40,left one,train\n"
    root = own(tmp_path, f"image,annotation,text,split\n{row}\n{good}")
    with pytest.raises(DataError) as caught:
        prepared(root)
    assert message in str(caught.value)
    records, report = prepared(root, on_bad="skip")
    assert ("images/d.jpg", 40) in said(records)
    assert report["refs"]["bad"] == 1


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("image,annotation,text\n", "expressions.csv has no expressions"),
        ("image,annotation,text\na.jpg,10\n", "line 2: it has not as many cells as the header"),
        ("image,annotation,text\na.jpg,10,left, and red\n", "put texts with commas in quotes"),
        ("image,annotation,text\na.jpg,x,left\n", "has no row that can be used: expressions.csv line 2: 'annotation'"),
        ("image,annotation,text,split\na.jpg,10,l,train\nb.jpg,20,l,\n", "1 of 2 objects have no `split`"),
        ("picture,annotation,text\na.jpg,10,left\n", "no 'image'; its columns are 'picture', 'annotation', 'text'$"),
        ("image;annotation;text\na.jpg;10;left\n", r"'image;annotation;text' \(they are told apart by commas\)$"),
    ],
)
def test_tables_that_cannot_be_used_as_a_whole(tmp_path: Path, rows: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        prepared(own(tmp_path, rows), on_bad="skip")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.jsonl", b'{"image": 1}\n{"image\n[', r"2 lines are no JSON: line 2: .*line 3: "),
        ("t.json", b'{"image": 1}', "holds no list of objects but dict"),
        ("t.parquet", b"PAR1 and so on", "is not a whole Parquet file"),
        ("t.csv", "image,text\nä,ö".encode("latin-1"), "is not UTF-8 text at line 2"),
        ("t.xlsx", b"text", r"read from \.csv, \.jsonl, \.json, \.parquet, not from '\.xlsx'"),
        ("t.csv", b"<html>", "is an HTML or XML page"),
    ],
)
def test_files_that_are_something_else(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    root = own(tmp_path, "", f"annotations: instances.json\nexpressions: {name}\n")
    (root / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        prepared(root)


def test_masks_that_cannot_be_used_are_told_with_their_row(tmp_path: Path) -> None:
    root = own(tmp_path, "", "expressions: said.jsonl\n")
    Image.new("L", (WIDTH, HEIGHT), 255).save(root / "mask.jpg")
    Image.new("L", (WIDTH, HEIGHT), 255).save(root / "mask.tif")
    Image.new("L", (WIDTH // 2, HEIGHT), 255).save(root / "small.png")
    Image.new("L", (WIDTH, HEIGHT), 0).save(root / "empty.png")
    Image.new("L", (WIDTH, HEIGHT), 255).save(root.parent / "beside.png")
    wrong: Mapping[Any, str] = {
        "mask.jpg": "is JPEG, which changes masks: save it as PNG",
        "mask.tif": "is TIFF: save it as PNG",
        "none.png": "No such file",
        "../beside.png": "lies outside the dataset",
        "small.png": "run lengths are of size",
        "empty.png": "its mask has no pixel",
        "{": "is no JSON of run lengths",
    }
    rows = [{"image": "a.jpg", "mask": mask, "text": "x", "split": "train"} for mask in wrong]
    rows += [{"image": "a.jpg", "mask": 7, "text": "x", "split": "train"}]
    rows += [{"image": "../out.jpg", "mask": {"size": [1, 1], "counts": "1"}, "text": "x", "split": "train"}]
    rows += [{"image": "lost.jpg", "mask": {"size": [1, 1], "counts": "1"}, "text": "x", "split": "train"}]
    (root / "said.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError) as caught:
        prepared(root)
    lost = [f"image '{name}': there is no such file" for name in ("lost.jpg", "../out.jpg")]
    for message in (*wrong.values(), "a mask is the path of a PNG", *lost):
        assert message in str(caught.value)
    with pytest.raises(DataError):
        read_mask(None, root)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("expresions: a.csv\n", "unknown parameter; did you mean 'expressions'"),
        ("val: 1.5\ntest: -1\n", "val: 1.5 is not below 1; test: -1.0 is below the minimum 0"),
        ("val: 0.5\ntest: 0.5\n", "nothing is left to train on"),
        ("a: [", "is not valid YAML"),
    ],
)
def test_a_description_is_checked_whole(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "dataset.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_description(tmp_path)


def test_names(tmp_path: Path) -> None:
    (tmp_path / "dataset.yaml").write_text("{}\n")
    assert read_description(tmp_path) == Description()
    assert own_name("my_photos").splits == ("train", "val", "test")
    for name in ("a b", "-x", "../x", "", "x" * 41, "a@b"):
        with pytest.raises(DataError, match="cannot name a dataset"):
            own_name(name)
    with pytest.raises(DataError, match="'shapes' is a published dataset"):
        own_name("shapes")
