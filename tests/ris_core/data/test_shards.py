"""A shard's bytes depend on its content alone, bad images are named and left out, and only whole files count."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from tiny_world import DATASET, IMAGE_SIZE, Tiny

from ris_core import files
from ris_core.data import masks
from ris_core.data.dataset import ShardStore
from ris_core.data.images import BadImage, load_image
from ris_core.data.letterbox import letterbox_image
from ris_core.data.records import ImageRecord
from ris_core.data.shards import ShardOptions, write_manifest, write_shard
from ris_core.errors import DataError

OPTIONS = ShardOptions(IMAGE_SIZE)


@pytest.fixture
def records(tiny: Tiny) -> list[ImageRecord]:
    return tiny.records()[20:26]  # four of train, two of val


@pytest.fixture
def raw(tiny: Tiny, records: list[ImageRecord], tmp_path: Path) -> Path:
    """The images of `records` in a root of this test's own, to be spoilt."""
    for record in records:
        target = tmp_path / "raw" / record.file_name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(tiny.raw / record.file_name, target)
    return tmp_path / "raw"


def rows_of(path: Path) -> list[dict]:
    with pa.memory_map(str(path)) as source:
        return pa.ipc.open_file(source).read_all().to_pylist()


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def store_of(folder: Path, entries: list[dict], options: ShardOptions = OPTIONS) -> ShardStore:
    write_manifest(folder, DATASET, options, entries)
    return ShardStore(folder)


def test_rows_hold_what_the_records_say(records: list[ImageRecord], raw: Path, tmp_path: Path) -> None:
    path = tmp_path / "part-00000.arrow"
    entry = write_shard(path, records, raw, OPTIONS)
    assert entry["sha256"] == sha256(path)
    rows = rows_of(path)
    assert [row["image_id"] for row in rows] == [record.image_id for record in records]
    for row, record in zip(rows, records, strict=True):
        pixels = np.frombuffer(row["image"], np.uint8).reshape(IMAGE_SIZE, IMAGE_SIZE, 3)
        assert (pixels == letterbox_image(load_image(raw / record.file_name), IMAGE_SIZE)).all()
        assert (row["height"], row["width"], row["file_name"]) == (record.height, record.width, record.file_name)
        assert [item["ann_id"] for item in row["instances"]] == [item.ann_id for item in record.instances]
        assert [item["category"] for item in row["instances"]] == [item.category for item in record.instances]
        for ref, original in zip(row["refs"], record.refs, strict=True):
            assert (ref["ref_id"], ref["ann_id"], ref["split"]) == (original.ref_id, original.ann_id, original.split)
            for said, sentence in zip(ref["sentences"], original.sentences, strict=True):
                assert said == {"sent_id": sentence.sent_id, "sent": sentence.sent, "raw": sentence.raw}


def test_masks_are_exact(tiny: Tiny) -> None:
    store = tiny.store()
    index = {store.row(i)["image_id"]: i for i in range(len(store))}
    for record in tiny.records():
        for item in record.instances:
            found = store.mask(index[record.image_id], item.ann_id)
            assert found.shape == (record.height, record.width)
            assert (found == masks.decode(item.counts, record.height, record.width)).all()


def test_bytes_do_not_depend_on_order_process_or_place(records: list[ImageRecord], raw: Path, tmp_path: Path) -> None:
    parts = {f"part-{i}.arrow": records[2 * i : 2 * i + 2] for i in range(3)}
    places = [tmp_path / name for name in ("a", "b", "c")]
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(raw, elsewhere)
    for place in places:
        place.mkdir()
    here = [write_shard(places[0] / name, part, raw, OPTIONS) for name, part in parts.items()]
    backwards = [write_shard(places[1] / name, part, elsewhere, OPTIONS) for name, part in reversed(parts.items())]
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        jobs = [pool.submit(write_shard, places[2] / name, part, raw, OPTIONS) for name, part in parts.items()]
        foreign = [job.result() for job in jobs]
    assert here == backwards[::-1] == foreign
    for place, entries in zip(places, (here, backwards, foreign), strict=True):
        write_manifest(place, DATASET, OPTIONS, entries)
    contents = [{file.name: file.read_bytes() for file in place.iterdir()} for place in places]
    assert sorted(contents[0]) == ["manifest.json", *parts]
    assert contents[0] == contents[1] == contents[2]


