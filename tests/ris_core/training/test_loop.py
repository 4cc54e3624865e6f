"""The loop: interrupted and resumed equals undisturbed, to the bit; the average, the best epoch and the log are right."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_world import Tiny
from torch import nn
from torch.optim.swa_utils import AveragedModel

from ris_core.config import Params
from ris_core.device import autocast, resolved_precision
from ris_core.errors import ConfigError, WeightsError
from ris_core.models.clip import load_saved_clip
from ris_core.models.contract import MapSystem
from ris_core.models.cris import CRISConfig
from ris_core.models.losses import LossParams
from ris_core.models.registry import build_model
from ris_core.training import loop
from ris_core.training.checkpoint import Checkpoint
from ris_core.training.loop import Trainer, moving_average
from ris_core.training.run import initial_model, make_trainer
from ris_core.training.runtime import LocalRuntime

STEPS = 5


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
    made = trainer.checkpoint()
    assert made is not None
    return made


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
    assert_equal(one.best, other.best, "best")
    assert_equal(one.optimizer, other.optimizer, "optimizer")
    assert one.position == other.position


@pytest.fixture(scope="module")
def undisturbed(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Two epochs in one go, without a checkpoint inside an epoch."""
    trainer = trainer_of(tiny, LocalRuntime(tmp_path_factory.mktemp("undisturbed"), "cpu"))
    trainer.fit()
    return outcome(trainer)


class Crash(Exception):
    """The process dies here."""


class Crashing(LocalRuntime):
    """Dies at the n-th report, before or after that checkpoint is in place."""

    def __init__(self, folder: Path, at: int, saved: bool):
        super().__init__(folder, "cpu")
        self.left, self.saved = at, saved

    def report(self, metrics: dict[str, float], checkpoint: Checkpoint | None) -> None:
        self.left -= 1
        if self.left or self.saved:
            super().report(metrics, checkpoint)
        if not self.left:
            raise Crash


def test_training_goes_somewhere(undisturbed: Checkpoint, tiny: Tiny, tmp_path: Path) -> None:
    """Guards the tests below: weights of both groups, statistics and average all move, and scores are recorded."""
    fresh = outcome(trainer_of(tiny, LocalRuntime(tmp_path, "cpu")))
    for name in ("backbone.visual.conv1.weight", "proj.txt.weight", "neck.txt_proj.1.running_mean"):
        assert not torch.equal(fresh.model[name], undisturbed.model[name]), name
        assert not torch.equal(undisturbed.model[name], undisturbed.optimizer["average"][f"module.{name}"]), name
    assert torch.equal(
        fresh.model["backbone.token_embedding.weight"], undisturbed.model["backbone.token_embedding.weight"]
    ), "frozen"
    position = undisturbed.position
    assert (position.epoch, position.step) == (2, 0)
    assert [row["epoch"] for row in position.history] == [1, 2]
    assert all(math.isfinite(value) for row in position.history for value in row.values())
    assert all(0 < row["train/loss"] < 2 for row in position.history)


# Reports with a checkpoint every 2 of 5 steps: 1 and 2 inside the first epoch, 3 at its end, 4 and 5 inside the second.
@pytest.mark.parametrize(
    ("at", "saved", "resumes_at"),
    [(1, True, (0, 2)), (2, False, (0, 2)), (3, True, (1, 0)), (3, False, (0, 4)), (5, True, (1, 4))],
    ids=["inside epoch 1", "steps lost", "between epochs", "end of epoch lost", "inside epoch 2"],
)
def test_interrupted_and_resumed_equals_undisturbed(
    at: int, saved: bool, resumes_at: tuple[int, int], undisturbed: Checkpoint, tiny: Tiny, tmp_path: Path
) -> None:
    with pytest.raises(Crash):
        trainer_of(tiny, Crashing(tmp_path, at, saved), checkpoint_every_steps=2).fit()
    torch.manual_seed(99)  # a new process has other random numbers
    resumed = trainer_of(tiny, LocalRuntime(tmp_path, "cpu"), checkpoint_every_steps=2)
    assert (resumed.position.epoch, resumed.position.step) == resumes_at
    resumed.fit()
    assert_same_run(outcome(resumed), undisturbed)


