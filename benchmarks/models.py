"""The models that are timed, with random weights, and what a matrix product reaches on the same machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import Timing, best_of
from pipelines.paths import PARAMS
from ris_core.config import TrainParams, load_params
from ris_core.models.clip import build_clip
from ris_core.models.cris import CRIS, CRISConfig

if TYPE_CHECKING:
    from ris_core.models.clip import Architecture

MATMUL_SIZE = {"cpu": 2048, "cuda": 8192}


@dataclass(frozen=True)
class Case:
    """A model's sizes and how it is trained; `words` a sentence, which decides the number of tokens."""

    architecture: Architecture
    config: CRISConfig
    image_size: int
    train: TrainParams
    words: int

    def build(self, device: str) -> CRIS:
        """The model with random weights, always the same."""
        torch.manual_seed(0)
        return CRIS.build(build_clip(self.architecture), self.config).to(device)


def case(name: str) -> Case:
    """`small`, the embedded default of params.yaml, or `r50`: the published CRIS-R50 at 416, two samples of 17 tokens."""
    if name == "small":
        params = load_params(PARAMS)
        return Case(params.clip.architecture, params.cris, params.preprocess.image_size, params.train, words=8)
    recipe = TrainParams(
        batch_images=2, expressions_per_image=1, word_len=17, optimizer="adam", lr=1e-4, weight_decay=0.0
    )
    return Case("RN50-quickgelu", CRISConfig(), 416, recipe, words=20)


def synchronise(device: str) -> Callable[[], object]:
    """What to wait for before a clock is read."""
    return torch.cuda.synchronize if device == "cuda" else lambda: None


def seconds(timing: Timing, device: str) -> float:
    """CPU seconds on CPUs, which other programs disturb little; wall seconds on a GPU."""
    return timing.wall if device == "cuda" else timing.cpu


def matmul_rate(device: str) -> float:
    """GFLOP per second of a large matrix product: CPU seconds, float32, or on a GPU wall seconds, bfloat16."""
    size, dtype = MATMUL_SIZE[device], torch.bfloat16 if device == "cuda" else torch.float32
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    timing = best_of({"matmul": lambda: a @ b}, 6, synchronise(device))["matmul"]
    return 2 * size**3 / seconds(timing, device) / 1e9


def gflop(function: Callable[[], object]) -> float:
    """GFLOP (2 per multiply-add) of the convolutions and matrix products of a call, backward passes included.

    Attention is computed the plain way meanwhile: the counter does not know the fused kernel of CPUs.
    """
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        function()
    return counter.get_total_flops() / 1e9
