"""The loop: interrupted and resumed equals undisturbed, to the bit; the average, the best epoch and the log are right."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_world import Tiny
from torch import nn
from torch.optim.swa_utils import AveragedModel

from ris_core.config import Params
from ris_core.data.dataset import BatchPlan, TrainingBatches
from ris_core.device import autocast, resolved_precision
from ris_core.errors import ClusterError, ConfigError, WeightsError
from ris_core.models.clip import load_saved_clip
from ris_core.models.contract import MapSystem
from ris_core.models.cris import CRISConfig
from ris_core.models.losses import LossParams
from ris_core.models.registry import build_model
from ris_core.storage import Storage
from ris_core.training import loop
from ris_core.training.checkpoint import Checkpoint, Checkpoints
from ris_core.training.loop import Batch, Trainer, averaged, micro_batches, moving_average
from ris_core.training.run import first_stage_model, initial_model, make_trainer
from ris_core.training.runtime import LocalRuntime

STEPS = 5
FROZEN = "backbone.token_embedding.weight"


@pytest.fixture(scope="module", autouse=True)
def _log_every_second_step() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(loop, "LOG_EVERY", 2)
        yield


def plain(folder: Path) -> LocalRuntime:
    """One process with its checkpoints in a folder."""
    return LocalRuntime(Checkpoints(Storage(folder)), "cpu")


def cris_trainer(tiny: Tiny, params: Params, runtime: LocalRuntime) -> Trainer:
    """A trainer of CRIS with fresh layers."""
    section = params.of("cris")
    model = build_model("cris", section.model, load_saved_clip(tiny.clip))
    model.load_state_dict(initial_model(section, "cris", tiny.clip, None, params.train.seed))
    assert isinstance(model, MapSystem)
    assert section.train is not None
    return make_trainer(model, section.train, tiny.store(), runtime)


def trainer_of(tiny: Tiny, runtime: LocalRuntime, **train: Any) -> Trainer:
    """A trainer with everything on that has a state: weight average, dropout, warm-up, gradient clipping."""
    params = tiny.params()
    section = params.of("cris")
    chosen = {"steps_per_epoch": STEPS, "ema_decay": 0.7, "warmup_steps": 3, "clip_grad_norm": 1.0, **train}
    for name, value in chosen.items():
        assert hasattr(section.train, name)
        setattr(section.train, name, value)
    assert isinstance(section.model, CRISConfig)
    assert section.model.dropout > 0
    return cris_trainer(tiny, params, runtime)


def outcome(trainer: Trainer) -> Checkpoint:
    """The state of a trainer, as it is saved and found again."""
    trainer._save()
    trainer.runtime.finish()
    found = trainer.runtime.load()
    assert found is not None
    return found


def timeless(points: list[dict[str, float]]) -> list[dict[str, float]]:
    """All that was logged but how fast it went."""
    clocks = ("samples_per_second", "loader_wait")
    return [{name: value for name, value in row.items() if name not in clocks} for row in points]


def assert_equal(one: Any, other: Any, place: str = "") -> None:
    """Nested states are the same to the bit."""
    assert type(one) is type(other), place
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), place
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), place
        for name in one:
            assert_equal(one[name], other[name], f"{place}/{name}")
    elif isinstance(one, list):
        assert len(one) == len(other), place
        for i, pair in enumerate(zip(one, other, strict=True)):
            assert_equal(*pair, f"{place}/{i}")
    else:
        assert one == other, place


def assert_same_run(one: Checkpoint, other: Checkpoint) -> None:
    assert_equal(one.model, other.model, "model")
    assert_equal(one.average, other.average, "average")
    assert_equal(one.best, other.best, "best")
    assert_equal(one.optimizer, other.optimizer, "optimizer")
    assert_equal(timeless(one.position.points), timeless(other.position.points), "points")
    assert {**vars(one.position), "points": []} == {**vars(other.position), "points": []}


@pytest.fixture(scope="module")
def undisturbed(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Two epochs in one go, without a checkpoint inside an epoch."""
    runtime = plain(tmp_path_factory.mktemp("undisturbed"))
    trainer = trainer_of(tiny, runtime, checkpoint_every_steps=None)
    trainer.fit()
    return outcome(trainer)