def test_a_run_that_dies_again_and_again_still_arrives(undisturbed: Checkpoint, tiny: Tiny, tmp_path: Path) -> None:
    for _ in range(5):
        with pytest.raises(Crash):
            trainer_of(tiny, Crashing(tmp_path, at=1, saved=True), checkpoint_every_steps=2).fit()
    last = trainer_of(tiny, LocalRuntime(tmp_path, "cpu"), checkpoint_every_steps=2)
    last.fit()
    assert_same_run(outcome(last), undisturbed)


def test_two_runs_are_the_same_and_batches_made_ahead_change_nothing(
    undisturbed: Checkpoint, tiny: Tiny, tmp_path: Path
) -> None:
    again = trainer_of(tiny, LocalRuntime(tmp_path, "cpu"), loader_workers=1)
    again.fit()
    assert_same_run(outcome(again), undisturbed)


def test_another_seed_is_another_run(undisturbed: Checkpoint, tiny: Tiny, tmp_path: Path) -> None:
    other = trainer_of(tiny, LocalRuntime(tmp_path, "cpu"), seed=1, epochs=1)
    other.fit()
    assert other.position.history[0]["train/loss"] != undisturbed.position.history[0]["train/loss"]


def test_a_finished_run_is_not_trained_again(tiny: Tiny, tmp_path: Path) -> None:
    trainer_of(tiny, LocalRuntime(tmp_path, "cpu"), epochs=1, steps_per_epoch=1).fit()
    state = tmp_path / "checkpoint/state.json"
    before = state.stat().st_mtime_ns
    again = trainer_of(tiny, LocalRuntime(tmp_path, "cpu"), epochs=1, steps_per_epoch=1)
    assert again.fit().epoch == 1
    assert again.best is not None
    assert state.stat().st_mtime_ns == before


def test_a_checkpoint_of_another_model_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    trainer_of(tiny, LocalRuntime(tmp_path, "cpu"), epochs=1, steps_per_epoch=1).fit()
    params = tiny.params()
    object.__setattr__(params.of("cris").model, "ffn_dim", 48)
    with pytest.raises(WeightsError, match="The checkpoint of this run does not fit its model") as caught:
        cris_trainer(tiny, params, LocalRuntime(tmp_path, "cpu"))
    assert "shape of decoder.layers.0.ffn.0.weight: [32, 32] in the weights, [48, 32] in the model" in str(caught.value)


@pytest.mark.parametrize(("keep", "kept"), [("best", 2), ("last", 3)])
def test_the_best_epoch_is_the_last_of_the_highest(keep: str, kept: int, tiny: Tiny, tmp_path: Path) -> None:
    """Unless the last one is wanted, whatever its score."""
    trainer = trainer_of(tiny, LocalRuntime(tmp_path, "cpu"), epochs=4, steps_per_epoch=1, ema_decay=0.0, keep=keep)
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
    trainer = trainer_of(tiny, LocalRuntime(tmp_path, "cpu"), epochs=1, steps_per_epoch=3)
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
    assert_equal(trainer.best, dict(trainer.average.module.state_dict()))


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
    average = AveragedModel(model, multi_avg_fn=moving_average(0.7), use_buffers=True)
    average.module.frozen = model.frozen
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
    trainer = trainer_of(tiny, LocalRuntime(tmp_path, "cpu"))
    seen: list[tuple[torch.Size, torch.Size, LossParams]] = []

    def loss(self: nn.Module, output: torch.Tensor, target: torch.Tensor, params: LossParams) -> torch.Tensor:
        seen.append((output.shape, target.shape, params))
        return output.float().square().mean()

    monkeypatch.setattr(type(trainer.model), "loss", loss)
    trainer.model.train()
    trainer._step(trainer.batches[0], 0)
    assert seen == [((8, 1, 16, 16), (8, 1, 16, 16), trainer.params.loss)]


