"""Stage `propose`: the same proposals whoever makes them, for the evaluated splits, and none where nobody wants any."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from pipelines_world import DATASET, Workplace, contents, open_workplace

from pipelines import cluster, parts, paths, propose
from ris_core.data.images import load_image
from ris_core.data.proposal_store import ProposalStore
from ris_core.errors import ConfigError, DataError
from ris_core.models.proposals import felzenszwalb
from ris_core.options import Plain

if TYPE_CHECKING:
    from tiny_world import Tiny

OUT = paths.proposals(DATASET)
SPLITS = ["testA", "testB", "val"]
PER_PART = 4


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(propose, "IMAGES_PER_PART", PER_PART)


@pytest.fixture
def ready(workplace: Workplace) -> Workplace:
    workplace.link("raw", "shards")
    workplace.change(systems=["cris", "global_local"])
    return workplace


Write = Callable[[parts.Row], parts.Row]


def in_this_process(wanted: Sequence[Plain], write: Write, use_gpu: str = "no", **_: object) -> list[Plain]:
    return [json.loads(write({"task": json.dumps(task)})["done"]) for task in wanted]


def last_first(wanted: Sequence[Plain], write: Write, use_gpu: str = "no", **_: object) -> list[Plain]:
    return in_this_process(wanted[::-1], write)


@pytest.fixture(scope="module")
def undisturbed(
    tiny: Tiny, untrained: Path, ray_session: None, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    """All files that Ray's workers write in one go."""
    place = open_workplace(tmp_path_factory.mktemp("proposals") / "workplace", tiny, untrained)
    place.link("raw", "shards")
    place.change(systems=["global_local"])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place.root)
        patch.setattr(propose, "IMAGES_PER_PART", PER_PART)
        propose.main(DATASET)
    assert not list(place.root.rglob("*.partial-*"))
    return contents(place.root / OUT)


