"""A checkpoint comes back as it was, on a disk and in a bucket alike; a damaged one is found, told, and passed over."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from safetensors.torch import save as safetensors_bytes
from torch import nn

from ris_core.errors import ClusterError, WeightsError
from ris_core.storage import Storage
from ris_core.training import checkpoint as checkpoints
from ris_core.training.checkpoint import KEPT, Checkpoint, Checkpoints, Position, changing, completed

FILES = ["average.safetensors", "best.safetensors", "last.safetensors", "optimizer.pt", "state.json"]


@pytest.fixture(params=["folder", "bucket"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """An empty one of each kind."""
    if request.param == "folder":
        return Storage(tmp_path / "run")
    return Storage(request.getfixturevalue("new_bucket")())


@pytest.fixture
def local(tmp_path: Path) -> Storage:
    return Storage(tmp_path / "run")


def example(step: int = 5, value: float = 1.0) -> Checkpoint:
    """Weights in an odd memory layout, and a real optimiser's state."""
    weight = nn.Parameter(torch.full((2, 3, 2, 2), value).to(memory_format=torch.channels_last))
    optimizer = torch.optim.AdamW([{"name": "head", "params": [weight], "initial_lr": 0.1}], lr=0.1)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    kept = checkpoints.cpu_copy({"weight": weight, "count": torch.tensor(7)})
    history = [{"epoch": 1, "train/loss": 0.1 + 0.2, "val/mIoU": 1 / 3}]
    points = [{"step": 20, "train/loss": 0.1, "lr": 1e-3}, {"step": 40, "train/loss": 2.0}]
    return Checkpoint(
        Position(epoch=1, step=step, loss_sum=1 / 3, best_score=1 / 3, best_epoch=1, history=history, points=points),
        kept,
        {"optimizer": optimizer.state_dict(), "scaler": {}, "averaged": 5},
        average={**kept, "weight": kept["weight"] * 2},
        best={**kept, "weight": kept["weight"] * 3},
    )


def same(first: dict[str, torch.Tensor] | None, second: dict[str, torch.Tensor] | None) -> bool:
    if first is None or second is None:
        return first is second
    assert first.keys() == second.keys() != set()
    return all(torch.equal(value, second[name]) for name, value in first.items())


def assert_same(found: Checkpoint | None, saved: Checkpoint) -> None:
    assert found is not None
    assert found.position == saved.position
    assert same(found.model, saved.model)
    assert same(found.average, saved.average)
    assert same(found.best, saved.best)
    state, original = found.optimizer["optimizer"], saved.optimizer["optimizer"]
    assert state["param_groups"] == original["param_groups"]
    assert all(torch.equal(state["state"][0][name], original["state"][0][name]) for name in original["state"][0])
    assert found.optimizer["averaged"] == saved.optimizer["averaged"]


def saved(storage: Storage, *steps: int) -> Checkpoints:
    """Who has just written these, the weights of each with its step as value."""
    found = Checkpoints(storage)
    for step in steps:
        found.save(example(step, float(step)))
    return found


def rewrite(storage: Storage, name: str, content: bytes) -> None:
    """Put another file in a checkpoint as if it had been written so: with its checksum, and the state sealed again."""
    checkpoint, _, file = name.partition("/")
    storage.write(name, content)
    reseal(storage, checkpoint, lambda state: state["files"].update({file: [file, digest(content)]}))


def reseal(storage: Storage, checkpoint: str, change: Callable[[dict[str, Any]], object]) -> None:
    """Change what state.json holds, with a checksum that fits."""
    state = json.loads(storage.read(f"{checkpoint}/state.json"))
    del state["sha256"]
    change(state)
    sealed = {**state, "sha256": digest(json.dumps(state, sort_keys=True).encode())}
    storage.write(f"{checkpoint}/state.json", json.dumps(sealed).encode())


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


# There and back


def test_round_trip_is_exact(storage: Storage) -> None:
    before = example()
    Checkpoints(storage).save(before)
    assert_same(Checkpoints(storage).load(), before)
    assert Checkpoints(storage).position() == before.position


