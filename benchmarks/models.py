"""The models that are timed, with random weights, what a matrix product reaches on the same machine, and the one model
that only a benchmark trains: an LTS that is told where to look.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import best_of
from pipelines.paths import PARAMS
from ris_core.config import load_params
from ris_core.data.dataset import ShardStore
from ris_core.data.letterbox import letterbox_mask
from ris_core.evaluation.answers import Answerer, Answers, MapAnswers
from ris_core.evaluation.metrics import Protocol
from ris_core.evaluation.queries import Query, of_images
from ris_core.models import registry
from ris_core.models.clip import Architecture, load_clip
from ris_core.models.contract import MapSystem, SystemConfig
from ris_core.models.cris import CRISConfig
from ris_core.models.losses import LossParams, segmentation_loss
from ris_core.models.lts import LTS
from ris_core.models.lts.layers import ImageFeatures
from ris_core.models.risclip import RISCLIPConfig
from ris_core.training.params import TrainParams

MATMUL_SIDE = {"cpu": 2048, "cuda": 8192}  # large enough for the full rate, small enough for a blink
MATMUL_ROUNDS = 5


@dataclass(frozen=True)
class Case:
    """A model's sizes and how it is trained; `words` a sentence, which decides the number of tokens."""

    title: str
    system: str
    architecture: Architecture
    config: SystemConfig
    image_size: int
    train: TrainParams
    words: int
    first_stage: bool = False

    def build(self, device: str) -> MapSystem:
        """The model with random weights, always the same; with `first_stage` the part that is trained before the rest."""
        torch.manual_seed(0)
        kind = registry.first_stage(self.system) if self.first_stage else registry.system_class(self.system)
        assert kind is not None
        clip = load_clip(self.architecture, image_size=self.image_size if kind.keeps_clip else None)
        model = kind(clip, self.config).to(device)
        assert isinstance(model, MapSystem)
        return model


def case(name: str) -> Case:
    """A case of `CASES` by its name."""
    if name.startswith("small"):
        return _small_case("cris" if name == "small" else "risclip")
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


def _small_case(system: str) -> Case:
    """The sizes of params.yaml; of a system with two stages the first."""
    params = load_params(PARAMS)
    section, first = params.of(system), registry.first_stage(system) is not None
    train = section.initialise if first else section.train
    assert train is not None
    title = "small RISCLIP, stage 1" if first else "small CRIS"
    architecture, size = params.clip(section.clip).architecture, params.preprocess.image_size
    return Case(title, system, architecture, section.model, size, train, words=8, first_stage=first)


CASES = ("small", "small_risclip", "r50", "risclip_b", "risclip_b_shared", "risclip_b_stage2")


def synchronise(device: str) -> Callable[[], object]:
    """What to wait for before a clock is read."""
    return torch.cuda.synchronize if device == "cuda" else lambda: None


def matmul_rate(device: str, dtype: torch.dtype, clock: Literal["cpu", "wall"]) -> float:
    """GFLOP per second of a large matrix product, by one of the clocks of a `Timing`."""
    side = MATMUL_SIDE[device]
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    timing = best_of({"matmul": lambda: a @ b}, MATMUL_ROUNDS, synchronise(device))["matmul"]
    return 2 * side**3 / (timing.cpu if clock == "cpu" else timing.wall) / 1e9


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
    locating. In evaluation it must be told `priors` (N, 1, h, w), one for each of the N expressions that it is asked about:
    `OracleAnswers` does that.
    """

    priors: torch.Tensor | None = None

    def locate(
        self, features: ImageFeatures, tokens: torch.Tensor, image_index: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits of the priors, finite."""
        assert self.priors is not None
        return self.priors.to(tokens.device).logit(eps=1e-4)

    def segment(
        self,
        features: ImageFeatures,
        tokens: torch.Tensor,
        image_index: torch.Tensor | None = None,
        prior: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As LTS, with what it was told where it is not given a prior."""
        if prior is None:
            assert self.priors is not None
            prior = self.priors.to(tokens.device)
        return super().segment(features, tokens, image_index, prior)

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


@dataclass(frozen=True)
class OracleAnswers(Answerer):
    """An oracle's answers: of each expression it is told where the true mask is. Fields as of `MapAnswers`."""

    model: OracleLTS
    word_len: int
    method: Literal["segment", "locate"] = "segment"

    def __call__(self, store: ShardStore, queries: Sequence[Query], protocol: Protocol) -> dict[int, Answers]:
        return {image: self._of_image(store, asked, protocol) for image, asked in of_images(queries).items()}

    def _of_image(self, store: ShardStore, queries: Sequence[Query], protocol: Protocol) -> Answers:
        """One by one: two that are asked with the same words need not mean the same object."""
        told = []
        for query in queries:
            self.model.priors = true_priors(self.model, store, [query])
            told.append(MapAnswers(self.model, self.word_len, self.method)(store, [query], protocol)[query.image])
        return Answers(torch.cat([each.masks for each in told]), torch.cat([each.scores for each in told]))


def true_priors(model: LTS, store: ShardStore, queries: Sequence[Query]) -> torch.Tensor:
    """What the model's prior should be for each query: (N, 1, h, w), as it is taught in training."""
    targets = [
        letterbox_mask(
            store.mask(query.image, query.ann_id), store.image_size, stride=model.stride, mode=store.resample
        )
        for query in queries
    ]
    return model.prior_target(torch.from_numpy(np.stack(targets))[:, None])
