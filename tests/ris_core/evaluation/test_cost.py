"""Counts against hand-made modules whose cost is known; times only have to be there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_world import IMAGE_SIZE, Tiny
from torch import nn
from torch.nn import functional as F

from ris_core.errors import DataError
from ris_core.evaluation.cost import cost, device_name, matmul_rate, trained_parameters
from ris_core.models.clip import load_saved_clip
from ris_core.models.systems import build_model, export_model
from ris_core.predictor import Prediction, RISPredictor

KEYS = {
    "parameters",
    "trained_parameters",
    "gflop_image",
    "gflop_expression",
    "ms_first",
    "ms_next",
    "device",
    "gflop_per_s_matmul",
    "floor_ms_first",
}
RGB = np.zeros((6, 8, 3), np.uint8)


class Model(nn.Module):
    """A layer for images; one for texts, tied to a third that costs nothing; the latter two are trained."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text, self.tied = nn.Linear(3, 5), nn.Linear(4, 4, bias=False), nn.Linear(4, 4)
        self.tied.weight = self.text.weight

    def param_groups(
        self, lr: float, backbone_lr_multiplier: float = 0.1, pos_embed_group: str = "head"
    ) -> list[dict[str, Any]]:
        assert pos_embed_group in ("head", "backbone")
        slow = {"params": list(self.text.parameters()), "lr": lr * backbone_lr_multiplier}
        return [slow, {"params": [self.tied.weight, self.tied.bias], "lr": lr}]


class Fake:
    """Each pixel through the image layer, each letter of an expression through the text layer."""

    def __init__(self, model: nn.Module):
        self.model, self.calls = model, list[str]()

    @torch.inference_mode()
    def set_image(self, image: np.ndarray) -> None:
        self.calls.append("image")
        self.model.image(torch.from_numpy(image).float())  # type: ignore[operator]

    @torch.inference_mode()
    def predict(self, texts: Sequence[str]) -> list[Prediction]:
        self.calls += texts
        assert len(texts) == 1
        self.model.text(torch.zeros(len(texts[0]), 4))  # type: ignore[operator]
        return [Prediction(np.zeros((6, 8), bool), 0.0, np.zeros((6, 8)))]


class Attending(Fake):
    """An image is a sequence of 6 tokens for a layer that PyTorch would rather run as one fused kernel."""

    @torch.inference_mode()
    def set_image(self, image: np.ndarray) -> None:
        self.model.layer(torch.zeros(1, 6, 8))  # type: ignore[operator]


