"""Stage `preprocess` under Ray Data: the same bytes whoever writes them, bad images set aside, stopped runs gone on with."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from pipelines_world import DATASET, Workplace, contents

from pipelines import parts, paths, preprocess
from ris_core.data.dataset import ShardStore
from ris_core.data.shards import PreprocessParams, ShardOptions, expected_bytes, write_shard
from ris_core.errors import ConfigError, DataError
from ris_core.options import Plain

if TYPE_CHECKING:
    from tiny_world import Tiny

pytestmark = pytest.mark.ray
PER_SHARD = 4
SHARDS = 10  # of the 38 images


def build(tiny: Tiny, out: Path, raw: Path | None = None, **changes: Any) -> Plain:
    params = PreprocessParams(image_size=64, images_per_shard=PER_SHARD, **changes)
    return preprocess.build(tiny.records_file, raw or tiny.raw, out, DATASET, params)


@pytest.fixture(scope="module")
def undisturbed(tiny: Tiny, ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """All files that four workers write in one go."""
    out = tmp_path_factory.mktemp("undisturbed") / "shards"
    build(tiny, out)
    assert not list(out.parent.glob("*.partial-*"))
    return contents(out)


@pytest.fixture
def spoilt(tiny: Tiny, tmp_path: Path) -> tuple[Path, list[str]]:
    """Raw data in which one image is cut off and another is a web page; the names of the two."""
    raw = tmp_path / "raw"
    records = tiny.records()
    for record in records:
        (raw / record.file_name).parent.mkdir(parents=True, exist_ok=True)
        (raw / record.file_name).symlink_to(tiny.raw / record.file_name)
    bad = [records[5].file_name, records[30].file_name]
    for name, content in zip(bad, ((tiny.raw / bad[0]).read_bytes()[:-400], b"<html>404</html>"), strict=True):
        (raw / name).unlink()
        (raw / name).write_bytes(content)
    return raw, bad


def test_one_worker_writes_the_same_bytes_as_four(
    tiny: Tiny, undisturbed: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def one_after_another(tasks: Sequence[Plain], write: Callable[[parts.Row], parts.Row], **_: object) -> list[Plain]:
        return [json.loads(write({"task": json.dumps(task)})["done"]) for task in reversed(tasks)]

    monkeypatch.setattr(preprocess.parts, "run_tasks", one_after_another)
    build(tiny, tmp_path / "shards")
    assert contents(tmp_path / "shards") == undisturbed
    assert set(undisturbed) == {"manifest.json", *(f"part-{i:05d}.arrow" for i in range(SHARDS))}
    store = ShardStore(tmp_path / "shards")
    assert [store.row(i)["image_id"] for i in range(len(store))] == [record.image_id for record in tiny.records()]


def test_a_disk_without_room_is_told_before_anything_is_written(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(preprocess.parts, "run_tasks", lambda *_, **__: pytest.fail("work began"))
    monkeypatch.setattr(preprocess.room, "free", lambda _: 100_000)
    with pytest.raises(
        ConfigError, match=r"preprocess: that takes \d+\.\d kB in \S+, where 100\.0 kB are free: make room"
    ):
        build(tiny, tmp_path / "shards")
    assert "as much again in DVC's cache" in capsys.readouterr().err
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]


@pytest.mark.parametrize("storage", ["pixels", "jpeg"])
def test_what_shards_take_is_told_about_rightly(storage: str, tmp_path: Path) -> None:
    from benchmarks.samples import SENTENCES_OF_REFS, write_images

    options = ShardOptions(416, storage)
    entry = write_shard(tmp_path / "a.arrow", write_images(tmp_path, 4), tmp_path, options)
    told = expected_bytes(entry["images"], entry["images"] * len(SENTENCES_OF_REFS), options)
    assert told == pytest.approx((tmp_path / "a.arrow").stat().st_size, rel=0.25)


def test_a_bad_image_is_set_aside_and_named(
    tiny: Tiny,
    ray_session: None,
    spoilt: tuple[Path, list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    raw, bad = spoilt
    manifest = build(tiny, tmp_path / "shards", raw, max_bad_images=0.1)
    assert manifest["images"] == 36
    assert [entry["file_name"] for entry in manifest["quarantined"]] == bad
    assert json.loads((tmp_path / "shards" / "manifest.json").read_text()) == manifest
    assert str(tmp_path) not in json.dumps(manifest)  # or the bytes would differ from place to place
    shown = capsys.readouterr().err
    assert "shapes: images left out (2 problems):" in shown
    for name, entry in zip(bad, manifest["quarantined"], strict=True):
        assert f"  - {name}: {entry['reason']}\n" in shown
    records = tiny.records()
    whole = [record.image_id for record in records if record.file_name not in bad]
    store = ShardStore(tmp_path / "shards")
    assert [store.row(i)["image_id"] for i in range(len(store))] == whole


def test_too_many_bad_images_stop_the_stage_until_they_are_mended(
    tiny: Tiny,
    ray_session: None,
    undisturbed: dict[str, bytes],
    spoilt: tuple[Path, list[str]],
    tmp_path: Path,
) -> None:
    raw, bad = spoilt
    with pytest.raises(DataError) as told:
        build(tiny, tmp_path / "shards", raw, max_bad_images=0.05)  # 2 of 38 are more
    message = str(told.value)
    assert message.startswith("shapes: too many bad images (2 problems):")
    assert all(name in message for name in bad)
    assert message.endswith("or raise preprocess.max_bad_images (a share of all images).")
    assert not (tmp_path / "shards").exists()
    for name in bad:
        (raw / name).write_bytes((tiny.raw / name).read_bytes())
    build(tiny, tmp_path / "shards", raw, max_bad_images=0.0)
    assert contents(tmp_path / "shards") == undisturbed


def test_a_stopped_run_goes_on_with_what_was_finished(
    tiny: Tiny, ray_session: None, undisturbed: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "shards"

    def stopped(tasks: Sequence[Plain], write: Callable[[parts.Row], parts.Row], **_: object) -> list[Plain]:
        for task in tasks[:3]:
            write({"task": json.dumps(task)})
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(preprocess.parts, "run_tasks", stopped)
        with pytest.raises(KeyboardInterrupt):
            build(tiny, out)
    (work,) = tmp_path.glob("shards.partial-*")
    assert not out.exists()
    assert not (work / "manifest.json").exists()
    with pytest.raises(DataError, match="run the preprocess stage"):
        ShardStore(work)
    (work / "part-00003.arrow.tmp").write_bytes(undisturbed["part-00003.arrow"][:1000])  # in the midst of writing
    (work / "part-00004.arrow").write_bytes(undisturbed["part-00004.arrow"][:1000])  # power was lost
    (work / "part-00077.arrow").write_bytes(undisturbed["part-00001.arrow"])  # of other records, before
    finished = [(work / f"part-{i:05d}.arrow").stat().st_mtime_ns for i in range(3)]
    build(tiny, out)
    assert contents(out) == undisturbed
    assert [(out / f"part-{i:05d}.arrow").stat().st_mtime_ns for i in range(3)] == finished  # not written again
    assert list(tmp_path.iterdir()) == [out]


def test_other_options_do_not_take_over_what_was_finished(tiny: Tiny, ray_session: None, tmp_path: Path) -> None:
    out = tmp_path / "shards"
    first = build(tiny, out)
    second = build(tiny, out, storage="jpeg")
    assert second["storage"] == "jpeg"
    assert {entry["sha256"] for entry in first["shards"]}.isdisjoint(entry["sha256"] for entry in second["shards"])
    assert sum(map(len, contents(out).values())) < 38 * 64 * 64 * 3


def test_the_stage_reads_its_parameters(
    workplace: Workplace, ray_session: None, undisturbed: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    workplace.link("raw", "records")
    workplace.change(preprocess={"images_per_shard": PER_SHARD})
    preprocess.main(DATASET)
    assert capsys.readouterr().out == f"data/shards/shapes: 38 images in {SHARDS} shards\n"
    assert contents(paths.shards(DATASET)) == undisturbed