def test_before_the_first_validation_there_is_no_best(storage: Storage) -> None:
    first = example()
    first.position, first.average, first.best = Position(epoch=0, step=3), None, None
    Checkpoints(storage).save(first)
    found = Checkpoints(storage).load()
    assert_same(found, first)
    assert found is not None
    assert found.position.best_score == -math.inf
    assert storage.names() == [f"00000-0000003/{name}" for name in FILES[2:]]


def test_the_files_are_standard_ones(local: Storage) -> None:
    saved(local, 5)
    assert local.folder is not None
    folder = local.folder / "00001-0000005"
    assert sorted(path.name for path in folder.iterdir()) == FILES
    assert set(load_file(folder / "last.safetensors")) == {"weight", "count"}
    assert "optimizer" in torch.load(folder / "optimizer.pt", weights_only=True)
    state = json.loads((folder / "state.json").read_text())
    assert (state["format"], state["epoch"], state["step"]) == (2, 1, 5)
    assert state["files"] == {name: [name, digest((folder / name).read_bytes())] for name in FILES[:-1]}


@pytest.mark.parametrize("twin", ["average", "model"])
def test_the_same_weights_are_stored_once(twin: str, storage: Storage) -> None:
    """After an epoch with the best score so far, the average, or without one the weights, are the best."""
    before = example()
    before.best = dict(getattr(before, twin))
    Checkpoints(storage).save(before)
    assert storage.names() == [f"00001-0000005/{name}" for name in FILES if name != "best.safetensors"]
    assert_same(Checkpoints(storage).load(), before)
    stored = "00001-0000005/last.safetensors" if twin == "model" else "00001-0000005/average.safetensors"
    storage.write(stored, storage.read(stored)[:-1])
    with pytest.raises(WeightsError, match="is damaged"):
        Checkpoints(storage).read("00001-0000005")


def test_nothing_saved_yet(storage: Storage, capsys: pytest.CaptureFixture[str]) -> None:
    found = Checkpoints(storage)
    assert (found.names(), found.load(), found.position()) == ([], None, None)
    assert capsys.readouterr().err == "", "that is nothing to warn of"


# What is kept


def test_the_newest_are_kept_by_their_place_in_training(storage: Storage) -> None:
    writer = Checkpoints(storage)
    left = []
    for epoch, step in ((0, 900), (0, 10_000), (9, 999_999), (10, 0), (10, 5)):
        checkpoint = example()
        checkpoint.position.epoch, checkpoint.position.step = epoch, step
        writer.save(checkpoint)
        left.append(writer.names())
        assert storage.folders() == left[-1]
    assert KEPT == 2
    assert left == [
        ["00000-0000900"],
        ["00000-0000900", "00000-0010000"],
        ["00000-0010000", "00009-0999999"],
        ["00009-0999999", "00010-0000000"],
        ["00010-0000000", "00010-0000005"],
    ]
    found = Checkpoints(storage).load()
    assert found is not None
    assert (found.position.epoch, found.position.step) == (10, 5)


def test_saved_again_it_is_the_newer_one(storage: Storage) -> None:
    saved(storage, 3, 5)
    Checkpoints(storage).save(example(5, 50.0))
    assert Checkpoints(storage).names() == ["00001-0000003", "00001-0000005"]
    assert_same(Checkpoints(storage).load(), example(5, 50.0))


def test_what_else_lies_there_is_left_alone(storage: Storage) -> None:
    for name in ("notes.txt", "model/state.json", "2024-11/state.json", "00001-0000001-mine/state.json"):
        storage.write(name, b"mine")
    saved(storage, 1, 2, 3)
    assert Checkpoints(storage).names() == ["00001-0000002", "00001-0000003"]
    assert_same(Checkpoints(storage).load(), example(3, 3.0))
    found = [name for name in storage.names() if storage.read(name) == b"mine"]
    assert found == ["00001-0000001-mine/state.json", "2024-11/state.json", "model/state.json", "notes.txt"]


# Interrupted


class Stopped(Exception):
    """The process ends here."""


def break_writing(monkeypatch: pytest.MonkeyPatch, after: int, error: Exception) -> None:
    """Let only so many more files be written."""
    write, left = Storage.write, after

    def limited(self: Storage, name: str, content: bytes) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise error
        write(self, name, content)

    monkeypatch.setattr(Storage, "write", limited)