class Attention(nn.Module):
    """Scaled dot-product attention with two heads and nothing else."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        split = x.unflatten(-1, (2, 4)).transpose(1, 2)
        return F.scaled_dot_product_attention(split, split, split)


def of_layer(layer: nn.Module) -> Attending:
    model = Model()
    model.layer = layer
    return Attending(model.eval())


def test_what_is_counted_is_what_was_computed() -> None:
    found = cost(Fake(Model()), RGB, ["abc", "abcdefgh"])
    assert set(found) == KEYS
    assert found["gflop_image"] == pytest.approx(1e-9 * 2 * 6 * 8 * 3 * 5)
    assert found["gflop_expression"] == pytest.approx(1e-9 * 2 * 4 * 4 * (3 + 8) / 2)
    assert found["parameters"] == (3 * 5 + 5) + 4 * 4 + 4
    assert found["trained_parameters"] == 4 * 4 + 4


SELF_ATTENTION = 2 * 6 * 8 * (3 * 8) + 2 * (2 * 6 * 6 * 8) + 2 * 6 * 8 * 8  # projections, two products of 6x6, output


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (Attention(), 2 * (2 * 6 * 6 * 8)),
        (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), SELF_ATTENTION + 2 * (2 * 6 * 8 * 16)),
        (nn.GRU(8, 5, batch_first=True), 2 * 6 * (8 + 5) * 15),
        (nn.Conv1d(6, 7, 3), 2 * 7 * 6 * 3 * 6),
    ],
    ids=["attention", "encoder", "gru", "convolution"],
)
def test_fused_kernels_are_not_free(layer: nn.Module, expected: int) -> None:
    assert cost(of_layer(layer), RGB, ["a"], 1)["gflop_image"] == pytest.approx(1e-9 * expected)


def test_settings_of_torch_are_left_as_they_were() -> None:
    def settings() -> list[object]:
        cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
        attention = [cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled()]
        return [torch.backends.mha.get_fastpath_enabled(), cudnn.enabled, cudnn.allow_tf32, *attention]

    class Failing(Fake):
        def set_image(self, image: np.ndarray) -> None:
            raise DataError("no such image")

    before = settings()
    assert before[:2] == [True, True], "an earlier count has left its settings behind"
    cost(Fake(Model()), RGB, ["a"], 1)
    assert settings() == before
    with pytest.raises(DataError, match="no such image"):
        cost(Failing(Model()), RGB, ["a"], 1)
    assert settings() == before


def test_timing_takes_the_expressions_in_turn_after_a_warm_up() -> None:
    fake = Fake(Model())
    cost(fake, RGB, ["a", "bb", "ccc"], 2)
    counted, timed = fake.calls[:4], fake.calls[4:]
    assert counted == ["image", "a", "bb", "ccc"]
    assert timed == ["image", "a", "bb", "image", "bb", "ccc", "image", "ccc", "a"]


def test_the_best_is_of_the_repeats_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that says how long each step took: the warm-up half a second, then first answers of 5, 1 and 3 seconds."""
    steps = iter([0.5, 0.05, 5.0, 0.4, 1.0, 0.2, 3.0, 0.1] + [0.25] * 5)
    now, running = 0.0, False

    def clock() -> float:
        nonlocal now, running
        now, running = now + (next(steps) if running else 0), not running
        return now

    monkeypatch.setattr("ris_core.evaluation.cost.time.perf_counter", clock)
    monkeypatch.setattr("ris_core.evaluation.cost.MATMUL_SIDE", {"cpu": 100})
    found = cost(Fake(Model()), RGB, ["abc"], 3)
    assert (found["ms_first"], found["ms_next"]) == (pytest.approx(1000), pytest.approx(100))
    assert found["gflop_per_s_matmul"] == pytest.approx(2e6 / 0.25 / 1e9)
    assert found["floor_ms_first"] == pytest.approx(1e3 * (2 * 6 * 8 * 3 * 5 + 2 * 3 * 16) / (2e6 / 0.25))


def test_models_of_other_kinds() -> None:
    assert trained_parameters(nn.Linear(3, 4)) == 0
    bare = nn.ModuleDict({"image": nn.Identity(), "text": nn.Identity()})
    found = cost(Fake(bare), RGB, ["a"], 1)
    assert [found[name] for name in ("parameters", "gflop_image", "gflop_expression", "floor_ms_first")] == [0, 0, 0, 0]


def test_the_device_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    for threads, words in ((1, "cpu, 1 thread"), (2, "cpu, 2 threads")):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert device_name(torch.device("cpu")) == words
    assert cost(Fake(Model()), RGB, ["a"], 1)["device"] == "cpu, 2 threads"


def test_errors_are_told() -> None:
    for nothing in ((), "the red star"):
        with pytest.raises(DataError, match="cost needs a list of at least one expression to ask; got "):
            cost(Fake(Model()), RGB, nothing)
    with pytest.raises(DataError, match="best of 0 repeats: use 1 or more"):
        cost(Fake(Model()), RGB, ["a"], 0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu() -> None:
    device = torch.device("cuda", 0)
    assert device_name(device) == torch.cuda.get_device_name(0)
    assert math.isfinite(matmul_rate(device))


@pytest.mark.parametrize("system", ["cris", "risclip", "lts"])
def test_a_real_model_has_a_cost(system: str, tiny: Tiny, tmp_path: Path) -> None:
    config = getattr(tiny.params(), system).model
    clip = tiny.clip_vit if system == "risclip" else tiny.clip
    model = build_model(system, config, load_saved_clip(clip))
    export_model(tmp_path, system, model.state_dict(), config, clip, {"word_len": 12, "image_size": IMAGE_SIZE})
    found = cost(RISPredictor.from_folder(tmp_path), RGB, ["the red star", "left"], 1)
    assert set(found) == KEYS
    numbers = {name: value for name, value in found.items() if not isinstance(value, str)}
    assert set(found) - set(numbers) == {"device"}
    assert all(math.isfinite(value) and value > 0 for value in numbers.values())
    assert numbers["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert numbers["trained_parameters"] < numbers["parameters"]
