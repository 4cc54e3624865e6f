"""A checkpoint comes back as it was, is replaced whole or not at all, and says what is wrong with it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

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

    def move(source: Path, target: Path, real=checkpoints.os.replace) -> None:  # type: ignore[no-untyped-def]
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
            patched.setattr(checkpoints.os, "replace", move)
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
        patched.setattr(checkpoints.os, "replace", fail)
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
