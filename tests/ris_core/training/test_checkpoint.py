"""A checkpoint comes back as it was, is replaced whole or not at all, and says what is wrong with it."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.optim.swa_utils import AveragedModel

from ris_core import files
from ris_core.errors import WeightsError
from ris_core.training import checkpoint as checkpoints
from ris_core.training.checkpoint import Checkpoint, Position


def example(value: float = 1.0, best: bool = True) -> Checkpoint:
    """Weights in an odd memory layout, and a real optimiser's state."""
    weight = torch.nn.Parameter(torch.full((2, 3, 2, 2), value).to(memory_format=torch.channels_last))
    optimizer = torch.optim.AdamW([{"name": "head", "params": [weight], "initial_lr": 0.1}], lr=0.1)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    model = {"weight": weight.detach(), "count": torch.tensor(7)}
    history = [{"epoch": 1, "train/loss": 0.1 + 0.2, "val/mIoU": 1 / 3}]
    return Checkpoint(
        Position(epoch=1, step=5, loss_sum=1 / 3, best_score=1 / 3, best_epoch=1, history=history),
        model,
        {"optimizer": optimizer.state_dict(), "scaler": {}},
        {"weight": weight.detach() * 2} if best else None,
    )


def test_round_trip_is_exact(tmp_path: Path) -> None:
    saved = example()
    checkpoints.save(tmp_path / "checkpoint", saved)
    found = checkpoints.load(tmp_path / "checkpoint")
    assert found.position == saved.position
    for mine, theirs in ((saved.model, found.model), (saved.best, found.best)):
        assert mine is not None
        assert theirs is not None
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    state, original = found.optimizer["optimizer"], saved.optimizer["optimizer"]
    assert state["param_groups"] == original["param_groups"]
    assert all(torch.equal(state["state"][0][name], original["state"][0][name]) for name in original["state"][0])


def test_before_the_first_validation_there_is_no_best(tmp_path: Path) -> None:
    first = example(best=False)
    first.position = Position(epoch=0, step=3)
    checkpoints.save(tmp_path / "checkpoint", first)
    found = checkpoints.load(tmp_path / "checkpoint")
    assert found.best is None
    assert found.position == Position(epoch=0, step=3)
    assert found.position.best_score == -math.inf


def test_the_files_are_standard_ones(tmp_path: Path) -> None:
    checkpoints.save(tmp_path / "checkpoint", example())
    folder = tmp_path / "checkpoint"
    assert sorted(path.name for path in folder.iterdir()) == [
        "best.safetensors",
        "last.safetensors",
        "optimizer.pt",
        "state.json",
    ]
    assert set(load_file(folder / "last.safetensors")) == {"weight", "count"}
    assert "optimizer" in torch.load(folder / "optimizer.pt", weights_only=True)
    assert json.loads((folder / "state.json").read_text())["format"] == 1