class Crash(Exception):
    """The process dies here."""


class Crashing(LocalRuntime):
    """Dies at the n-th save, before or after that checkpoint is in place."""

    def __init__(self, folder: Path, at: int, saved: bool):
        super().__init__(Checkpoints(Storage(folder)), "cpu")
        self.left, self.saved = at, saved

    def save(self, checkpoint: Checkpoint) -> None:
        self.left -= 1
        if self.left or self.saved:
            super().save(checkpoint)
        if not self.left:
            self.checkpoints.wait()
            raise Crash


def test_training_goes_somewhere(undisturbed: Checkpoint, tiny: Tiny, tmp_path: Path) -> None:
    """Guards the tests below: weights of both groups, statistics and average all move, and scores are recorded."""
    fresh = outcome(trainer_of(tiny, plain(tmp_path)))
    assert undisturbed.average is not None
    for name in ("backbone.visual.conv1.weight", "proj.txt.weight", "neck.txt_proj.1.running_mean"):
        assert not torch.equal(fresh.model[name], undisturbed.model[name]), name
        assert not torch.equal(undisturbed.model[name], undisturbed.average[name]), name
    position = undisturbed.position
    assert (position.epoch, position.step) == (2, 0)
    assert [row["epoch"] for row in position.history] == [1, 2]
    assert [row["step"] for row in position.points] == [2, 4, 5, 7, 9, 10]
    assert all(math.isfinite(value) for row in position.history for value in row.values())
    assert all(0 < row["train/loss"] < 2 for row in position.history)


# With a checkpoint every 2 of 5 steps: 1 and 2 inside the first epoch, 3 at its end, 4 and 5 inside the second, 6 at the end;
# with one every 3, they lie where nothing is logged.
@pytest.mark.parametrize(
    ("every", "at", "saved", "resumes_at"),
    [
        (2, 1, False, (0, 0)),
        (2, 1, True, (0, 2)),
        (2, 2, False, (0, 2)),
        (2, 2, True, (0, 4)),
        (2, 3, False, (0, 4)),
        (2, 3, True, (1, 0)),
        (2, 4, True, (1, 2)),
        (2, 5, True, (1, 4)),
        (2, 6, False, (1, 4)),
        (2, 6, True, (2, 0)),
        (3, 1, True, (0, 3)),
        (3, 3, True, (1, 3)),
        (1, 8, True, (1, 3)),
    ],
)
def test_interrupted_and_resumed_equals_undisturbed(
    every: int, at: int, saved: bool, resumes_at: tuple[int, int], undisturbed: Checkpoint, tiny: Tiny, tmp_path: Path
) -> None:
    """Wherever it is: weights, frozen ones too, average, optimiser, and all that is logged on the way."""
    crashing, before, after = Crashing(tmp_path, at, saved), [], []
    with pytest.raises(Crash):
        trainer_of(tiny, crashing, checkpoint_every_steps=every).fit(lambda row, step: before.append((step, row)))
    torch.manual_seed(99)  # a new process has other random numbers
    resumed = trainer_of(tiny, plain(tmp_path), checkpoint_every_steps=every)
    assert (resumed.position.epoch, resumed.position.step) == resumes_at
    resumed.fit(lambda row, step: after.append((step, row)))
    assert [{"step": step, **row} for step, row in after] == resumed.position.points, "nothing that was logged is lost"
    known = [entry for entry in before if entry[0] <= resumes_at[0] * STEPS + resumes_at[1]]
    assert after[: len(known)] == known
    assert_same_run(outcome(resumed), undisturbed)


def test_a_run_that_dies_again_and_again_still_arrives(undisturbed: Checkpoint, tiny: Tiny, tmp_path: Path) -> None:
    for _ in range(5):
        with pytest.raises(Crash):
            trainer_of(tiny, Crashing(tmp_path, at=1, saved=True), checkpoint_every_steps=2).fit()
    last = trainer_of(tiny, plain(tmp_path), checkpoint_every_steps=2)
    last.fit()
    assert_same_run(outcome(last), undisturbed)


