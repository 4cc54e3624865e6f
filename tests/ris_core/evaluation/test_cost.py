"""Counts against hand-made modules whose cost is known."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_world import IMAGE_SIZE, Tiny
from torch import nn
from torch.nn import functional as F

from ris_core.errors import DataError
from ris_core.evaluation.cost import cost, trained_parameters
from ris_core.models.clip import load_saved_clip
from ris_core.models.contract import MapSystem, Role, SystemConfig
from ris_core.models.losses import LossParams
from ris_core.models.registry import ModelInfo, build_model, export_model
from ris_core.predictor import Prediction, RISPredictor

KEYS = {"parameters", "trained_parameters", "gflop_image", "gflop_expression"}
RGB = np.zeros((6, 8, 3), np.uint8)


class Model(MapSystem[torch.Tensor, torch.Tensor]):
    """A layer for images; one for texts, tied to a third that costs nothing; the latter two are trained."""

    def __init__(self) -> None:
        super().__init__(None, SystemConfig())
        self.image, self.text, self.tied = nn.Linear(3, 5), nn.Linear(4, 4, bias=False), nn.Linear(4, 4)
        self.tied.weight = self.text.weight
        self.image.requires_grad_(False)

    def trained(self) -> Iterator[tuple[Role, nn.Parameter]]:
        """The shared tensor twice."""
        yield from (("backbone", parameter) for parameter in self.text.parameters())
        yield from (("head", parameter) for parameter in self.tied.parameters())

    def role(self, name: str) -> Role:
        raise NotImplementedError

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def segment(
        self, features: torch.Tensor, tokens: torch.Tensor, image_index: torch.Tensor | None = None
    ) -> torch.Tensor:
        raise NotImplementedError

    def forward(
        self, images: torch.Tensor, tokens: torch.Tensor, image_index: torch.Tensor | None = None
    ) -> torch.Tensor:
        raise NotImplementedError

    def loss(self, output: torch.Tensor, target: torch.Tensor, params: LossParams) -> torch.Tensor:
        raise NotImplementedError


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
    assert cost(of_layer(layer), RGB, ["a"])["gflop_image"] == pytest.approx(1e-9 * expected)


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
    cost(Fake(Model()), RGB, ["a"])
    assert settings() == before
    with pytest.raises(DataError, match="no such image"):
        cost(Failing(Model()), RGB, ["a"])
    assert settings() == before


def test_models_of_other_kinds() -> None:
    assert trained_parameters(nn.Linear(3, 4)) == 0
    bare = nn.ModuleDict({"image": nn.Identity(), "text": nn.Identity()})
    found = cost(Fake(bare), RGB, ["a"])
    assert found == dict.fromkeys(KEYS, 0)


def test_errors_are_told() -> None:
    for nothing in ((), "the red star"):
        with pytest.raises(DataError, match="cost needs a list of at least one expression to ask; got "):
            cost(Fake(Model()), RGB, nothing)


@pytest.mark.parametrize("system", ["cris", "risclip", "lts"])
def test_a_real_model_has_a_cost(system: str, tiny: Tiny, tmp_path: Path) -> None:
    config = tiny.params().of(system).model
    clip = tiny.clip_vit if system == "risclip" else tiny.clip
    model = build_model(system, config, load_saved_clip(clip))
    export_model(tmp_path, system, model.state_dict(), config, clip, ModelInfo(IMAGE_SIZE, word_len=12))
    found = cost(RISPredictor.from_folder(tmp_path), RGB, ["the red star", "left"])
    assert set(found) == KEYS
    assert all(math.isfinite(value) and value > 0 for value in found.values())
    assert found["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert found["trained_parameters"] < found["parameters"]