def test_saving_replaces_and_leaves_nothing_behind(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    for value in (1.0, 2.0):
        checkpoints.save(folder, example(value))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
    assert torch.equal(checkpoints.load(folder).model["weight"], example(2.0).model["weight"])


class Stopped(Exception):
    """The process ends here."""


@pytest.mark.parametrize("moment", ["while writing", "before the old one is moved", "before the new one is moved"])
def test_a_save_that_is_stopped_loses_nothing(moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "checkpoint"
    checkpoints.save(folder, example(1.0))
    moves = 0

    def move(source: Path, target: Path, real=files.os.replace) -> None:  # type: ignore[no-untyped-def]
        nonlocal moves
        moves += 1
        if moves == {"before the old one is moved": 1, "before the new one is moved": 2}[moment]:
            raise Stopped
        real(source, target)

    def fail(*_: object) -> None:
        raise Stopped

    with monkeypatch.context() as patched:
        if moment == "while writing":
            patched.setattr(checkpoints.torch, "save", fail)
        else:
            patched.setattr(files.os, "replace", move)
        with pytest.raises(Stopped):
            checkpoints.save(folder, example(2.0))
    assert checkpoints.exists(folder)
    assert torch.equal(checkpoints.load(folder).model["weight"], example(1.0).model["weight"])
    checkpoints.save(folder, example(3.0))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
    assert torch.equal(checkpoints.load(folder).model["weight"], example(3.0).model["weight"])


def test_stopped_twice_it_still_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left after a first stop, under its `.old` name, is all there is: a second save must not touch it."""
    folder = tmp_path / "checkpoint"
    checkpoints.save(folder, example(1.0))
    folder.rename(tmp_path / "checkpoint.old")

    def fail(source: Path, target: Path) -> None:
        raise Stopped

    with monkeypatch.context() as patched:
        patched.setattr(files.os, "replace", fail)
        with pytest.raises(Stopped):
            checkpoints.save(folder, example(2.0))
    assert torch.equal(checkpoints.load(folder).model["weight"], example(1.0).model["weight"])


def test_nothing_saved_yet(tmp_path: Path) -> None:
    assert not checkpoints.exists(tmp_path / "checkpoint")


@pytest.mark.parametrize("name", ["last.safetensors", "optimizer.pt", "state.json"])
def test_a_missing_file_is_named(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    checkpoints.save(folder, example())
    (folder / name).unlink()
    with pytest.raises(WeightsError, match=f"checkpoint is not a whole checkpoint: {name} missing; delete it"):
        checkpoints.load(folder)


@pytest.mark.parametrize("name", ["last.safetensors", "best.safetensors", "optimizer.pt", "state.json"])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_damaged_file_is_an_error_with_a_remedy(name: str, share: float, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    checkpoints.save(folder, example())
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: int(share * len(content))])
    with pytest.raises(WeightsError, match=r"checkpoint is damaged \(.+\); delete it to start afresh"):
        checkpoints.load(folder)


NAMES = ["last.safetensors", "best.safetensors", "optimizer.pt", "state.json"]
DAMAGES: dict[str, tuple[bytes, str]] = {
    "zeros": (bytes(500), "begins with zeros|no JSON at all"),
    "text": (b"access denied", "text, not weights: it begins 'access denied'|no JSON at all"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "a Git LFS pointer"),
    "pickle": (b"\x80\x02}q\x00.", "a pickle that torch.save did not write|no JSON at all"),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_another_file_in_place_of_one_is_told_as_what_it_is(name: str, damage: str, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    checkpoints.save(folder, example())
    content, what = DAMAGES[damage]
    (folder / name).write_bytes(content)
    with pytest.raises(
        WeightsError, match=rf"checkpoint is damaged \({name} .*({what}).*\); delete it to start afresh$"
    ):
        checkpoints.load(folder)


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_in_place_of_a_file(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    checkpoints.save(folder, example())
    (folder / name).unlink()
    (folder / name).mkdir()
    with pytest.raises(WeightsError, match=rf"checkpoint is damaged \({name} is a folder\); delete it to start afresh"):
        checkpoints.load(folder)


@pytest.mark.parametrize("name", ["last.safetensors", "best.safetensors"])
def test_weights_that_are_not_finite_are_refused(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    checkpoints.save(folder, example())
    save_file({"weight": torch.tensor([1.0, math.nan])}, folder / name)
    problem = "weight is not finite in 1 of 2 values"
    with pytest.raises(
        WeightsError, match=rf"damaged \({name} holds weights .*: {problem}\); delete it to start afresh"
    ):
        checkpoints.load(folder)


def test_the_best_weights_must_be_there_once_there_were_some(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    checkpoints.save(folder, example())
    (folder / "best.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"damaged \(best\.safetensors is missing\); delete it to start afresh"):
        checkpoints.load(folder)


ROW = {"epoch": 1, "val/mIoU": 0.5}


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
        ({"history": None}, "history: expected a list of epochs"),
        ({"history": {}}, "history: expected a list of epochs"),
        ({"history": [1]}, "history: expected a list of epochs"),
        ({"history": [{"epoch": "1"}]}, "history: expected a list of epochs"),
        ({"history": [{"epoch": None}]}, "history: expected a list of epochs"),
        ({"history": [ROW, {"epoch": 2}]}, "history: epochs have different names"),
        ({"foo": 2}, "foo: unknown parameter"),
    ],
)
def test_a_changed_state_is_told(change: dict[str, object], problem: str, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    checkpoints.save(folder, example())
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**state, **change}))
    with pytest.raises(
        WeightsError, match=rf"checkpoint is damaged \(state\.json: .*({problem}).*\); delete it to start"
    ):
        checkpoints.load(folder)


def test_a_state_that_lacks_something(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    checkpoints.save(folder, example())
    state = json.loads((folder / "state.json").read_text())
    for name in set(state) - {"format"}:
        (folder / "state.json").write_text(json.dumps({key: state[key] for key in state if key != name}))
        with pytest.raises(
            WeightsError, match=rf"is damaged \(state\.json: {name} missing\); delete it to start afresh"
        ):
            checkpoints.load(folder)
    for content in ("[]", "null", "3", '"text"'):
        (folder / "state.json").write_text(content)
        with pytest.raises(
            WeightsError, match=r"is damaged \(state\.json .* it holds a .*\); delete it to start afresh"
        ):
            checkpoints.load(folder)
    (folder / "state.json").write_text('{"epoch": 1}')
    with pytest.raises(WeightsError, match="has another format than 1; delete the checkpoint to start afresh"):
        checkpoints.load(folder)


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
def test_an_optimizer_file_that_lacks_what_the_loop_needs(content: object, problem: str, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    checkpoints.save(folder, example())
    torch.save(content, folder / "optimizer.pt")
    with pytest.raises(
        WeightsError, match=rf"checkpoint is damaged \(optimizer\.pt {problem}.*\); delete it to start afresh"
    ):
        checkpoints.load(folder)


# Giving the states back


class Run:
    """What a training loop holds beside its model, after `steps` steps of a small one."""

    def __init__(self, steps: int, width: int = 3, optimizer: type[torch.optim.Adam] = torch.optim.AdamW) -> None:
        torch.manual_seed(0)
        self.model = torch.nn.Linear(width, 2)
        groups = [{"name": "head", "params": list(self.model.parameters()), "initial_lr": 0.1}]
        self.optimizer = optimizer(groups, lr=0.1)
        self.scaler = torch.amp.GradScaler("cpu", enabled=False)
        self.average = AveragedModel(self.model)
        for _ in range(steps):
            self.step()

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.model(torch.ones(1, self.model.in_features)).sum().backward()
        self.optimizer.step()
        self.average.update_parameters(self.model)

    def checkpoint(self) -> Checkpoint:
        states = {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}
        return Checkpoint(Position(), dict(self.model.state_dict()), {**states, "average": self.average.state_dict()})

    def restored(self, checkpoint: Checkpoint) -> None:
        self.model.load_state_dict(checkpoint.model)
        checkpoint.restore(self.optimizer, self.scaler, self.average)
        self.step()


def test_restored_states_go_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    first, second = Run(steps=3), Run(steps=0)
    checkpoints.save(tmp_path / "checkpoint", first.checkpoint())
    second.restored(checkpoints.load(tmp_path / "checkpoint"))
    first.step()
    assert torch.equal(first.model.weight, second.model.weight)
    assert torch.equal(first.average.module.weight, second.average.module.weight)  # type: ignore[arg-type]
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
        spoiled("average"),
        spoiled("average", value=[]),
        spoiled("average", "module.weight"),
        spoiled("average", "module.weight", value=torch.ones(7)),
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
        checkpoint.restore(run.optimizer, run.scaler, run.average)


def test_code_in_the_optimizer_file_is_not_run(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    checkpoints.save(folder, example())
    trap = tmp_path / "trap"

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str, str]]:
            return open, (str(trap), "w")

    torch.save({"optimizer": Evil()}, folder / "optimizer.pt")
    with pytest.raises(WeightsError, match="is damaged"):
        checkpoints.load(folder)
    assert not trap.exists()


def test_another_format_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    checkpoints.save(folder, example())
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**state, "format": 2, "new": 1}))
    with pytest.raises(WeightsError, match="has another format than 1; delete the checkpoint to start afresh"):
        checkpoints.load(folder)


def test_a_copy_is_safe_from_later_steps() -> None:
    weight = torch.zeros(2, requires_grad=True)
    copy = checkpoints.cpu_copy({"weight": weight})
    with torch.no_grad():
        weight += 1
    assert copy["weight"].tolist() == [0, 0]
    assert not copy["weight"].requires_grad
