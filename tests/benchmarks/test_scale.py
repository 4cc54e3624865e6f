"""Data is repeated under new ids about the same photos; what grows beyond its allowance is told."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from benchmarks import memory, scale
from pipelines import parts
from ris_core.data.records import ImageRecord, read_records
from ris_core.options import Plain

if TYPE_CHECKING:
    from tiny_world import Tiny

MIB = 2**20
METRICS = {metric.name for metric in scale.METRICS}
WATCHED = {"preprocess_worker", "preprocess_driver", "preprocess_store", "train", "evaluate"}


def ids_of(record: ImageRecord) -> dict[str, list[int]]:
    sentences = [sentence.sent_id for ref in record.refs for sentence in ref.sentences]
    return {
        "image": [record.image_id],
        "instance": [instance.ann_id for instance in record.instances],
        "ref": [ref.ref_id for ref in record.refs],
        "sentence": sentences,
    }


def test_copies_of_records_differ_in_their_ids_alone(tiny: Tiny, tmp_path: Path) -> None:
    scale.repeat_records(tiny.records_file, 3, tmp_path / "three.parquet")
    originals, repeated = tiny.records(), read_records(tmp_path / "three.parquet")
    assert repeated[: len(originals)] == originals
    assert [record.file_name for record in repeated] == 3 * [record.file_name for record in originals]
    for kind in ("image", "instance", "ref", "sentence"):
        once, all_of_them = ([n for record in some for n in ids_of(record)[kind]] for some in (originals, repeated))
        assert len(set(once)) == len(once)
        assert len(set(all_of_them)) == 3 * len(once)
    for record in repeated:
        assert {ref.ann_id for ref in record.refs} <= {instance.ann_id for instance in record.instances}
        assert [len(ids) for ids in ids_of(record).values()] in [
            [len(ids) for ids in ids_of(each).values()] for each in originals if each.file_name == record.file_name
        ]


def test_memory_of_a_process_and_of_its_children_is_seen() -> None:
    before = memory.status(os.getpid()).anonymous
    held = np.ones(1024 * MIB, np.uint8)  # more than what the process may have free from before
    assert memory.status(os.getpid()).anonymous - before > 0.5 * held.nbytes
    del held
    with memory.watched() as seen:
        scale.alone(hold, 64 * MIB)
    assert seen.driver > 64 * MIB
    assert (seen.worker, seen.store) == (0, 0)


def hold(size: int) -> None:
    """Keep so much memory for some looks."""
    held = np.ones(size, np.uint8)
    time.sleep(5 * memory.PERIOD)
    del held


def figures(**changes: float) -> scale.Figures:
    return {**dict.fromkeys([*scale.PEAKS, "refs", "shards", "expressions"], 100.0), **changes}


def test_what_grows_beyond_its_allowance_is_told() -> None:
    refs, slack = 1e6, scale.SLACK / MIB
    allowed = slack + scale.PEAKS["train"]["refs"] * refs / MIB
    for grown, flat in ((allowed - 1, True), (allowed + 1, False)):
        problems = scale.not_flat({1: figures(), 10: figures(refs=100 + refs, train=100 + grown)})
        assert bool(problems) != flat
    assert problems == [f"train at 10 x: {allowed + 1:.0f} MiB more than at 1 x, allowed {allowed:.0f}"]
    for name in scale.PEAKS:
        assert len(scale.not_flat({1: figures(), 7: figures(), 10: figures(**{name: 101 + slack})})) == 1
    assert not scale.PEAKS["preprocess_worker"], "a worker reads its own records, however many there are"


def test_the_road_after_the_shards(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training and evaluation on shards that the stage writes, here without a Ray; the report has all of it."""

    def one_after_another(tasks: Sequence[Plain], write: Callable[[parts.Row], parts.Row], **_: object) -> list[Plain]:
        return [json.loads(write({"task": json.dumps(task)})["done"]) for task in tasks]

    monkeypatch.setattr(parts, "run_tasks", one_after_another)
    monkeypatch.setattr(scale.cluster, "connected", lambda **_: nullcontext())
    base = tmp_path / "base"
    base.mkdir()
    (base / scale.RAW).symlink_to(tiny.raw)
    (base / scale.RECORDS).symlink_to(tiny.records_file)
    scale.make_model(base)
    found = {}
    for times in (1, 2):
        place = tmp_path / str(times)
        place.mkdir()
        scale.repeat_records(base / scale.RECORDS, times, place / scale.RECORDS)
        found[times] = scale.preprocess(base, place, workers=1)
        found[times] |= scale.train(place, steps=2) | scale.evaluate(base, place)
        assert METRICS - set(found[times]) == {*WATCHED, "preprocess_ms"}
        assert found[times]["images"] == 38 * times
        found[times] |= dict.fromkeys([*WATCHED, "preprocess_ms"], 1.0)
    report = scale.Report("scale", {})
    scale.report_all(report, found)
    assert len(report.rows) == 2 * len(METRICS)
    assert found[1]["index"] == 3, "bytes a referent, of 38 images"
    assert not scale.not_flat(found)


def test_rows_of_photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale, "PHOTOS", 8)
    monkeypatch.setattr(scale, "SIZES", (96,))
    found = scale.photo_rows(tmp_path / "photos")
    assert set(found) == {(96, "pixels"), (96, "jpeg")}
    for (size, storage), (row, milliseconds) in found.items():
        image = 3 * size * size
        assert image < row < image + 20_000 if storage == "pixels" else row < image
        assert milliseconds > 0
