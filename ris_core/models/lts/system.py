"""LTS, "locate then segment": a re-implementation of the pipeline that first says where, then which pixels.

Jing et al., CVPR 2021, arXiv 2103.16284. There is neither official code nor another re-implementation, and much of the
paper's detail could not be recovered: results are those of "LTS (re-implementation)"; with a CLIP tower or a stronger
backbone, of "LTS (modernised)". An image is encoded once for all its expressions:

    features = model.encode_image(normalise(images))           # text-independent
    prior = model.locate(features, tokens, image_index)        # (N, 1, H/8, W/8): where
    logits = model.segment(features, tokens, image_index)      # (N, 1, H/4, W/4): which pixels
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from ris_core.data.text import END_ID
from ris_core.errors import ConfigError, list_problems
from ris_core.models.contract import MapSystem, Role, SystemConfig
from ris_core.models.losses import LossParams, segmentation_loss
from ris_core.models.lts.encoders import ClipBackbone, ClipSentence, GruSentence, TimmBackbone
from ris_core.models.lts.layers import Fusion, ImageFeatures, Segmenter
from ris_core.models.lts.prior import (
    RelevanceFilter,
    TransformerLocator,
    gaussian_target,
    mask_target,
    penalty_reduced_focal_loss,
)

if TYPE_CHECKING:
    from open_clip.model import CLIP

NOTICE = (
    "Patent notice. The authors of LTS hold a patent family on the method (Beijing Youzhuju Network Technology; "
    "CN 202011197790.9, WO 2022/089115 A1, US 12,608,813 B2, JP 2023-547917 A). Its abstract describes fusing visual and "
    "text features, recording the target's region as a response heat map, and segmenting from the fused features and that "
    "heat map, which is what this model does. Seek legal advice before any commercial use; the licence of this code grants "
    "no right under that patent. This is an independent re-implementation: no code of the authors exists or was used."
)
Output = tuple[torch.Tensor, torch.Tensor | None]

_OF_CLIP = ("clip", "clip_words")  # what a CLIP's text tower gives
_CHOICES = {
    "text": ("gru", *_OF_CLIP),
    "word_vectors": ("learned", "clip"),
    "pooling": ("mean", "attention", "last"),
    "coordinates": ("box", "xy", "none"),
    "prior": ("filtering", "transformer", "none"),
    "prior_stride": (8, 16),
    "filter_size": (1, 3),
    "prior_target": ("mask", "gaussian"),
    "head": ("aspp", "plain"),
}
_SIZES = (
    "embedding_dim", "gru_dim", "fusion_dim", "dim", "locator_dim", "locator_layers", "locator_heads",
    "locator_ffn_dim", "head_dim",
)  # fmt: skip


@dataclass(frozen=True)
class LTSConfig(SystemConfig):
    """Options and dimensions of LTS.

    Evidence marks: [stated] by the abstract, a figure caption or a survey; [patent] by the authors' patent family;
    [parent] read in the code of MCN, whose set-up LTS appears to follow; [unconfirmed] remembered, no source at hand;
    [chosen] by us, nothing known.
    """

    backbone: str = "darknet53"  # [unconfirmed] a timm model by name; or "clip": the visual tower of a ResNet CLIP
    pretrained: bool = False  # [chosen] the timm model's own weights, fetched or found in the cache
    text: str = (
        "gru"  # [stated] bidirectional GRU; or CLIP's text tower: "clip", its state; "clip_words", words beside it
    )
    word_vectors: str = (
        "learned"  # [chosen] of the GRU; or "clip": the CLIP's table (MCN: GloVe). Ids are CLIP's in both
    )
    embedding_dim: int = 300  # [parent] of learned word vectors
    freeze_token_embedding: bool = False  # [chosen] only for a table that comes from a CLIP
    freeze_clip_text: bool = False  # [chosen] the whole text tower
    gru_dim: int = 512  # [chosen] per direction
    pooling: str = "mean"  # [chosen] of the GRU's states over the words; or "attention" [parent], "last"
    fusion_dim: int = 1024  # [parent] of the product of image and sentence at 1/32
    dim: int = 512  # [parent] of the cross-modal map at 1/8; its laterals have dim and dim / 2
    coordinates: str = "box"  # [unconfirmed] 8 channels; or "xy", "none"
    prior: str = "filtering"  # [stated] both names; or "transformer"; "none" is the ablation
    prior_stride: int = 8  # [chosen] or 16, where the map is averaged over 2x2 cells and the prior repeated
    filter_size: int = 1  # [chosen] kernel that the sentence becomes; or 3
    locator_dim: int = 256  # [chosen] the transformer's width, layers, heads and feed-forward width
    locator_layers: int = 2
    locator_heads: int = 8
    locator_ffn_dim: int = 1024
    prior_target: str = "mask"  # [chosen] heat map: [patent], its target: unknown; or "gaussian" at the centroid
    gaussian_sigma: float = 0.25  # [chosen] in units of the root of the object's area
    prior_weight: float = 1.0  # [chosen] of the prior's loss beside the mask's; joint training is [unconfirmed]
    detach_prior: bool = False  # [chosen] keep the mask's loss from training the locator
    head: str = "aspp"  # [stated] "light convolutions"; [parent] ASPP; or "plain": two 3x3 convolutions
    head_dim: int = 256  # [parent]
    aspp_rates: tuple[int, ...] = (6, 12, 18)  # [parent]

    def __post_init__(self) -> None:
        object.__setattr__(self, "aspp_rates", tuple(self.aspp_rates))  # JSON and YAML bring a list
        problems = [
            f"{name} is {getattr(self, name)!r}: use {' or '.join(map(str, choices))}"
            for name, choices in _CHOICES.items()
            if getattr(self, name) not in choices
        ]
        problems += [f"{name} is {getattr(self, name)}: use 1 or more" for name in _SIZES if getattr(self, name) < 1]
        from_clip = self.text in _OF_CLIP or self.word_vectors == "clip"
        heads, width = self.locator_heads, self.locator_dim
        checks = {
            "backbone is empty: use clip or the name of a timm model": bool(self.backbone),
            "pretrained is true, but backbone is clip: its weights are those of the CLIP it is given": not (
                self.pretrained and self.backbone == "clip"
            ),
            "word_vectors is clip, but so is text: word_vectors belongs to text gru": not (
                self.text in _OF_CLIP and self.word_vectors == "clip"
            ),
            "freeze_token_embedding is true, but the word vectors are learned: set word_vectors or text to clip": (
                from_clip or not self.freeze_token_embedding
            ),
            "freeze_clip_text is true, but text is not clip": self.text in _OF_CLIP or not self.freeze_clip_text,
            f"dim is {self.dim}: use an even number": self.dim % 2 == 0,
            f"locator_dim is {width}: use a multiple of 4 (2D sine positions)": width % 4 == 0,
            f"locator_heads is {heads}: it must divide locator_dim {width}": heads < 1 or width % heads == 0,
            f"gaussian_sigma is {self.gaussian_sigma}: use more than 0": self.gaussian_sigma > 0,
            f"prior_weight is {self.prior_weight}: use 0 or more": self.prior_weight >= 0,
            f"aspp_rates is {self.aspp_rates}: use one or more positive rates": min(self.aspp_rates, default=0) > 0,
        }
        problems += [problem for problem, fine in checks.items() if not fine]
        if problems:
            raise ConfigError(list_problems("The configuration of LTS is wrong", problems))

    def saved(self) -> LTSConfig:
        """Give the options without weights of timm's own to fetch."""
        return replace(self, pretrained=False)