def spoil(raw: Path, records: list[ImageRecord]) -> dict[str, str]:
    """Spoil five of the six images in five ways; returns the reasons expected, by file name."""
    cut, text, sized, gone, empty = (raw / record.file_name for record in records[:5])
    cut.write_bytes(cut.read_bytes()[:-600])
    text.write_text("<html>404 Not Found</html>")
    Image.new("RGB", (33, 44)).save(sized)
    gone.unlink()
    empty.write_bytes(b"")
    wanted = f"{records[2].width}x{records[2].height}"
    return {
        records[0].file_name: "image file is truncated",
        records[1].file_name: "it is none of the image formats read here (JPEG, PNG, ",
        records[2].file_name: f"the image is 33x44, its annotations are for {wanted}",
        records[3].file_name: "No such file or directory",
        records[4].file_name: "it is none of the image formats read here (JPEG, PNG, ",
    }


def test_bad_images_are_quarantined_with_their_reasons(records: list[ImageRecord], raw: Path, tmp_path: Path) -> None:
    expected = spoil(raw, records)
    entry = write_shard(tmp_path / "x.arrow", records, raw, OPTIONS)
    assert [row["image_id"] for row in rows_of(tmp_path / "x.arrow")] == [records[5].image_id]
    assert entry["images"] == 1
    assert [bad["file_name"] for bad in entry["quarantined"]] == list(expected)
    for bad in entry["quarantined"]:
        assert bad["reason"].startswith(expected[bad["file_name"]])
    manifest = write_manifest(tmp_path, DATASET, OPTIONS, [entry])
    assert manifest["quarantined"] == entry["quarantined"]
    assert manifest["images"] == 1


def test_bytes_hold_no_place_and_no_address(records: list[ImageRecord], raw: Path, tmp_path: Path) -> None:
    spoil(raw, records)
    first = write_shard(tmp_path / "x.arrow", records, raw, OPTIONS)
    content = (tmp_path / "x.arrow").read_bytes()
    assert str(tmp_path).encode() not in content
    assert b" object at 0x" not in content
    moved = tmp_path / "moved"
    raw.rename(moved)
    (tmp_path / "sub").mkdir()
    assert write_shard(tmp_path / "sub/x.arrow", records, moved, OPTIONS) == first
    assert (tmp_path / "sub/x.arrow").read_bytes() == content


def test_a_mended_image_comes_back(records: list[ImageRecord], raw: Path, tmp_path: Path) -> None:
    file = raw / records[1].file_name
    good = file.read_bytes()
    file.write_bytes(bytes(len(good)))  # of the same size, so that only the quarantine tells that it is worth a new try
    assert write_shard(tmp_path / "x.arrow", records, raw, OPTIONS)["images"] == 5
    file.write_bytes(good)
    entry = write_shard(tmp_path / "x.arrow", records, raw, OPTIONS)
    assert (entry["images"], entry["quarantined"]) == (6, [])


def test_a_shard_of_bad_images_alone_can_be_read(records: list[ImageRecord], raw: Path, tmp_path: Path) -> None:
    (raw / records[0].file_name).unlink()
    entries = [
        write_shard(tmp_path / "part-0.arrow", records[:1], raw, OPTIONS),
        write_shard(tmp_path / "part-1.arrow", records[1:], raw, OPTIONS),
    ]
    store = store_of(tmp_path, entries)
    assert len(store) == 5
    assert store.row(0)["image_id"] == records[1].image_id
    assert len(store.ref_image) == sum(len(record.refs) for record in records[1:])


