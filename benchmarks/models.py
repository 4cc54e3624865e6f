"""The models that are timed, with random weights, what a matrix product reaches on the same machine, and the one model
that only a benchmark trains: an LTS that is told where to look.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import Timing, best_of
from pipelines.paths import PARAMS
from ris_core.config import LossParams, TrainParams, load_params
from ris_core.data.letterbox import letterbox_mask
from ris_core.evaluation.answers import Answers, MapAnswers
from ris_core.models.clip import load_clip
from ris_core.models.cris import CRISConfig
from ris_core.models.lts import LTS
from ris_core.models.lts_layers import ImageFeatures
from ris_core.models.risclip import RISCLIPConfig
from ris_core.models.systems import keeps_clip, system_class
from ris_core.training.losses import segmentation_loss

if TYPE_CHECKING:
    from ris_core.data.dataset import ShardStore
    from ris_core.evaluation.metrics import Protocol
    from ris_core.evaluation.queries import Query
    from ris_core.models.clip import Architecture

MATMUL_SIZE = {"cpu": 2048, "cuda": 8192}


@dataclass(frozen=True)
class Case:
    """A model's sizes and how it is trained; `words` a sentence, which decides the number of tokens."""

    title: str
    system: str
    architecture: Architecture
    config: Any
    image_size: int
    train: TrainParams
    words: int
    first_stage: bool = False

    def build(self, device: str) -> Any:
        """The model with random weights, always the same; with `first_stage` the part that is trained before the rest."""
        torch.manual_seed(0)
        system = system_class(self.system)
        clip = load_clip(self.architecture, image_size=self.image_size if keeps_clip(self.system) else None)
        return (system.first_stage if self.first_stage else system).build(clip, self.config).to(device)


def case(name: str) -> Case:
    """A case of `CASES` by its name."""
    if name.startswith("small"):
        params = load_params(PARAMS)
        size = params.preprocess.image_size
        if name == "small":
            section, clip = params.cris, params.clip_rn
            return Case("small CRIS", "cris", clip.architecture, section.model, size, section.train, words=8)
        risclip, clip = params.risclip, params.clip_vit
        assert risclip.initialise is not None
        title, first = "small RISCLIP, stage 1", True
        return Case(title, "risclip", clip.architecture, risclip.model, size, risclip.initialise, 8, first)
    adam = TrainParams(batch_images=2, expressions_per_image=1, word_len=17, optimizer="adam", weight_decay=0.0)
    if name == "r50":
        return Case("CRIS-R50 at 416", "cris", "RN50-quickgelu", CRISConfig(), 416, adam, words=20)
    images, each = (1, 2) if name == "risclip_b_shared" else (2, 1)
    loss = LossParams(bce_weight=0.0, focal_weight=1.75, dice_weight=1.0)
    train = TrainParams(batch_images=images, expressions_per_image=each, word_len=22, weight_decay=5e-3, loss=loss)
    title = "RISCLIP-B at 640, stage 2" if name == "risclip_b_stage2" else "RISCLIP-B at 640, stage 1"
    title += ", two expressions of one image" if images == 1 else ", two images"
    first = name != "risclip_b_stage2"
    return Case(title, "risclip", "ViT-B-16-quickgelu", RISCLIPConfig(), 640, train, 20, first)


CASES = ("small", "small_risclip", "r50", "risclip_b", "risclip_b_shared", "risclip_b_stage2")


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

    Attention is computed the plain way meanwhile: the counter knows neither the fused kernel of CPUs nor the one call that
    torch makes of a whole `nn.MultiheadAttention` in evaluation, projections included.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            function()
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return counter.get_total_flops() / 1e9


class OracleLTS(LTS):
    """LTS as if it always located rightly: the prior is the true mask at the prior's size, in training and in evaluation.

    To be built with `prior` none: there is no locator to train. How much better it is than LTS is what is lost by
    locating. In evaluation it is asked through `OracleAnswers`.
    """

    def forward(self, images: torch.Tensor, tokens: torch.Tensor, image_index: torch.Tensor | None = None) -> Any:
        """What `segment` asks for: the truth is known to `loss` only, so that the rest of the pass is left to it."""
        features = self.encode_image(images)
        # float, because the loss is computed outside autocast
        return ImageFeatures(*(part.float() for part in features)), tokens, image_index

    def loss(self, output: Any, target: torch.Tensor, params: LossParams) -> torch.Tensor:
        """The mask's loss of what is segmented with the targets as prior; arguments as of LTS."""
        features, tokens, image_index = output
        mask = self.segment(features, tokens, image_index, self.prior_target(target))
        return segmentation_loss(mask, target, params)


class Told(nn.Module):
    """An LTS and a prior (N, 1, h, w) for each of the N expressions it will be asked."""

    def __init__(self, model: LTS, priors: torch.Tensor) -> None:
        super().__init__()
        self.model, self.priors, self.stride = model, priors, model.stride

    def encode_image(self, images: torch.Tensor) -> ImageFeatures:
        return self.model.encode_image(images)

    def locate(self, features: ImageFeatures, tokens: torch.Tensor, image_index: torch.Tensor) -> torch.Tensor:
        """Logits of the priors, finite."""
        return self.priors.to(tokens.device).logit(eps=1e-4)

    def segment(self, features: ImageFeatures, tokens: torch.Tensor, image_index: torch.Tensor) -> torch.Tensor:
        """As LTS, with these priors."""
        return self.model.segment(features, tokens, image_index, self.priors.to(tokens.device))


@dataclass(frozen=True)
class OracleAnswers:
    """An oracle's answers: of each expression it is told where the true mask is. Fields as of `MapAnswers`."""

    model: OracleLTS
    word_len: int
    method: Literal["segment", "locate"] = "segment"

    def __call__(self, store: ShardStore, queries: Sequence[Query], protocol: Protocol) -> dict[int, Answers]:
        told = Told(self.model, true_priors(self.model, store, queries))
        return MapAnswers(told, self.word_len, self.method)(store, queries, protocol)


def true_priors(model: LTS, store: ShardStore, queries: Sequence[Query]) -> torch.Tensor:
    """What the model's prior should be for each query: (N, 1, h, w), as it is taught in training."""
    targets = [
        letterbox_mask(
            store.mask(query.image, query.ann_id), store.image_size, stride=model.stride, mode=store.resample
        )
        for query in queries
    ]
    return model.prior_target(torch.from_numpy(np.stack(targets))[:, None])
