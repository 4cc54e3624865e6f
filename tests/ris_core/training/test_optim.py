"""Schedules by hand, the published CRIS recipe with the oddity of its first epoch, and what AdamW decays."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from ris_core.config import load_params
from ris_core.models.contract import MapSystem, Role, SystemConfig
from ris_core.models.losses import LossParams
from ris_core.training.optim import learning_rate_factor, make_optimizer, set_learning_rates
from ris_core.training.params import TrainParams

ROOT = Path(__file__).parents[3]


class Stack(MapSystem[torch.Tensor, torch.Tensor]):
    """Layers one after another; the first one is the backbone, what is called `positions` its positional embedding."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(None, SystemConfig())
        self.layers = nn.Sequential(*layers)

    def role(self, name: str) -> Role:
        if name == "positions":
            return "positions"
        return "backbone" if name.startswith("layers.0.") else "head"

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        return self.layers(images)

    def segment(
        self, features: torch.Tensor, tokens: torch.Tensor, image_index: torch.Tensor | None = None
    ) -> torch.Tensor:
        return features

    def forward(
        self, images: torch.Tensor, tokens: torch.Tensor, image_index: torch.Tensor | None = None
    ) -> torch.Tensor:
        return self.encode_image(images)

    def loss(self, output: torch.Tensor, target: torch.Tensor, params: LossParams) -> torch.Tensor:
        return (output - target).square().mean()


def optimizer_of(params: TrainParams) -> torch.optim.Optimizer:
    return make_optimizer(Stack(nn.Linear(2, 2), nn.Linear(2, 2)), params)


def rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    return {group["name"]: group["lr"] for group in optimizer.param_groups}


def recipe(preset: str, folder: Path) -> TrainParams:
    """The section `train` of the repository's own parameters under a preset."""
    text = (ROOT / "params.yaml").read_text()
    assert "preset: default\n" in text
    path = folder / "params.yaml"
    path.write_text(text.replace("preset: default\n", f"preset: {preset}\n"))
    return load_params(path).train


@pytest.mark.parametrize(
    ("preset", "first"), [("cris_paper", (1e-4, 1e-4)), ("cris", (1e-5, 1e-4))], ids=["as published", "mended"]
)
def test_effective_rates_of_the_published_recipe(preset: str, first: tuple[float, float], tmp_path: Path) -> None:
    """Epoch 1, epochs 2 to 35, epochs 36 to 50, as simulated with the official code: (backbone, head)."""
    params = recipe(preset, tmp_path)
    optimizer = optimizer_of(params)
    expected = [first] + 34 * [(1e-5, 1e-4)] + 15 * [(1e-6, 1e-5)]
    assert params.epochs == len(expected)
    for epoch, (backbone, head) in enumerate(expected):
        for step in (0, 300, 661):
            returned = set_learning_rates(optimizer, params, epoch, step, 662)
            found = rates(optimizer)
            assert found["backbone"] == pytest.approx(backbone, rel=1e-12), f"epoch {epoch + 1}"
            assert found["head"] == returned == pytest.approx(head, rel=1e-12), f"epoch {epoch + 1}"


def test_multistep_is_torchs_own_stepped_after_each_epoch() -> None:
    params = TrainParams(schedule="multistep", milestones=[2, 5], gamma=0.5, lr=0.8, epochs=8)
    reference = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.8)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(reference, [2, 5], 0.5)
    for epoch in range(8):
        assert params.lr * learning_rate_factor(params, epoch, 3, 10) == pytest.approx(reference.param_groups[0]["lr"])
        reference.step()
        scheduler.step()


@pytest.mark.parametrize("power", [1.0, 0.9])
def test_poly_is_torchs_own_stepped_after_each_epoch_or_each_step(power: float) -> None:
    for each in ("epoch", "step"):
        params = TrainParams(schedule="poly", poly_power=power, poly_each=each, lr=0.8, epochs=4)
        reference = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.8)
        total = {"epoch": 4, "step": 4 * 10}[each]
        scheduler = torch.optim.lr_scheduler.PolynomialLR(reference, total, power)
        for epoch in range(4):
            for step in range(10):
                rate = params.lr * learning_rate_factor(params, epoch, step, 10)
                assert rate == pytest.approx(reference.param_groups[0]["lr"])
                reference.step()
                if each == "step" or step == 9:
                    scheduler.step()