def test_a_finished_shard_is_kept(records: list[ImageRecord], raw: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.arrow"
    entry = write_shard(path, records, raw, OPTIONS)
    os.utime(path, ns=(10**18, 10**18))
    assert write_shard(path, records, raw, OPTIONS) == entry
    assert path.stat().st_mtime_ns == 10**18


@pytest.mark.parametrize("change", ["options", "records", "image"])
def test_a_shard_of_other_content_is_written_again(
    change: str, records: list[ImageRecord], raw: Path, tmp_path: Path
) -> None:
    path = tmp_path / "x.arrow"
    before = write_shard(path, records, raw, OPTIONS)
    os.utime(path, ns=(10**18, 10**18))
    options = ShardOptions(IMAGE_SIZE, resample="exact") if change == "options" else OPTIONS
    if change == "image":
        file = raw / records[0].file_name
        Image.open(file).save(file, quality=40)
    after = write_shard(path, records[:-1] if change == "records" else records, raw, options)
    assert path.stat().st_mtime_ns != 10**18
    assert after["sha256"] == sha256(path) != before["sha256"]


def test_a_half_written_file_never_counts(
    records: list[ImageRecord], raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = write_shard(tmp_path / "whole.arrow", records, raw, OPTIONS)
    path = tmp_path / "x.arrow"

    def stopped(source: Path, target: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(files.os, "replace", stopped)
        with pytest.raises(KeyboardInterrupt):
            write_shard(path, records, raw, OPTIONS)
    assert sorted(tmp_path.glob("*.arrow")) == [tmp_path / "whole.arrow"]
    elsewhere = tmp_path / ".x.partial-0-00000000.arrow"  # of another process, which may still be writing
    elsewhere.write_bytes(b"half")
    entry = write_shard(path, records, raw, OPTIONS)
    assert sorted(tmp_path.glob("*.arrow")) == sorted([elsewhere, tmp_path / "whole.arrow", path])
    assert elsewhere.read_bytes() == b"half"
    assert {**entry, "sha256": sha256(path)} == entry
    assert rows_of(path) == rows_of(tmp_path / "whole.arrow")
    assert entry["images"] == whole["images"]


def test_a_file_that_lost_its_end_is_written_again(records: list[ImageRecord], raw: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.arrow"
    entry = write_shard(path, records, raw, OPTIONS)
    for length in (0, 5000):
        path.write_bytes(path.read_bytes()[:length])
        assert write_shard(path, records, raw, OPTIONS) == entry
        assert sha256(path) == entry["sha256"]


def test_jpeg_storage_is_smaller_and_nearly_the_same(records: list[ImageRecord], raw: Path, tmp_path: Path) -> None:
    stores = {}
    for storage in ("pixels", "jpeg"):
        folder = tmp_path / storage
        folder.mkdir()
        options = ShardOptions(IMAGE_SIZE, storage=storage)
        stores[storage] = store_of(folder, [write_shard(folder / "x.arrow", records, raw, options)], options)
    for i in range(len(records)):
        exact, lossy = stores["pixels"].pixels(i), stores["jpeg"].pixels(i)
        assert exact.shape == lossy.shape == (IMAGE_SIZE, IMAGE_SIZE, 3)
        assert exact.dtype == lossy.dtype == np.uint8
        difference = np.abs(exact.astype(int) - lossy)
        assert 0 < difference.mean() < 8
    sizes = {storage: (tmp_path / storage / "x.arrow").stat().st_size for storage in stores}
    assert sizes["jpeg"] < sizes["pixels"] / 2
    assert stores["pixels"].row(0) == stores["jpeg"].row(0)


def test_the_manifest_counts(tiny: Tiny) -> None:
    manifest = json.loads((tiny.shards / "manifest.json").read_text())
    records = tiny.records()
    assert manifest["images"] == len(records) == sum(entry["images"] for entry in manifest["shards"])
    assert (manifest["dataset"], manifest["image_size"], manifest["storage"]) == (DATASET, IMAGE_SIZE, "pixels")
    assert list(manifest["splits"]) == ["testA", "testB", "train", "val"]
    for split, counts in manifest["splits"].items():
        refs = [(record.image_id, ref) for record in records for ref in record.refs if ref.split == split]
        assert counts == {
            "images": len({image_id for image_id, _ in refs}),
            "refs": len(refs),
            "sentences": sum(len(ref.sentences) for _, ref in refs),
        }
    for entry in manifest["shards"]:
        assert entry["sha256"] == sha256(tiny.shards / entry["file"])


def test_load_image_always_gives_rgb_and_names_a_bad_file(tmp_path: Path) -> None:
    Image.new("L", (5, 4), 7).save(tmp_path / "grey.jpg")
    assert load_image(tmp_path / "grey.jpg").shape == (4, 5, 3)
    Image.new("RGB", (5, 4)).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:40])
    with pytest.raises(BadImage, match=r"cut\.png cannot be used: ") as caught:
        load_image(tmp_path / "cut.png")
    assert isinstance(caught.value, DataError)
    assert str(tmp_path) not in caught.value.reason