@pytest.mark.parametrize("file", ["last.safetensors", "average.safetensors", "optimizer.pt", "state.json"])
def test_from_a_damaged_checkpoint_it_goes_on_at_the_one_before(
    file: str, undisturbed: Checkpoint, tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(Crash):
        trainer_of(tiny, Crashing(tmp_path, at=4, saved=True), checkpoint_every_steps=2).fit()
    assert Checkpoints(Storage(tmp_path)).names() == ["00001-0000000", "00001-0000002"]
    damaged = tmp_path / "00001-0000002" / file
    content = damaged.read_bytes()
    damaged.write_bytes(content[:100] + bytes([content[100] ^ 1]) + content[101:])
    capsys.readouterr()
    resumed = trainer_of(tiny, plain(tmp_path), checkpoint_every_steps=2)
    warning, started = capsys.readouterr().err.splitlines()
    assert warning.startswith(f"warning: the checkpoint {tmp_path}/00001-0000002 is damaged ({file}")
    assert warning.endswith("; going on from 00001-0000000")
    assert started == "resuming at epoch 2, step 0"
    resumed.fit()
    assert_same_run(outcome(resumed), undisturbed)


def test_what_is_written_while_training_goes_on_is_the_state_of_its_moment(
    undisturbed: Checkpoint, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, steps_done = Storage.write, threading.Event()

    def late(self: Storage, name: str, content: bytes) -> None:
        if name.startswith("00000-0000002"):
            assert steps_done.wait(30)
        write(self, name, content)

    trainer = trainer_of(tiny, Crashing(tmp_path, at=2, saved=True), checkpoint_every_steps=2)
    real, begun = trainer._step, iter(range(STEPS))

    def step(*given: Any) -> torch.Tensor:
        loss = real(*given)
        if next(begun) == 3:  # two steps after the checkpoint, and before the next one
            steps_done.set()
        return loss

    with monkeypatch.context() as patched:
        patched.setattr(Storage, "write", late)
        trainer._step = step  # type: ignore[method-assign]
        with pytest.raises(Crash):
            trainer.fit()
    (tmp_path / "00000-0000004/state.json").unlink()
    resumed = trainer_of(tiny, plain(tmp_path), checkpoint_every_steps=2)
    assert (resumed.position.epoch, resumed.position.step) == (0, 2)
    resumed.fit()
    assert_same_run(outcome(resumed), undisturbed)


def test_with_all_checkpoints_damaged_it_begins_afresh(
    undisturbed: Checkpoint, tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(Crash):
        trainer_of(tiny, Crashing(tmp_path, at=4, saved=True), checkpoint_every_steps=2).fit()
    for file in tmp_path.glob("*/optimizer.pt"):
        file.unlink()
    resumed = trainer_of(tiny, plain(tmp_path), checkpoint_every_steps=2)
    assert capsys.readouterr().err.endswith("; no whole one is left: starting afresh\n")
    resumed.fit()
    assert_same_run(outcome(resumed), undisturbed)


def test_checkpoints_hold_what_training_changes(undisturbed: Checkpoint, tiny: Tiny, tmp_path: Path) -> None:
    """Frozen weights are in none of them; the model that comes out has them, as they were."""
    trainer = trainer_of(tiny, plain(tmp_path), epochs=1)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    frozen = {name for name, value in trainer.model.named_parameters() if not value.requires_grad}
    assert FROZEN in frozen
    trainer.fit()
    for weights in (undisturbed.model, undisturbed.average, undisturbed.best):
        assert weights is not None
        assert weights.keys() == before.keys() - frozen
    best = trainer.best_weights()
    assert best.keys() == before.keys()
    assert all(torch.equal(best[name], before[name]) for name in frozen)
    assert trainer.average is not None
    average = dict(trainer.average.module.named_parameters())
    assert all(torch.equal(average[name], before[name]) for name in frozen)
    assert average[FROZEN].data_ptr() == dict(trainer.model.named_parameters())[FROZEN].data_ptr(), "held once"
    assert_equal(best, dict(trainer.average.module.state_dict()))
    again = trainer_of(tiny, plain(tmp_path), epochs=1)
    assert_equal(again.best_weights(), best)


def test_a_checkpoint_without_the_average_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    trainer_of(tiny, plain(tmp_path), epochs=1, steps_per_epoch=1, ema_decay=0.0).fit()
    with pytest.raises(WeightsError, match="The checkpoint of this run does not fit its model"):
        trainer_of(tiny, plain(tmp_path), epochs=1, steps_per_epoch=1)


def test_processes_that_find_different_checkpoints_say_so(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of two, the other of which finds nothing."""
    trainer_of(tiny, plain(tmp_path), epochs=1, steps_per_epoch=2).fit()
    runtime = plain(tmp_path)
    runtime.world, runtime.rank = 2, 1
    monkeypatch.setattr(runtime, "prepare", lambda model: model)
    with pytest.raises(
        ClusterError, match=r"process 1 finds the newest checkpoint at epoch 2, step 0, others elsewhere"
    ):
        trainer_of(tiny, runtime, epochs=2, steps_per_epoch=2)


def test_a_checkpoint_that_cannot_be_written_ends_the_training(
    undisturbed: Checkpoint, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is told after the next steps at the latest, and once there is room again, it goes on from the one before."""
    write, files = Storage.write, []

    def until_full(self: Storage, name: str, content: bytes) -> None:
        files.append(name)
        if name.startswith("00001-0000002"):
            raise ClusterError(f"{name} could not be written: make room")
        write(self, name, content)

    with monkeypatch.context() as patched:
        patched.setattr(Storage, "write", until_full)
        with pytest.raises(ClusterError, match=r"make room; the next start goes on from 00001-0000000$"):
            trainer_of(tiny, plain(tmp_path), checkpoint_every_steps=2).fit()
    assert files[-1] == "00001-0000002/last.safetensors", "nothing was tried after that"
    resumed = trainer_of(tiny, plain(tmp_path), checkpoint_every_steps=2)
    assert (resumed.position.epoch, resumed.position.step) == (1, 0)
    resumed.fit()
    assert_same_run(outcome(resumed), undisturbed)


def test_the_last_checkpoint_is_written_when_fit_returns(tiny: Tiny, tmp_path: Path) -> None:
    trainer_of(tiny, plain(tmp_path), epochs=1, steps_per_epoch=1).fit()
    assert Checkpoints(Storage(tmp_path)).names() == ["00001-0000000"]


def test_two_runs_are_the_same_and_batches_made_ahead_change_nothing(
    undisturbed: Checkpoint, tiny: Tiny, tmp_path: Path
) -> None:
    again = trainer_of(tiny, plain(tmp_path), loader_workers=1)
    again.fit()
    assert_same_run(outcome(again), undisturbed)


def test_another_seed_is_another_run(undisturbed: Checkpoint, tiny: Tiny, tmp_path: Path) -> None:
    other = trainer_of(tiny, plain(tmp_path), seed=1, epochs=1)
    other.fit()
    assert other.position.history[0]["train/loss"] != undisturbed.position.history[0]["train/loss"]


def test_a_finished_run_is_not_trained_again(tiny: Tiny, tmp_path: Path) -> None:
    trainer_of(tiny, plain(tmp_path), epochs=1, steps_per_epoch=1).fit()
    state = tmp_path / "00001-0000000/state.json"
    before = state.stat().st_mtime_ns
    logged: list[int] = []
    again = trainer_of(tiny, plain(tmp_path), epochs=1, steps_per_epoch=1)
    assert again.fit(lambda metrics, step: logged.append(step)).epoch == 1
    assert again.best is not None
    assert state.stat().st_mtime_ns == before
    assert logged == [1], "once more, should it not have arrived"


def test_a_checkpoint_of_another_model_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    trainer_of(tiny, plain(tmp_path), epochs=1, steps_per_epoch=1).fit()
    params = tiny.params()
    object.__setattr__(params.of("cris").model, "ffn_dim", 48)
    with pytest.raises(WeightsError, match="The checkpoint of this run does not fit its model") as caught:
        cris_trainer(tiny, params, plain(tmp_path))
    assert "shape of decoder.layers.0.ffn.0.weight: [32, 32] in the weights, [48, 32] in the model" in str(caught.value)


@pytest.mark.parametrize(("keep", "kept"), [("best", 2), ("last", 3)])
def test_the_best_epoch_is_the_last_of_the_highest(keep: str, kept: int, tiny: Tiny, tmp_path: Path) -> None:
    """Unless the last one is wanted, whatever its score."""
    trainer = trainer_of(tiny, plain(tmp_path), epochs=4, steps_per_epoch=1, ema_decay=0.0, keep=keep)
    scores, seen = iter([0.1, 0.3, 0.3, 0.2]), []

    def scripted(model: nn.Module) -> dict[str, float]:
        seen.append(model.state_dict()["proj.txt.weight"].clone())
        return {"val/mIoU": next(scores), "val/oIoU": 0.0}

    trainer.validate = scripted
    position = trainer.fit()
    assert (position.best_epoch, position.best_score) == (kept + 1, (0.3, 0.2)[kept - 2])
    assert trainer.best is not None
    assert torch.equal(trainer.best["proj.txt.weight"], seen[kept])
    assert not torch.equal(seen[2], seen[3])
    assert [row["val/mIoU"] for row in position.history] == [0.1, 0.3, 0.3, 0.2]


def test_with_an_average_it_is_the_average_that_is_scored_and_kept(tiny: Tiny, tmp_path: Path) -> None:
    trainer = trainer_of(tiny, plain(tmp_path), epochs=1, steps_per_epoch=3)
    scored: list[nn.Module] = []
    real = trainer.validate

    def watched(model: MapSystem) -> dict[str, float]:
        scored.append(model)
        assert all(not buffer.isnan().any() for buffer in model.buffers() if buffer.is_floating_point())
        return real(model)

    trainer.validate = watched
    trainer.fit()
    assert trainer.average is not None
    assert scored == [trainer.average.module]
    assert_equal(trainer.best_weights(), dict(trainer.average.module.state_dict()))


def test_the_moving_average_by_hand() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([1.0, 2.0]))
            self.register_buffer("mask", torch.tensor([0.0, -math.inf]))
            self.register_buffer("count", torch.tensor(0))

    model = Model()
    average = AveragedModel(model, multi_avg_fn=moving_average(0.75), use_buffers=True)
    expected = torch.tensor([1.0, 2.0])
    for step in range(3):
        with torch.no_grad():
            model.weight += 1
        model.count += 1
        average.update_parameters(model)
        expected = model.weight.detach().clone() if step == 0 else 0.75 * expected + 0.25 * model.weight.detach()
    assert torch.allclose(average.module.weight, expected)
    assert average.module.mask.tolist() == [0.0, -math.inf]
    assert average.module.count == 3


def test_what_average_and_model_share_is_left_alone() -> None:
    """A frozen CLIP is not copied into the average: its tensors are the model's own."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([1.0, 2.0]))
            self.frozen = nn.Parameter(torch.tensor([0.1, 0.3]), requires_grad=False)
            self.register_buffer("mask", torch.tensor([0.0, -math.inf]))
            self.register_buffer("count", torch.tensor(3))

    model = Model()
    average = averaged(model, 0.7)  # type: ignore[arg-type]
    assert average.module.frozen.data_ptr() == model.frozen.data_ptr()
    average.module.mask, average.module.count = model.mask, model.count
    before = model.frozen.detach().clone()
    for _ in range(3):
        with torch.no_grad():
            model.weight += 1
        average.update_parameters(model)
    assert torch.equal(model.frozen, before)
    assert (model.mask.tolist(), model.count.item()) == ([0.0, -math.inf], 3)
    expected = 0.7 * (0.7 * 2 + 0.3 * 3) + 0.3 * 4  # the first update copies
    assert average.module.weight[0].item() == pytest.approx(expected)
    update = moving_average(0.7)
    alone = [model.frozen]
    update(alone, alone, 1)
    assert torch.equal(model.frozen, before)


def test_the_loss_is_the_models_own(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_of(tiny, plain(tmp_path))
    seen: list[tuple[torch.Size, torch.Size, LossParams]] = []

    def loss(self: nn.Module, output: torch.Tensor, target: torch.Tensor, params: LossParams) -> torch.Tensor:
        seen.append((output.shape, target.shape, params))
        return output.float().square().mean()

    monkeypatch.setattr(type(trainer.model), "loss", loss)
    trainer.model.train()
    trainer._step(trainer.batches.epoch(0)[0], 0)
    assert seen == [((8, 1, 16, 16), (8, 1, 16, 16), trainer.params.loss)]


def test_gradients_are_clipped(tiny: Tiny, tmp_path: Path) -> None:
    norms = {}
    for limit in (0.0, 0.01):
        trainer = trainer_of(tiny, plain(tmp_path / str(limit)), clip_grad_norm=limit)
        trainer.model.train()
        trainer._step(trainer.batches.epoch(0)[0], 0)
        gradients = [p.grad for p in trainer.trained]
        assert all(gradient is not None for gradient in gradients), "everything that is trained has a gradient"
        norms[limit] = torch.linalg.vector_norm(torch.stack([g.norm() for g in gradients if g is not None])).item()
    assert norms[0.0] > 0.02
    assert norms[0.01] == pytest.approx(0.01, rel=1e-3)


def test_the_log_counts_the_optimisers_steps(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "LOG_EVERY", 1)
    entries: list[tuple[int, dict[str, float]]] = []
    trainer = trainer_of(tiny, plain(tmp_path), steps_per_epoch=3, warmup_steps=0)
    trainer.fit(lambda metrics, step: entries.append((step, metrics)))
    steps = [(step, metrics) for step, metrics in entries if "lr" in metrics]
    epochs = [(step, metrics) for step, metrics in entries if "val/mIoU" in metrics]
    assert [step for step, _ in steps] == [1, 2, 3, 4, 5, 6]
    assert [step for step, _ in epochs] == [3, 6]
    rates = [metrics["lr"] for _, metrics in steps]
    assert rates == pytest.approx([1e-3 * (1 + math.cos(math.pi * step / 6)) / 2 for step in range(6)])
    history = trainer.position.history
    for end, row, (_, metrics) in zip((2, 5), history, epochs, strict=True):
        assert row["train/loss"] == pytest.approx(steps[end][1]["train/loss"], rel=1e-6), "mean over the epoch"
        assert "train/loss" not in metrics, "it was logged with the step"
        assert 0 <= metrics["val/mIoU"] <= 1
        assert 0 <= metrics["val/oIoU"] <= 1


def test_a_step_that_is_logged_has_one_row(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the last of an epoch: what is known of it then is added to what was known of it as a step."""
    monkeypatch.setattr(loop, "LOG_EVERY", 3)
    trainer = trainer_of(tiny, plain(tmp_path), steps_per_epoch=3)
    trainer.fit()
    names = {"step", "train/loss", "lr", "samples_per_second", "loader_wait", "val/mIoU", "val/oIoU"}
    assert [(row["step"], row.keys()) for row in trainer.position.points] == [(3, names), (6, names)]
    again: list[tuple[dict[str, float], int]] = []
    trainer_of(tiny, plain(tmp_path), steps_per_epoch=3).fit(lambda metrics, step: again.append((metrics, step)))
    assert [{"step": step, **metrics} for metrics, step in again] == trainer.position.points


def test_what_is_waited_for_is_the_loader_and_not_the_step() -> None:
    def slowly() -> Iterator[Batch]:
        for number in range(3):
            time.sleep(0.02)
            yield {"image": torch.tensor(number)}

    waiting = loop.Waiting(slowly())
    seen = []
    for batch in waiting:
        time.sleep(0.1)
        seen.append(int(batch["image"]))
    assert seen == [0, 1, 2]
    assert 0.06 <= waiting.seconds < 0.3, "less than the three steps took"


def test_a_training_that_was_concluded_tells_again_what_was_logged_and_trains_no_more(
    tiny: Tiny, tmp_path: Path
) -> None:
    trainer = trainer_of(tiny, plain(tmp_path))
    logged: list[tuple[dict[str, float], int]] = []
    trainer.fit(lambda metrics, step: logged.append((metrics, step)))
    best = trainer.best_weights()
    plain(tmp_path).checkpoints.conclude()
    again = trainer_of(tiny, plain(tmp_path))
    told: list[int] = []
    again.fit(lambda metrics, step: told.append(step))
    assert told == [int(row["step"]) for row in trainer.position.points] != []
    assert_equal(again.best_weights(), best)


def test_bfloat16_trains(tiny: Tiny, tmp_path: Path) -> None:
    trainer = trainer_of(tiny, plain(tmp_path), precision="bf16", epochs=1, steps_per_epoch=2)
    trainer.fit()
    assert all(value.isfinite().all() for value in trainer.model.state_dict().values())
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())


def test_auto_precision_is_full_on_a_cpu(tiny: Tiny, tmp_path: Path) -> None:
    for name in ("auto", "fp32"):
        trainer = trainer_of(tiny, plain(tmp_path), precision=name)
        for context in (autocast(name, torch.device("cpu")), trainer.autocast):
            with context:
                assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
        assert resolved_precision(name, torch.device("cpu")) == "fp32"
        assert not trainer.scaler.is_enabled()
    with autocast("bf16", torch.device("cpu")):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16


def test_half_precision_needs_a_gpu(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="precision fp16 needs a GPU; use auto, which is fp32 on a CPU"):
        trainer_of(tiny, plain(tmp_path), precision="fp16")


def test_a_diverged_run_stops_and_keeps_what_it_had(tiny: Tiny, tmp_path: Path) -> None:
    trainer = trainer_of(tiny, plain(tmp_path), epochs=2)
    trainer._train_epoch(lambda metrics, step: None)
    trainer.train_loss = float("nan")
    with pytest.raises(ConfigError, match=r"diverged: the loss of epoch 1 is nan; lower train\.lr"):
        trainer._finish_epoch(lambda metrics, step: None)
    assert Checkpoints(Storage(tmp_path)).names() == []


def test_weights_that_went_wrong_take_the_place_of_no_good_ones(tiny: Tiny, tmp_path: Path) -> None:
    """Also inside an epoch: else the good ones were gone before its end."""
    trainer = trainer_of(tiny, plain(tmp_path), checkpoint_every_steps=1)
    real, steps = trainer._step, iter(range(STEPS))
    trainer._step = lambda *given: real(*given) * (math.nan if next(steps) >= 2 else 1)  # type: ignore[method-assign]
    with pytest.raises(
        ConfigError, match=r"diverged: the loss of epoch 1 is nan; .* the checkpoints from before that are"
    ):
        trainer.fit()
    trainer.runtime.finish()
    assert Checkpoints(Storage(tmp_path)).names() == ["00000-0000001", "00000-0000002"]


# Batches in parts


def risclip_trainer(tiny: Tiny, stage: int, runtime: LocalRuntime, **changed: Any) -> Trainer:
    """A trainer of one of RISCLIP's stages, in whose layers each expression is on its own."""
    section = tiny.params().of("risclip")
    params = (section.initialise, section.train)[stage - 1]
    assert params is not None
    for name, value in changed.items():
        assert hasattr(params, name)
        setattr(params, name, value)
    model: Any = first_stage_model(section, "risclip", tiny.clip_vit)
    if stage == 2:
        torch.manual_seed(0)
        model = build_model("risclip", section.model, load_saved_clip(tiny.clip_vit))
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    return make_trainer(model, params, tiny.store(), runtime)


def batch_of(tiny: Tiny, images: int, expressions: int) -> Batch:
    plan = BatchPlan(images, expressions, seed=0)
    model = first_stage_model(tiny.params().of("risclip"), "risclip", tiny.clip_vit)
    return TrainingBatches(tiny.store(), "train", plan, lambda texts: model.tokenize(texts, 12), model.stride).epoch(0)[
        0
    ]


@pytest.mark.parametrize("expressions", [1, 3])
@pytest.mark.parametrize(("images", "parts"), [(1, [1] * 5), (2, [2, 2, 1]), (3, [3, 2]), (4, [4, 1])])
def test_the_parts_of_a_batch_are_the_batch(images: int, parts: list[int], expressions: int, tiny: Tiny) -> None:
    batch = batch_of(tiny, 5, expressions)
    found = micro_batches(batch, images)
    assert [len(part["image"]) for part in found] == parts
    for part in found:
        assert part.keys() == batch.keys()
        index = torch.arange(len(part["image"])).repeat_interleave(expressions)
        assert torch.equal(part["image_index"], index)
    for name in ("image", "tokens", "target"):
        assert torch.equal(torch.cat([part[name] for part in found]), batch[name])
    asked = torch.cat([part["image"][part["image_index"]] for part in found])
    assert torch.equal(asked, batch["image"][batch["image_index"]]), "each expression has its image"


@pytest.mark.parametrize("images", [None, 5, 6])
def test_a_batch_that_is_small_enough_stays_whole(images: int | None, tiny: Tiny) -> None:
    batch = batch_of(tiny, 5, 2)
    (only,) = micro_batches(batch, images)
    assert only is batch


def gradients(trainer: Trainer, batch: Batch) -> tuple[float, list[torch.Tensor]]:
    """Loss and gradients of one step, before they are clipped or used."""
    trainer.model.train()
    loss = trainer._step(batch, 0).item()
    return loss, [parameter.grad for parameter in trainer.trained if parameter.grad is not None]


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("images", [1, 2, 3])
def test_gradients_of_the_parts_add_up_to_those_of_the_batch(
    images: int, stage: int, tiny: Tiny, tmp_path: Path
) -> None:
    """To rounding, and also where the last part is a smaller one: 5 images by 2 or 3."""
    batch = batch_of(tiny, 5, 2)
    seen: list[int] = []
    whole_loss, whole = gradients(risclip_trainer(tiny, stage, plain(tmp_path / "whole")), batch)
    trainer = risclip_trainer(tiny, stage, plain(tmp_path / "parts"), micro_batch_images=images)
    trainer.model.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    loss, summed = gradients(trainer, batch)
    assert max(seen) == images
    assert sum(seen) == 5
    assert loss == pytest.approx(whole_loss, rel=1e-5)
    assert len(whole) == len(summed) > 4
    scale = max(gradient.abs().max().item() for gradient in whole)
    for one, other in zip(whole, summed, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5 * scale)
    unequal = [gradient / len(seen) for gradient in summed]
    assert not any(torch.allclose(one, other) for one, other in zip(whole, unequal, strict=True) if one.any())


def test_training_in_parts_is_the_same_training_to_rounding(tiny: Tiny, tmp_path: Path) -> None:
    runs = {}
    for images in (None, 3):
        trainer = risclip_trainer(tiny, 1, plain(tmp_path / str(images)), micro_batch_images=images)
        trainer.fit()
        runs[images] = outcome(trainer)
    whole, parts = runs[None], runs[3]
    for one, other in zip(whole.position.points, parts.position.points, strict=True):
        assert one["step"] == other["step"]
        assert one["train/loss"] == pytest.approx(other["train/loss"], rel=1e-4)
    one, other = (torch.cat([weight.flatten() for weight in run.model.values()]) for run in (whole, parts))
    assert 0 < (one - other).norm() < 1e-4 * one.norm(), (
        "it was in parts, and Adam enlarges rounding where nothing else is"
    )


def test_training_in_parts_resumes_exactly(tiny: Tiny, tmp_path: Path) -> None:
    options = {"micro_batch_images": 3, "checkpoint_every_steps": 2}
    undisturbed = risclip_trainer(tiny, 1, plain(tmp_path / "undisturbed"), **options)
    undisturbed.fit()
    with pytest.raises(Crash):
        risclip_trainer(tiny, 1, Crashing(tmp_path / "run", at=3, saved=True), **options).fit()
    resumed = risclip_trainer(tiny, 1, plain(tmp_path / "run"), **options)
    resumed.fit()
    assert_same_run(outcome(resumed), outcome(undisturbed))