def test_cosine_falls_from_one_to_nearly_nothing() -> None:
    params = TrainParams(schedule="cosine", epochs=4)
    factors = [learning_rate_factor(params, epoch, step, 25) for epoch in range(4) for step in range(25)]
    assert factors[0] == 1.0
    assert factors[50] == pytest.approx(0.5)
    assert factors[25] == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
    assert factors == sorted(factors, reverse=True)
    assert 0 < factors[-1] < 1e-3


@pytest.mark.parametrize("schedule", ["cosine", "multistep"])
def test_warm_up_is_linear_and_counts_steps_over_epochs(schedule: str) -> None:
    warm = TrainParams(schedule=schedule, epochs=5, warmup_steps=6, milestones=[3])
    plain = TrainParams(schedule=schedule, epochs=5, warmup_steps=0, milestones=[3])
    ratios = [
        learning_rate_factor(warm, step // 4, step % 4, 4) / learning_rate_factor(plain, step // 4, step % 4, 4)
        for step in range(20)
    ]
    assert ratios == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, *15 * [1.0]])


def test_groups_keep_their_own_rates() -> None:
    params = TrainParams(lr=1.0, backbone_lr_multiplier=0.25, epochs=2, warmup_steps=0)
    optimizer = optimizer_of(params)
    assert set_learning_rates(optimizer, params, 1, 0, 10) == pytest.approx(0.5)
    assert rates(optimizer) == pytest.approx({"backbone": 0.125, "head": 0.5})


@pytest.mark.parametrize("choice", ["head", "backbone"])
@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_positional_embeddings_go_with_the_group_that_is_named(name: str, choice: str) -> None:
    model = Stack(nn.Linear(2, 2), nn.Linear(2, 2))
    model.positions = nn.Parameter(torch.zeros(3, 2))
    params = TrainParams(optimizer=name, lr=1.0, backbone_lr_multiplier=0.25, positional_embeddings=choice)
    found = {id(p): group for group in make_optimizer(model, params).param_groups for p in group["params"]}
    assert set(found) == {id(p) for p in model.parameters()}
    place = found[id(model.positions)]
    assert (place["name"], place["lr"]) == (choice, {"head": 1.0, "backbone": 0.25}[choice])
    assert {found[id(p)]["name"] for p in model.layers[0].parameters()} == {"backbone"}
    assert {found[id(p)]["name"] for p in model.layers[1].parameters()} == {"head"}


def test_what_is_not_trained_is_in_no_group() -> None:
    model = Stack(nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 2))
    for name in ("adam", "adamw"):
        groups = make_optimizer(model, TrainParams(optimizer=name)).param_groups
        assert {group["name"] for group in groups} == {"head"}, "no group is empty"
        assert {id(p) for group in groups for p in group["params"]} == {id(p) for p in model.layers[1].parameters()}


def test_adamw_decays_matrices_and_kernels_only() -> None:
    params = TrainParams(optimizer="adamw", weight_decay=0.3)
    optimizer = make_optimizer(Stack(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.Linear(3, 2)), params)
    assert isinstance(optimizer, torch.optim.AdamW)
    decay = {p.ndim: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay == {4: 0.3, 2: 0.3, 1: 0.0}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 6
    assert {group["name"] for group in optimizer.param_groups} == {"backbone", "head"}


def test_adam_is_the_published_one() -> None:
    optimizer = optimizer_of(TrainParams(optimizer="adam", weight_decay=0.0))
    assert type(optimizer) is torch.optim.Adam
    assert [group["name"] for group in optimizer.param_groups] == ["backbone", "head"]
    assert optimizer.defaults["betas"] == (0.9, 0.999)
    assert (optimizer.defaults["eps"], optimizer.defaults["weight_decay"]) == (1e-8, 0.0)