class LTS(MapSystem[ImageFeatures, Output]):
    """Backbone, sentence encoder, fusion, locator and segmenter.

    Takes over the towers of the CLIP it is given; what it does not call is frozen or left behind. In training, batch norm
    needs two expressions per process: the sentence projection and ASPP's pooled branch have one value per expression.

    Raises:
        ConfigError: a CLIP is needed and missing or not a ResNet one, or timm has no such backbone.
        WeightsError: the backbone's pretrained weights cannot be found.
    """

    config_class = LTSConfig
    stride = 4
    notice = NOTICE

    config: LTSConfig

    def __init__(self, clip: CLIP | None, config: LTSConfig) -> None:
        super().__init__(clip, config)
        self.locates = config.prior != "none"
        uses = [name for name in ("backbone", "text", "word_vectors") if getattr(config, name) in _OF_CLIP]
        if uses and clip is None:
            raise ConfigError(f"LTS with {' and '.join(uses)} = clip needs a CLIP, got none")
        self.config = config
        self.backbone = (
            ClipBackbone(clip) if config.backbone == "clip" else TimmBackbone(config.backbone, config.pretrained)
        )
        self.text = _sentence_encoder(clip, config)
        self.context_length = self.text.context_length
        if config.freeze_clip_text:
            self.text.requires_grad_(False)
        if config.freeze_token_embedding:
            self.text.token_embedding.requires_grad_(False)
        self.fusion = Fusion(self.backbone.channels, self.text.dim, config.fusion_dim, config.dim, config.coordinates)
        self.locator = _locator(self.text.dim, config)
        self.segmenter = Segmenter(config.dim + 1, config.head_dim, config.head, config.aspp_rates)

    def encode_image(self, images: torch.Tensor) -> ImageFeatures:
        """Encode images (B, 3, H, W) normalised as for CLIP, sides multiples of 32 -> everything that needs no text."""
        if images.shape[-2] % 32 or images.shape[-1] % 32:
            raise ConfigError(f"LTS reads images whose sides are multiples of 32, got {tuple(images.shape[-2:])}")
        return self.fusion.project_image(self.backbone(images))

    def locate(
        self, features: ImageFeatures, tokens: torch.Tensor, image_index: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Give logits of the position prior, (N, 1, H/8, W/8) or, with prior_stride 16, (N, 1, H/16, W/16).

        Arguments as in `segment`. Raises ConfigError for the ablation without a prior.
        """
        logits = self._locate(*self._fuse(features, tokens, image_index))
        if logits is None:
            raise ConfigError("this LTS was built with prior = none: it locates nothing")
        return logits

    def segment(
        self,
        features: ImageFeatures,
        tokens: torch.Tensor,
        image_index: torch.Tensor | None = None,
        prior: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Give mask logits (N, 1, H/4, W/4) of expressions, tokens (N, L) int64 that end at their largest id.

        `image_index` (N,) int64 says which image each expression belongs to; None means one expression per image, in
        order. `prior`, probabilities of `locate`'s shape, takes the place of the model's own: with the `prior_target` of
        the true masks, the upper bound "the location is known". Raises ConfigError for a prior of another shape.
        """
        sentence, middle, fused = self._fuse(features, tokens, image_index)
        if prior is None:
            logits = self._locate(sentence, middle, fused)
            prior = None if logits is None else logits.sigmoid()
        return self._segment(fused, prior)

    def forward(self, images: torch.Tensor, tokens: torch.Tensor, image_index: torch.Tensor | None = None) -> Output:
        """Give mask logits of `segment` and prior logits of `locate` (None in the ablation without a prior).

        In training, the batch norms of the image part see each image once, however many expressions it has.
        """
        sentence, middle, fused = self._fuse(self.encode_image(images), tokens, image_index)
        logits = self._locate(sentence, middle, fused)
        prior = None if logits is None else logits.sigmoid()
        if prior is not None and self.config.detach_prior:
            prior = prior.detach()
        return self._segment(fused, prior), logits

    def loss(self, output: Output, target: torch.Tensor, params: LossParams) -> torch.Tensor:
        """Give the mask loss plus `prior_weight` times the prior's, for what `forward` returned. Scalar, fp32.

        target (N, 1, H/4, W/4) uint8 0..255 or float 0..1, the masks. The prior learns by mean BCE from the covered share
        of its cells, or by the penalty-reduced focal loss from a Gaussian.
        """
        mask, prior = output
        loss = segmentation_loss(mask, target, params)
        if prior is None:
            return loss
        centred = self.config.prior_target == "gaussian"
        located = penalty_reduced_focal_loss if centred else F.binary_cross_entropy_with_logits
        return loss + self.config.prior_weight * located(prior.float(), self.prior_target(target))

    def prior_target(self, target: torch.Tensor) -> torch.Tensor:
        """Tell what the prior should be for masks at 1/4, (N, 1, H/4, W/4) as in `loss`: probabilities of `locate`'s shape."""
        covered = mask_target(target, self.config.prior_stride // self.stride)
        if self.config.prior_target == "gaussian":
            return gaussian_target(covered, self.config.gaussian_sigma)
        return covered

    def role(self, name: str) -> Role:
        """Call the backbone the backbone, and a CLIP's text tower too; positions are that tower's."""
        if name.startswith("text.") and self.config.text in _OF_CLIP:
            return "positions" if name == "text.positional_embedding" else "backbone"
        return "backbone" if name.startswith("backbone.") else "head"

    def _fuse(
        self, features: ImageFeatures, tokens: torch.Tensor, image_index: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Give sentences (N, D), the cross-modal maps at 1/16 and 1/8."""
        sentence = self.text(tokens)
        fused, middle = self.fusion(features if image_index is None else features.of(image_index), sentence)
        return sentence, middle, fused

    def _locate(self, sentence: torch.Tensor, middle: torch.Tensor, fused: torch.Tensor) -> torch.Tensor | None:
        if self.locator is None:
            return None
        return self.locator(sentence, middle, fused if self.config.prior_stride == 8 else F.avg_pool2d(fused, 2))

    def _segment(self, fused: torch.Tensor, prior: torch.Tensor | None) -> torch.Tensor:
        count, _, height, width = fused.shape
        factor = self.config.prior_stride // 8
        if prior is None:
            return self.segmenter(fused, fused.new_zeros(count, 1, height, width))
        if prior.shape != (expected := (count, 1, height // factor, width // factor)):
            raise ConfigError(f"the prior given to segment is {tuple(prior.shape)}, here it must be {expected}")
        return self.segmenter(fused, F.interpolate(prior, scale_factor=float(factor)) if factor > 1 else prior)


def _sentence_encoder(clip: Any, config: LTSConfig) -> ClipSentence | GruSentence:
    if config.text in _OF_CLIP:
        return ClipSentence(clip, with_words=config.text == "clip_words")
    learned = config.word_vectors == "learned"
    table = nn.Embedding(END_ID + 1, config.embedding_dim, padding_idx=0) if learned else clip.token_embedding
    return GruSentence(table, config.gru_dim, config.pooling)


def _locator(sentence_dim: int, config: LTSConfig) -> RelevanceFilter | TransformerLocator | None:
    if config.prior == "none":
        return None
    if config.prior == "filtering":
        return RelevanceFilter(sentence_dim, config.dim, config.filter_size)
    return TransformerLocator(
        sentence_dim, config.dim, config.filter_size, config.locator_dim, config.locator_layers, config.locator_heads,
        config.locator_ffn_dim,
    )  # fmt: skip