def test_a_save_that_is_stopped_loses_nothing(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """After any of its files, and time after time."""
    saved(storage, 1)
    for after in range(len(FILES)):
        with monkeypatch.context() as patched:
            break_writing(patched, after, Stopped())
            with pytest.raises(Stopped):
                Checkpoints(storage).save(example(2 + after))
        assert Checkpoints(storage).names() == ["00001-0000001"]
        assert Checkpoints(storage).position() == example(1).position
        assert_same(Checkpoints(storage).load(), example(1, 1.0))
    saved(storage, 9)
    assert storage.names() == [f"00001-000000{step}/{name}" for step in (1, 9) for name in FILES]
    assert_same(Checkpoints(storage).load(), example(9, 9.0))


@pytest.mark.parametrize("left", ["last.safetensors", ".last.partial-1-aaaa.safetensors", None])
@pytest.mark.parametrize("step", [2, 4])
def test_the_next_save_cleans_up_after_a_killed_one(step: int, left: str | None, local: Storage) -> None:
    """Also a file that has no name yet, or nothing but the folder; also of a checkpoint that is written again."""
    saved(local, 1)
    assert local.folder is not None
    half = local.folder / f"00001-000000{step}"
    half.mkdir()
    if left is not None:
        (half / left).write_bytes(b"half")
    assert_same(Checkpoints(local).load(), example(1, 1.0))
    saved(local, 4)
    assert local.folders() == ["00001-0000001", "00001-0000004"]
    assert sorted(path.name for path in (local.folder / "00001-0000004").iterdir()) == FILES
    assert_same(Checkpoints(local).load(), example(4, 4.0))


@pytest.mark.parametrize("older", [0, 1, 2])
def test_a_save_that_fails_keeps_the_older_ones_and_no_half(
    older: int, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = saved(storage, *range(1, 1 + older))
    goes_on = f"the next start goes on from 00001-000000{older}" if older else "the next start begins afresh"
    for after in range(len(FILES)):
        with monkeypatch.context() as patched:
            break_writing(patched, after, ClusterError("best.safetensors could not be written: make room"))
            with pytest.raises(ClusterError) as caught:
                writer.save(example(9))
        assert str(caught.value) == (
            f"no checkpoint could be written: best.safetensors could not be written: make room; {goes_on}"
        )
        assert storage.folders() == ([f"00001-000000{older}"] if older else [])
    if older:
        assert_same(Checkpoints(storage).load(), example(older, float(older)))
    writer.save(example(9, 9.0))
    assert_same(Checkpoints(storage).load(), example(9, 9.0))


def test_a_storage_that_is_gone_does_not_hide_what_happened_first(
    local: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = saved(local, 1)

    def gone(*_: object) -> None:
        raise ClusterError("it cannot be removed either")

    break_writing(monkeypatch, 1, ClusterError("the cable is out"))
    monkeypatch.setattr(Storage, "delete_folder", gone)
    with pytest.raises(ClusterError) as caught:
        writer.save(example(2))
    assert str(caught.value) == (
        "no checkpoint could be written: the cable is out; the next start goes on from the newest one that is whole"
    )
    assert_same(Checkpoints(local).load(), example(1, 1.0))


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    with pytest.raises(
        ClusterError, match=r"^no checkpoint could be written: .* at .*/run \(.+\): .*, then start again"
    ):
        Checkpoints(Storage(tmp_path / "run")).save(example())


# Beside the training


def test_training_goes_on_while_a_checkpoint_is_written(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    write, may_write = Storage.write, threading.Event()

    def slow(self: Storage, name: str, content: bytes) -> None:
        assert may_write.wait(30)
        write(self, name, content)

    monkeypatch.setattr(Storage, "write", slow)
    writer = Checkpoints(storage)
    writer.save_beside(example(1, 1.0))  # comes back, though nothing can be written yet
    assert Checkpoints(storage).names() == []
    threading.Timer(0.2, may_write.set).start()
    writer.save_beside(example(2, 2.0))
    assert may_write.is_set(), "it waited"
    assert "00001-0000001" in Checkpoints(storage).names()
    writer.wait()
    writer.wait()
    assert Checkpoints(storage).names() == ["00001-0000001", "00001-0000002"]
    assert_same(Checkpoints(storage).load(), example(2, 2.0))


def test_a_failure_is_told_at_the_next_call(local: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = saved(local, 1)
    problem = "no checkpoint could be written: the disk is full; the next start goes on from 00001-0000001"
    with monkeypatch.context() as patched:
        break_writing(patched, 0, ClusterError("the disk is full"))
        writer.save_beside(example(2))
        with pytest.raises(ClusterError, match=problem):
            writer.save_beside(example(3))
        writer.wait()  # it is told once, and the other was not begun
        writer.save_beside(example(3))
        with pytest.raises(ClusterError, match=problem):
            writer.wait()
    writer.save_beside(example(4, 4.0))
    writer.wait()
    assert_same(Checkpoints(local).load(), example(4, 4.0))


# Damaged


def altered(content: bytes) -> bytes:
    """One bit of one byte in the middle is another."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
    "altered": altered,
    "cut": lambda content: content[:-1],
    "halved": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "longer": lambda content: content + b"\n",
    "deleted": lambda content: None,
}


def damage(storage: Storage, name: str, how: str) -> None:
    content = DAMAGES[how](storage.read(name))
    if content is None:
        storage.delete(name)
    else:
        storage.write(name, content)


@pytest.mark.parametrize("how", ["altered", "cut", "deleted"])
def test_of_a_damaged_one_the_one_before_is_taken(
    how: str, storage: Storage, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whichever of its files it is."""
    saved(storage, 1, 2)
    for file in FILES:
        content = storage.read(f"00001-0000002/{file}")
        damage(storage, f"00001-0000002/{file}", how)
        assert_same(Checkpoints(storage).load(), example(1, 1.0))
        said = capsys.readouterr().err
        if (file, how) == ("state.json", "deleted"):
            assert said == "", "it was never finished"
        else:
            problem = rf"warning: the checkpoint {re.escape(storage.place)}/00001-0000002 is (damaged|not whole) \(.+\)"
            assert re.fullmatch(rf"{problem}; going on from 00001-0000001\n", said)
            assert file in said
        storage.write(f"00001-0000002/{file}", content)
    assert_same(Checkpoints(storage).load(), example(2, 2.0))


def test_a_damaged_one_does_not_count_as_one_to_fall_back_on(storage: Storage) -> None:
    saved(storage, 1, 2)
    damage(storage, "00001-0000002/last.safetensors", "altered")
    found = Checkpoints(storage)
    found.load()
    found.save(example(3, 3.0))
    assert found.names() == storage.folders() == ["00001-0000001", "00001-0000003"]


@pytest.mark.parametrize("file", FILES[:-1])
@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_file_is_named(how: str, file: str, local: Storage) -> None:
    found = saved(local, 5)
    damage(local, f"00001-0000005/{file}", how)
    what = "is missing" if how == "deleted" else "is not as it was written: other bytes, or cut"
    with pytest.raises(
        WeightsError, match=rf"^the checkpoint {local.place}/00001-0000005 is damaged \({file} {what}\)$"
    ):
        found.read("00001-0000005")
    assert found.position() == example().position, "where it stands is still known"


def test_a_file_that_is_gone_from_a_bucket_is_named(new_bucket: Callable[[], str]) -> None:
    storage = Storage(new_bucket())
    found = saved(storage, 5)
    storage.delete("00001-0000005/best.safetensors")
    with pytest.raises(WeightsError, match=r"00001-0000005 is not whole \(.*best\.safetensors"):
        found.read("00001-0000005")


def test_when_all_are_damaged_training_begins_afresh_loudly(
    storage: Storage, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(storage, 1, 2)
    damage(storage, "00001-0000001/optimizer.pt", "altered")
    damage(storage, "00001-0000002/last.safetensors", "deleted")
    found = Checkpoints(storage)
    assert found.load() is None
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("; ")[-1] for line in lines] == [
        "going on from 00001-0000001",
        "no whole one is left: starting afresh",
    ]
    assert all(line.startswith("warning: the checkpoint ") for line in lines)
    found.save(example(1, 7.0))
    assert storage.folders() == found.names() == ["00001-0000001"]
    assert_same(Checkpoints(storage).load(), example(1, 7.0))


def test_one_process_speaks(local: Storage, capsys: pytest.CaptureFixture[str]) -> None:
    saved(local, 1, 2)
    damage(local, "00001-0000002/last.safetensors", "cut")
    assert_same(Checkpoints(local).load(tell=False), example(1, 1.0))
    assert capsys.readouterr().err == ""


def test_a_damaged_one_is_written_again_in_its_place(storage: Storage) -> None:
    saved(storage, 1, 2)
    damage(storage, "00001-0000002/last.safetensors", "altered")
    found = Checkpoints(storage)
    assert_same(found.load(), example(1, 1.0))
    found.save(example(2, 2.0))
    assert found.names() == ["00001-0000001", "00001-0000002"]
    assert_same(Checkpoints(storage).load(), example(2, 2.0))


def test_an_altered_state_is_found(storage: Storage) -> None:
    found = saved(storage, 1, 5)
    content = storage.read("00001-0000005/state.json")
    changes = {
        b'"step": 5': b'"step": 4',
        b'"epoch": 1': b'"epoch": 2',
        b'"best_epoch": 1': b'"best_epoch": 0',
        b'"step": 20': b'"step": 21',
        b'"format": 2': b'"format": 3',
        b'"files"': b'"filet"',
        b'"sha256": "': b'"sha256": "0',
        b'"sha256"': b'"sha255"',
    }
    for before, after in changes.items():
        assert before in content
        storage.write("00001-0000005/state.json", content.replace(before, after, 1))
        with pytest.raises(
            WeightsError, match=r"is damaged \(state\.json: (it is not as it was written|another format)"
        ):
            found.read("00001-0000005")
        assert found.position() == example(1).position
    assert_same(found.load(), example(1, 1.0))


def test_spaces_in_a_state_do_not_matter(local: Storage) -> None:
    """Who has looked at it in an editor that laid it out anew has not damaged it."""
    saved(local, 5)
    content = json.loads(local.read("00001-0000005/state.json"))
    local.write("00001-0000005/state.json", json.dumps(content, sort_keys=True).encode())
    assert_same(Checkpoints(local).load(), example(5, 5.0))


OTHERS: dict[str, tuple[bytes, str]] = {
    "zeros": (bytes(500), "no JSON at all"),
    "text": (b"access denied", "no JSON at all"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "a Git LFS pointer"),
    "pickle": (b"\x80\x02}q\x00.", "no JSON at all"),
    "list": (b"[]", "it holds a list"),
    "null": (b"null", "it holds a NoneType"),
    "number": (b"3", "it holds a int"),
    "nothing": (b"{}", "another format than 2"),
    "old": (b'{"format": 1, "epoch": 1}', "another format than 2"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_another_file_in_place_of_the_state_is_told_as_what_it_is(other: str, local: Storage) -> None:
    found = saved(local, 5)
    content, what = OTHERS[other]
    local.write("00001-0000005/state.json", content)
    with pytest.raises(WeightsError, match=rf"00001-0000005 is damaged \(state\.json.*{what}.*\)$"):
        found.read("00001-0000005")
    assert found.position() is None


@pytest.mark.parametrize("file", FILES)
def test_a_folder_in_place_of_a_file(file: str, local: Storage, capsys: pytest.CaptureFixture[str]) -> None:
    found = saved(local, 1, 5)
    assert local.folder is not None
    place = local.folder / "00001-0000005" / file
    place.unlink()
    place.mkdir()
    if file != "state.json":  # else it was never finished
        with pytest.raises(WeightsError, match=rf"is damaged \({file} is a folder\)$"):
            found.read("00001-0000005")
    assert_same(found.load(), example(1, 1.0))
    found.save(example(5, 5.0))
    assert_same(Checkpoints(local).load(), example(5, 5.0))


def test_a_bucket_that_does_not_answer_is_no_damage(local: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is passed over, and nothing written over, that might be whole."""
    saved(local, 1, 2)

    def away(*_: object) -> None:
        raise ClusterError("it could not be read")

    with monkeypatch.context() as patched:
        patched.setattr(Storage, "local", away)
        for look in (Checkpoints(local).load, Checkpoints(local).position):
            with pytest.raises(ClusterError, match="it could not be read"):
                look()
    assert_same(Checkpoints(local).load(), example(2, 2.0))


# Written whole, but wrong


@pytest.mark.parametrize("kind", ["model", "average", "best"])
def test_weights_that_are_not_finite_are_refused(kind: str, local: Storage) -> None:
    found = saved(local, 1)
    wrong = example(5)
    setattr(wrong, kind, {"weight": torch.tensor([1.0, math.nan])})
    found.save(wrong)
    file = "last" if kind == "model" else kind
    problem = "weight is not finite in 1 of 2 values"
    with pytest.raises(WeightsError, match=rf"damaged \({file}\.safetensors holds weights .*: {problem}\)$"):
        found.read("00001-0000005")
    assert_same(found.load(), example(1, 1.0))


@pytest.mark.parametrize("wrong", ["no best", "an early best"])
def test_the_best_weights_are_there_once_there_were_some(wrong: str, local: Storage) -> None:
    checkpoint = example()
    if wrong == "no best":
        checkpoint.best = None
    else:
        checkpoint.position = Position(epoch=0, step=5)
    Checkpoints(local).save(checkpoint)
    with pytest.raises(WeightsError, match=r"damaged \(state\.json: files do not go with the position\)$"):
        Checkpoints(local).read(checkpoint.position.name)


ROW = {"epoch": 1, "val/mIoU": 0.5}
ROWS = "history, points: expected lists of rows, each of names and numbers"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"epoch": "first"}, "epoch: Value 'first'"),
        ({"epoch": None}, "epoch: field 'epoch' is not Optional"),
        ({"epoch": -1, "step": 1.5}, "epoch: -1 is below the minimum 0; step: Value '1.5'|step: .*; epoch: -1"),
        ({"step": True}, "step: Value 'True'"),
        ({"loss_sum": [1]}, "loss_sum: Value"),
        ({"loss_sum": 10**400}, "loss_sum: int too large"),
        ({"best_score": {}}, "best_score: "),
        ({"best_score": "${oc.env:HOME}"}, "is not used here"),
        ({"best_epoch": 2}, "best_epoch is 2, but history has 1 epochs"),
        ({"best_epoch": -2}, "best_epoch: -2 is below the minimum -1"),
        ({"history": None}, ROWS),
        ({"history": {}}, ROWS),
        ({"history": [1]}, ROWS),
        ({"history": [{"epoch": "1"}]}, ROWS),
        ({"history": [{"epoch": None}]}, ROWS),
        ({"history": [ROW, {"epoch": 2}]}, "history: epochs have different names"),
        ({"points": None}, ROWS),
        ({"points": [{"step": "20"}]}, ROWS),
        ({"points": ["20"]}, ROWS),
        ({"foo": 2}, "foo: unknown parameter"),
        ({"files": None}, "files missing, or not a name and a checksum each"),
        ({"files": {"optimizer.pt": "optimizer.pt"}}, "files missing, or not a name and a checksum each"),
        ({"files": {"optimizer.pt": ["optimizer.pt", 1]}}, "files missing, or not a name and a checksum each"),
        ({"files": {}}, r"files: last\.safetensors, optimizer\.pt missing"),
    ],
)
def test_a_wrong_state_is_told(change: dict[str, object], problem: str, local: Storage) -> None:
    found = saved(local, 5)
    reseal(local, "00001-0000005", lambda state: state.update(change))
    with pytest.raises(WeightsError, match=rf"00001-0000005 is damaged \(state\.json: .*({problem}).*\)$"):
        found.read("00001-0000005")
    assert found.position() is None


def test_a_state_that_lacks_something(local: Storage) -> None:
    found = saved(local, 5)
    state = local.read("00001-0000005/state.json")
    for name in set(json.loads(state)) - {"format", "sha256"}:
        reseal(local, "00001-0000005", lambda state, name=name: state.pop(name))  # type: ignore[misc]
        with pytest.raises(WeightsError, match=rf"is damaged \(state\.json: {name} missing(, or not .*)?\)$"):
            found.read("00001-0000005")
        local.write("00001-0000005/state.json", state)


STATES: dict[str, object] = {"state": {}, "param_groups": []}


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ([], "holds a list"),
        (None, "holds a NoneType"),
        (torch.ones(2), "holds a Tensor"),
        ({}, "lacks optimizer, scaler"),
        ({"optimizer": STATES}, "lacks scaler"),
        ({"optimizer": [], "scaler": {}}, "lacks optimizer"),
        ({"optimizer": STATES, "scaler": None}, "lacks scaler"),
        ({"optimizer": {"state": {}}, "scaler": {}}, "lacks param_groups of the optimizer"),
        ({"optimizer": {"state": [], "param_groups": {}}, "scaler": {}}, "lacks state of .*, param_groups of the"),
    ],
)
def test_an_optimizer_file_that_lacks_what_the_loop_needs(content: object, problem: str, local: Storage) -> None:
    checkpoint = example()
    checkpoint.optimizer = content  # type: ignore[assignment]
    Checkpoints(local).save(checkpoint)
    with pytest.raises(WeightsError, match=rf"is damaged \(optimizer\.pt {problem}.*\)$"):
        Checkpoints(local).read("00001-0000005")


@pytest.mark.parametrize("file", FILES[:-1])
def test_files_of_another_kind_are_told_as_what_they_are(file: str, local: Storage) -> None:
    """Though their checksums fit."""
    found = saved(local, 5)
    rewrite(local, f"00001-0000005/{file}", b"access denied")
    with pytest.raises(WeightsError, match=rf"\({file} is text, not weights: it begins 'access denied'\)$"):
        found.read("00001-0000005")


@pytest.mark.parametrize("sealed", [True, False])
def test_code_in_the_optimizer_file_is_not_run(sealed: bool, local: Storage, tmp_path: Path) -> None:
    found = saved(local, 5)
    trap = tmp_path / "trap"

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str, str]]:
            return open, (str(trap), "w")

    torch.save({"optimizer": Evil()}, tmp_path / "evil.pt")
    (rewrite if sealed else Storage.write)(local, "00001-0000005/optimizer.pt", (tmp_path / "evil.pt").read_bytes())
    with pytest.raises(WeightsError, match=r"is damaged \(optimizer\.pt (needs more than|is not as it was)"):
        found.read("00001-0000005")
    assert not trap.exists()


# Giving the states back


class Run:
    """What a training loop holds beside its model, after `steps` steps of a small one."""

    def __init__(self, steps: int, width: int = 3, optimizer: type[torch.optim.Adam] = torch.optim.AdamW) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(width, 2)
        groups = [{"name": "head", "params": list(self.model.parameters()), "initial_lr": 0.1}]
        self.optimizer = optimizer(groups, lr=0.1)
        self.scaler = torch.amp.GradScaler("cpu", enabled=False)
        for _ in range(steps):
            self.step()

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.model(torch.ones(1, self.model.in_features)).sum().backward()
        self.optimizer.step()

    def checkpoint(self) -> Checkpoint:
        states = {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}
        return Checkpoint(Position(), dict(self.model.state_dict()), states)

    def restored(self, checkpoint: Checkpoint) -> None:
        self.model.load_state_dict(checkpoint.model)
        checkpoint.restore(self.optimizer, self.scaler)
        self.step()


def test_restored_states_go_on_as_if_nothing_had_happened(storage: Storage) -> None:
    first, second = Run(steps=3), Run(steps=0)
    Checkpoints(storage).save(first.checkpoint())
    found = Checkpoints(storage).load()
    assert found is not None
    second.restored(found)
    first.step()
    assert torch.equal(first.model.weight, second.model.weight)
    untouched = Run(steps=0)
    untouched.restored(Run(steps=0).checkpoint())  # no moments yet


def spoiled(*path: object, value: object = None) -> Checkpoint:
    """A checkpoint with one thing in its optimizer.pt changed, or taken away."""
    checkpoint = copy.deepcopy(Run(steps=2).checkpoint())
    inner: Any = checkpoint.optimizer
    for key in path[:-1]:
        inner = inner[key]
    if value is None:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return checkpoint


@pytest.mark.parametrize(
    "checkpoint",
    [
        spoiled("optimizer", "param_groups", value=[]),
        spoiled("optimizer", "param_groups", value=[1]),
        spoiled("optimizer", "param_groups", 0, "params"),
        spoiled("optimizer", "param_groups", 0, "params", value=[0]),
        spoiled("optimizer", "param_groups", 0, "betas"),
        spoiled("optimizer", "param_groups", 0, "betas", value=("0.9", 1)),
        spoiled("optimizer", "param_groups", 0, "name"),
        spoiled("optimizer", "param_groups", 0, "amsgrad", value=True),
        spoiled("optimizer", "state", 0, value=[]),
        spoiled("optimizer", "state", 0, value={"a": 1}),
        spoiled("optimizer", "state", 0, "exp_avg"),
        spoiled("optimizer", "state", 0, "exp_avg", value="text"),
        spoiled("optimizer", "state", 0, "exp_avg", value=torch.ones(7)),
        spoiled("optimizer", "state", 0, "step"),
        spoiled("optimizer", "state", 1, "step", value=torch.ones(2)),
        Run(steps=1, width=4).checkpoint(),
        Run(steps=1, optimizer=torch.optim.Adam).checkpoint(),
    ],
)
def test_states_of_another_run_are_refused(checkpoint: Checkpoint) -> None:
    run = Run(steps=0)
    problem = (
        r"^optimizer\.pt in the checkpoint of this run does not fit its model and options \(.+\); delete the checkpoint"
    )
    with pytest.raises(WeightsError, match=problem):
        checkpoint.restore(run.optimizer, run.scaler)


# Copies, and which weights are in them


def test_a_copy_is_safe_from_later_steps() -> None:
    weight = torch.zeros(2, requires_grad=True)
    state = {"groups": [{"params": [0], "betas": (0.9, 0.999)}], "moments": {0: weight.detach()}, "steps": 3}
    copied, whole = checkpoints.cpu_copy({"weight": weight}), checkpoints.plain_copy(state)
    with torch.no_grad():
        weight += 1
    state["groups"][0]["params"].append(1)  # type: ignore[index]
    assert copied["weight"].tolist() == [0, 0]
    assert not copied["weight"].requires_grad
    assert whole["moments"][0].tolist() == [0, 0]
    assert (whole["groups"], whole["steps"]) == ([{"params": [0], "betas": (0.9, 0.999)}], 3)


def test_copies_are_laid_out_as_safetensors_wants_them() -> None:
    weight = torch.rand(2, 3, 2, 2).to(memory_format=torch.channels_last)
    copied = checkpoints.cpu_copy({"weight": weight, "tied": weight})
    assert safetensors_bytes(copied)
    assert torch.equal(copied["weight"], weight)


def test_frozen_weights_are_left_out_and_come_from_the_model() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))
    model[0].weight.requires_grad = False
    model[2].weight = model[0].weight  # tied: a second name of what is frozen
    changed = changing(model)
    assert list(changed) == [
        "0.bias",
        *(f"1.{name}" for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")),
        "2.bias",
    ]
    assert changed["0.bias"].data_ptr() == model[0].bias.data_ptr()
    whole = completed({name: torch.full_like(value, 9) for name, value in changed.items()}, model)
    assert whole.keys() == model.state_dict().keys()
    assert {name for name, value in whole.items() if not (value == 9).all()} == {"0.weight", "2.weight"}
    assert torch.equal(whole["2.weight"], model[0].weight)


def test_of_a_training_that_has_ended_the_best_weights_and_the_position_stay(storage: Storage) -> None:
    written = Checkpoints(storage)
    for step in (3, 5):
        written.save(example(step))
    for _ in range(2):  # again, it finds nothing to do
        written.conclude()
        assert storage.names() == ["00001-0000005/best.safetensors", "00001-0000005/state.json"]
        found = Checkpoints(storage).load()
        assert found is not None
        assert found.is_concluded
        assert (found.position, found.model, found.average) == (example(5).position, {}, None)
        assert same(found.best, example(5).best)
    assert not example().is_concluded


def test_best_weights_that_are_stored_as_others_stay(local: Storage) -> None:
    saved = example()
    saved.best = saved.average
    Checkpoints(local).save(saved)
    Checkpoints(local).conclude()
    assert local.names() == ["00001-0000005/average.safetensors", "00001-0000005/state.json"]
    found = Checkpoints(local).load()
    assert found is not None
    assert same(found.best, saved.average)


def test_what_was_concluded_is_checked_as_ever(local: Storage) -> None:
    Checkpoints(local).save(example())
    Checkpoints(local).conclude()
    local.delete("00001-0000005/best.safetensors")
    assert Checkpoints(local).load() is None