@pytest.mark.ray
def test_proposals_are_made_of_all_splits_but_train(
    undisturbed: dict[str, bytes], ready: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(propose.parts, "run_tasks", in_this_process)
    propose.main(DATASET)
    store, shards = ProposalStore(OUT), ready.tiny.store()
    images = sorted({int(image) for split in SPLITS for image in shards.images_of(split)})
    assert sorted(store.manifest["splits"]) == SPLITS
    options = ready.tiny.params().proposals.felzenszwalb
    total = 0
    for image in images:
        row = shards.row(image)
        expected = felzenszwalb(load_image(ready.tiny.raw / row["file_name"]), options)
        assert np.array_equal(store.masks(row["image_id"]), expected)
        total += len(expected)
    assert total > 2 * len(images), "there is something to choose from"
    assert (store.manifest["images"], store.manifest["proposals"]) == (len(images), total)
    (trained, *_) = set(shards.images_of("train").tolist()) - set(images)
    with pytest.raises(DataError, match="they were made for"):
        store.masks(shards.row(trained)["image_id"])
    assert set(undisturbed) == {"manifest.json", *(f"part-{i:05d}.parquet" for i in range(-(-len(images) // PER_PART)))}


def test_the_stage_tells_how_many_there_are(
    ready: Workplace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(propose.parts, "run_tasks", in_this_process)
    ready.change(proposals={"splits": ["testA", "val"]})
    propose.main(DATASET)
    store, shards = ProposalStore(OUT), ready.tiny.store()
    told = json.loads(paths.proposal_scores(DATASET).read_text())
    assert list(told) == ["generator", "testA", "val"]
    assert told["generator"] == "felzenszwalb"
    for split in ("testA", "val"):
        counts = [len(store.masks(shards.row(int(i))["image_id"])) for i in shards.images_of(split)]
        assert told[split] == {
            "images": len(counts),
            "proposals_per_image": round(sum(counts) / len(counts), 2),
            "images_without": counts.count(0),
            "images_capped": 0,
        }
    made, images = store.manifest["proposals"], store.manifest["images"]
    assert capsys.readouterr().out == f"data/proposals/shapes: {made} proposals of {images} images\n"
    assert ready.files() == {
        *(f"{OUT}/{name}" for name in ("manifest.json", *store.manifest["parts"])),
        "results/proposals/shapes.json",
    }


def test_where_there_were_more_than_are_kept_it_is_told(
    ready: Workplace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(propose.parts, "run_tasks", in_this_process)
    ready.change(proposals={"splits": ["val"], "felzenszwalb": {"max_count": 3}})
    propose.main(DATASET)
    told = json.loads(paths.proposal_scores(DATASET).read_text())["val"]
    assert 0 < told["images_capped"] <= told["images"]
    warned = f"{told['images_capped']} of {told['images']} images of val have as many proposals as"
    assert f"WARNING: {warned} proposals.felzenszwalb.max_count allows (3)" in capsys.readouterr().err


@pytest.mark.ray
@pytest.mark.parametrize("order", [in_this_process, last_first])
def test_the_bytes_do_not_depend_on_who_writes_them_or_when(
    order: Callable[..., list[Plain]], undisturbed: dict[str, bytes], ready: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(propose.parts, "run_tasks", order)
    propose.main(DATASET)
    assert contents(OUT) == undisturbed
    propose.main(DATASET)
    assert contents(OUT) == undisturbed  # a second run makes the same
    assert [path.name for path in OUT.parent.iterdir()] == [DATASET]


@pytest.mark.ray
def test_a_stopped_run_goes_on_with_what_was_finished(
    undisturbed: dict[str, bytes], ready: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(wanted: Sequence[Plain], write: Write, use_gpu: str, **_: object) -> list[Plain]:
        in_this_process(wanted[:2], write)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(propose.parts, "run_tasks", stopped)
        with pytest.raises(KeyboardInterrupt):
            propose.main(DATASET)
    assert not OUT.exists()
    (work,) = OUT.parent.iterdir()
    with pytest.raises(DataError, match="run the propose stage"):
        ProposalStore(work)
    (work / "part-00002.parquet.4711.tmp").write_bytes(undisturbed["part-00002.parquet"][:100])  # killed while writing
    finished = {path.name: path.stat().st_mtime_ns for path in work.glob("*.parquet")}
    assert len(finished) == 2
    propose.main(DATASET)
    assert {name: (OUT / name).stat().st_mtime_ns for name in finished} == finished  # not written again
    assert contents(OUT) == undisturbed
    assert list(OUT.parent.iterdir()) == [OUT]


def test_other_options_do_not_take_over_what_was_finished(ready: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(wanted: Sequence[Plain], write: Write, use_gpu: str, **_: object) -> list[Plain]:
        in_this_process(wanted[:1], write)
        raise KeyboardInterrupt

    changes = [{}, {"felzenszwalb": {"sigma": 0.9}}, {"splits": ["val"]}]
    monkeypatch.setattr(propose.parts, "run_tasks", stopped)
    for change in changes:
        ready.change(proposals=change)
        with pytest.raises(KeyboardInterrupt):
            propose.main(DATASET)
    manifest = ready.own(paths.shards(DATASET)) / "manifest.json"
    manifest.write_text(manifest.read_text() + "\n")  # other shards
    with pytest.raises(KeyboardInterrupt):
        propose.main(DATASET)
    assert len(list(OUT.parent.iterdir())) == 4


def test_without_a_zero_shot_system_none_are_made_and_it_says_so(
    ready: Workplace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cluster, "connected", lambda **_: pytest.fail("Ray was asked for"))
    ready.change(systems=["cris", "lts"], proposals={"generator": "sam"})
    propose.main(DATASET)
    shown = capsys.readouterr()
    assert shown.out == "data/proposals/shapes: 0 proposals of 0 images\n"
    assert shown.err == "none of cris, lts chooses among proposals: none are made\n"
    store = ProposalStore(OUT)
    assert (store.manifest["splits"], store.manifest["parts"]) == ([], [])
    with pytest.raises(DataError, match="for no split: no system among `systems` chose among proposals"):
        store.masks(1)
    assert ready.files() == {f"{OUT}/manifest.json", "results/proposals/shapes.json"}


@pytest.mark.parametrize("split", ["test", "valid"])
def test_an_unknown_split_is_named_with_the_known_ones(split: str, ready: Workplace) -> None:
    ready.change(proposals={"splits": ["val", split]})
    with pytest.raises(DataError, match=f"shapes has no split '{split}'; it has testA, testB, train, val"):
        propose.main(DATASET)
    assert ready.files() == set()


def test_sam_without_weights_says_what_to_set(ready: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "connected", lambda **_: pytest.fail("Ray was asked for"))
    ready.change(proposals={"generator": "sam"})
    with pytest.raises(ConfigError, match=r"proposals\.generator is sam: set proposals\.sam_weights to a folder"):
        propose.main(DATASET)
    assert not OUT.exists()
    assert not paths.proposal_scores(DATASET).exists()