def test_gradients_are_clipped(tiny: Tiny, tmp_path: Path) -> None:
    norms = {}
    for limit in (0.0, 0.01):
        trainer = trainer_of(tiny, LocalRuntime(tmp_path / str(limit), "cpu"), clip_grad_norm=limit)
        trainer.model.train()
        trainer._step(trainer.batches[0], 0)
        gradients = [p.grad for p in trainer.trained]
        assert all(gradient is not None for gradient in gradients), "everything that is trained has a gradient"
        norms[limit] = torch.linalg.vector_norm(torch.stack([g.norm() for g in gradients if g is not None])).item()
    assert norms[0.0] > 0.02
    assert norms[0.01] == pytest.approx(0.01, rel=1e-3)


def test_the_log_counts_the_optimisers_steps(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "LOG_EVERY", 1)
    entries: list[tuple[int, dict[str, float]]] = []
    trainer = trainer_of(tiny, LocalRuntime(tmp_path, "cpu"), steps_per_epoch=3, warmup_steps=0)
    trainer.fit(lambda metrics, step: entries.append((step, metrics)))
    steps = [(step, metrics) for step, metrics in entries if "lr" in metrics]
    epochs = [(step, metrics) for step, metrics in entries if "val/mIoU" in metrics]
    assert [step for step, _ in steps] == [1, 2, 3, 4, 5, 6]
    assert [step for step, _ in epochs] == [3, 6]
    rates = [metrics["lr"] for _, metrics in steps]
    assert rates == pytest.approx([1e-3 * (1 + math.cos(math.pi * step / 6)) / 2 for step in range(6)])
    for end, (_, metrics) in zip((2, 5), epochs, strict=True):
        assert metrics["train/loss"] == pytest.approx(steps[end][1]["train/loss"], rel=1e-6), "mean over the epoch"
        assert 0 <= metrics["val/mIoU"] <= 1
        assert 0 <= metrics["val/oIoU"] <= 1


def test_bfloat16_trains(tiny: Tiny, tmp_path: Path) -> None:
    trainer = trainer_of(tiny, LocalRuntime(tmp_path, "cpu"), precision="bf16", epochs=1, steps_per_epoch=2)
    trainer.fit()
    assert all(value.isfinite().all() for value in trainer.model.state_dict().values())
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())


def test_auto_precision_is_full_on_a_cpu(tiny: Tiny, tmp_path: Path) -> None:
    for name in ("auto", "fp32"):
        trainer = trainer_of(tiny, LocalRuntime(tmp_path, "cpu"), precision=name)
        for context in (autocast(name, torch.device("cpu")), trainer.autocast):
            with context:
                assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
        assert resolved_precision(name, torch.device("cpu")) == "fp32"
        assert not trainer.scaler.is_enabled()
    with autocast("bf16", torch.device("cpu")):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16


def test_half_precision_needs_a_gpu(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="precision fp16 needs a GPU; use auto, which is fp32 on a CPU"):
        trainer_of(tiny, LocalRuntime(tmp_path, "cpu"), precision="fp16")


def test_a_diverged_run_stops_and_keeps_what_it_had(tiny: Tiny, tmp_path: Path) -> None:
    trainer = trainer_of(tiny, LocalRuntime(tmp_path, "cpu"), epochs=2)
    trainer._train_epoch(lambda metrics, step: None)
    trainer.train_loss = float("nan")
    with pytest.raises(ConfigError, match=r"diverged: the loss of epoch 1 is nan; lower train\.lr"):
        trainer._finish_epoch(lambda metrics, step: None)
    assert not (tmp_path / "checkpoint").exists()
