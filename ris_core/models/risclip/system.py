"""RISCLIP: referring image segmentation on a frozen CLIP, in two stages, a locator and a decoder.

Kim et al., "Extending CLIP's Image-Text Alignment to Referring Image Segmentation", NAACL 2024, arXiv 2306.08498. There
is no official code: this is a reconstruction, marked with its evidence as explained in `RISCLIPConfig`. The CLIP is an
unmodified open_clip model with a ViT; its weights are neither trained, nor copied, nor part of any state dict.

    features = model.encode_image(normalise(images))           # once per image
    where = model.locate(features, tokens, image_index)        # patch logits (N, 1, g, g)
    logits = model.segment(features, tokens, image_index)      # pixel logits (N, 1, S/stride, S/stride)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from ris_core.errors import ConfigError, list_problems
from ris_core.models.contract import MapSystem, Role, SystemConfig
from ris_core.models.losses import LossParams, segmentation_loss
from ris_core.models.risclip.frozen_clip import FrozenClip
from ris_core.models.risclip.layers import CFE, NORM_GROUPS, SKE, BlockAdapters, Decoder, resize
from ris_core.weights import load_strictly

if TYPE_CHECKING:
    from open_clip.model import CLIP

MAX_LOGIT_SCALE = 100.0  # as in CLIP


@dataclass(frozen=True)
class RISCLIPConfig(SystemConfig):
    """Options and dimensions of RISCLIP that its CLIP does not decide.

    Evidence marks: [F1] read off figures of the paper's version 1; [S+] reported as the paper's by a student
    re-implementation; [S] found in that re-implementation; [R] chosen by us, the paper's own is not recoverable.
    """

    cfe_layers: int = 6  # [S] the last ones of both towers; 0 is the ablation without CFE
    cfe_dim: int = 512  # [S] shared width of image and text in a CFE
    cfe_heads: int = 8  # [S]
    adapters: str = "late"  # [R] where the CFE is; or "v1_full" [S]: every block of both towers; "none" is an ablation
    adapter_dim: int = 64  # [R] AdaptFormer's, whose initialisation this is
    ske_blocks: int = 6  # [S+]; 0 is the ablation without SKE
    ske_heads: int = 8  # [S]; [R] 12 for ViT-L, whose shared space is 768 wide
    ske_mlp_ratio: float = 4.0  # [R]
    dense: str = "tokens"  # [F1] CLIP's own last layer; or "value" [R]: its attention copies values, as in MaskCLIP
    logit_scale_init: float = 2.66  # [R] ln(1/0.07); patch logits are exp(scale) * cosine + bias, both trained
    logit_bias_init: float = -5.0  # [R] patches are background until the cosine says otherwise
    decoder_channels: tuple[int, ...] = (256, 128, 64, 32)  # [R] one stage, which doubles the size, per entry
    skip_layers: tuple[int, ...] = (3, 6, 9, 12)  # [R] image blocks, from 1, the decoder reads, the deepest first
    joint: bool = (
        False  # [R] True: the second stage goes on training the locator, as backbone; False [S]: the decoder alone
    )

    def __post_init__(self) -> None:
        for name in ("decoder_channels", "skip_layers"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # JSON and YAML bring lists
        at_least = {"cfe_layers": 0, "cfe_dim": 1, "cfe_heads": 1, "adapter_dim": 1, "ske_blocks": 0, "ske_heads": 1}
        problems = [
            f"{name} is {getattr(self, name)}: use {minimum} or more"
            for name, minimum in at_least.items()
            if getattr(self, name) < minimum
        ]
        channels, skips, heads = self.decoder_channels, self.skip_layers, self.cfe_heads
        choices = {"adapters": ("late", "v1_full", "none"), "dense": ("tokens", "value")}
        problems += [
            f"{name} is {getattr(self, name)!r}: use {' or '.join(allowed)}"
            for name, allowed in choices.items()
            if getattr(self, name) not in allowed
        ]
        checks = {
            f"cfe_heads is {heads}: it must divide cfe_dim {self.cfe_dim}": heads < 1 or self.cfe_dim % heads == 0,
            f"ske_mlp_ratio is {self.ske_mlp_ratio}: use more than 0": self.ske_mlp_ratio > 0,
            f"logit_scale_init is {self.logit_scale_init}: its exponential is capped at {MAX_LOGIT_SCALE:g}, use less "
            f"than {math.log(MAX_LOGIT_SCALE):.2f}": self.logit_scale_init < math.log(MAX_LOGIT_SCALE),
            f"decoder_channels is {channels}: use one or more positive multiples of {NORM_GROUPS}": (
                len(channels) > 0 and all(width > 0 and width % NORM_GROUPS == 0 for width in channels)
            ),
            f"skip_layers is {skips}: use as many layers as decoder_channels has stages, {len(channels)}": (
                len(skips) == len(channels)
            ),
            f"skip_layers is {skips}: use layers from 1 on, in ascending order": (
                min(skips, default=1) >= 1 and skips == tuple(sorted(set(skips)))
            ),
        }
        problems += [problem for problem, fine in checks.items() if not fine]
        if problems:
            raise ConfigError(list_problems("The configuration of RISCLIP is wrong", problems))


@dataclass(frozen=True)
class ImageFeatures:
    """What RISCLIP knows of an image before it hears an expression (T = 1 + g*g tokens, the class token first)."""

    tokens: torch.Tensor  # (B, T, C) after the last layer that needs no text
    skips: tuple[torch.Tensor, ...]  # (B, T, C) each: those of the config's skip layers that lie before

    def of(self, image_index: torch.Tensor) -> ImageFeatures:
        """Give the features of image `image_index[n]` for every expression n: int64 (N,)."""
        return ImageFeatures(self.tokens[image_index], tuple(skip[image_index] for skip in self.skips))


class RISCLIPLocator(MapSystem[ImageFeatures, torch.Tensor]):
    """The first stage: a frozen CLIP with adapters and CFE between its towers, SKE, and the patch-level map.

    The map is the cosine of every patch token to the end mark's token [F1], scaled and shifted to logits [R]. At the
    start that is CLIP's own. Layers that no text reaches are computed once per image, those of them that nothing trained
    reaches without autograd.

    Raises:
        ConfigError: see `FrozenClip`.
    """

    config_class = RISCLIPConfig
    keeps_clip = True
    config: RISCLIPConfig

    def __init__(self, clip: CLIP, config: RISCLIPConfig) -> None:
        super().__init__(clip, config)
        if problems := _misfits(clip, config):
            raise ConfigError(list_problems("RISCLIP cannot stand on this CLIP", problems))
        self.config = config
        self.clip = frozen = FrozenClip(clip, value_only=config.dense == "value")
        self.stride = output_stride(frozen.patch_size, len(config.decoder_channels))
        self.context_length = int(clip.context_length)
        adapted = {"late": config.cfe_layers, "none": 0}  # the last blocks of a tower; with v1_full, all of them
        image_blocks = adapted.get(config.adapters, frozen.image_depth)
        text_blocks = adapted.get(config.adapters, frozen.text_depth)
        self.image_adapters = _adapters(image_blocks, frozen.image_dim, config.adapter_dim)
        self.text_adapters = _adapters(text_blocks, frozen.text_dim, config.adapter_dim)
        self.cfe = nn.ModuleList(
            CFE(frozen.image_dim, frozen.text_dim, config.cfe_dim, config.cfe_heads) for _ in range(config.cfe_layers)
        )
        self.ske = nn.ModuleList(
            SKE(frozen.shared_dim, config.ske_heads, config.ske_mlp_ratio) for _ in range(config.ske_blocks)
        )
        self.logit_scale = nn.Parameter(torch.tensor(config.logit_scale_init))
        self.logit_bias = nn.Parameter(torch.tensor(config.logit_bias_init))

    def encode_image(self, images: torch.Tensor) -> ImageFeatures:
        """Encode normalised images (B, 3, S, S), S the CLIP's own size (else ConfigError) -> everything that needs no text."""
        skips: list[torch.Tensor] = []
        trained = max(self.config.cfe_layers, len(self.image_adapters))
        with torch.no_grad():
            x = self.clip.embed_image(images)
            for layer in range(-self.clip.image_depth, -trained):
                x = self._image_layer(layer, x, skips)
        for layer in range(-trained, -self.config.cfe_layers):
            x = self._image_layer(layer, x, skips)
        return ImageFeatures(x, tuple(skips))

    def locate(
        self, features: ImageFeatures, tokens: torch.Tensor, image_index: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Give patch logits (N, 1, g, g), at least float32, of expressions, tokens (N, L) int64 that end at their largest id.

        `image_index` (N,) int64 says which image each expression belongs to; None means one expression per image, in
        order. Any L up to the CLIP's context length does (else ConfigError); what follows the end mark changes nothing.
        """
        return self.locate_with_skips(features, tokens, image_index)[0]

    def locate_with_skips(
        self, features: ImageFeatures, tokens: torch.Tensor, image_index: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Do `locate`, and give the image tokens (N, T, C) after each of the config's skip layers, shallow to deep."""
        if image_index is not None:
            features = features.of(image_index)
        image, skips = features.tokens, list(features.skips)
        end = tokens.argmax(dim=-1)
        keep = torch.arange(tokens.shape[1], device=tokens.device) <= end[:, None]
        text = self._read(tokens)
        for layer in range(-self.config.cfe_layers, 0):
            image, text = self.cfe[layer](image, text, keep)
            image = self._image_layer(layer, image, skips)
            text = self.clip.text_block(layer, text, _of_layer(self.text_adapters, layer))
        image, text = self.clip.to_shared_space(image, text)
        for block in self.ske:
            image, text = block(image, text, keep)
        sentence = text[torch.arange(len(end), device=end.device), end]
        return self._patch_logits(image[:, 1:], sentence), tuple(skips)

    def segment(
        self, features: ImageFeatures, tokens: torch.Tensor, image_index: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Give the patch logits upsampled to (N, 1, S/stride, S/stride): a mask before there is a decoder."""
        return resize(self.locate(features, tokens, image_index), self.clip.image_size // self.stride)

    def forward(
        self, images: torch.Tensor, tokens: torch.Tensor, image_index: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Run `locate` after `encode_image`: patch logits (N, 1, g, g)."""
        return self.locate(self.encode_image(images), tokens, image_index)

    def loss(self, output: torch.Tensor, target: torch.Tensor, params: LossParams) -> torch.Tensor:
        """Give the loss of patch logits that `forward` gave; targets (N, 1, S/stride, S/stride) uint8 0..255 or float 0..1."""
        return segmentation_loss(output, patch_target(target, output.shape[-1]), params)

    def role(self, name: str) -> Role:
        """Call all that is trained new."""
        return "head"

    def _read(self, tokens: torch.Tensor) -> torch.Tensor:
        """Give text (N, L, C) after the last layer that no image reaches."""
        trained = max(self.config.cfe_layers, len(self.text_adapters))
        with torch.no_grad():
            x = self.clip.embed_text(tokens)
            for layer in range(-self.clip.text_depth, -trained):
                x = self.clip.text_block(layer, x, None)
        for layer in range(-trained, -self.config.cfe_layers):
            x = self.clip.text_block(layer, x, _of_layer(self.text_adapters, layer))
        return x

    def _image_layer(self, layer: int, x: torch.Tensor, skips: list[torch.Tensor]) -> torch.Tensor:
        x = self.clip.image_block(layer, x, _of_layer(self.image_adapters, layer))
        if self.clip.image_depth + layer + 1 in self.config.skip_layers:
            skips.append(x)
        return x

    def _patch_logits(self, patches: torch.Tensor, sentence: torch.Tensor) -> torch.Tensor:
        """Take patches (N, g*g, E) and sentences (N, E) -> logits (N, 1, g, g), not in half precision even under autocast."""
        grid = self.clip.image_size // self.clip.patch_size
        cosine = F.cosine_similarity(patches.float(), sentence.float()[:, None], dim=-1).view(-1, 1, grid, grid)
        return self.logit_scale.exp().clamp(max=MAX_LOGIT_SCALE) * cosine + self.logit_bias


class RISCLIP(MapSystem[ImageFeatures, torch.Tensor]):
    """Both stages: a locator, and a decoder that refines its patch logits to pixel logits.

    Unless `config.joint`, only the decoder is trained [S]: the locator has no gradients and stays in evaluation mode.

    Raises:
        ConfigError: see `FrozenClip`.
    """

    config_class = RISCLIPConfig
    first_stage = RISCLIPLocator
    keeps_clip = True
    locates = True
    config: RISCLIPConfig

    def __init__(self, clip: CLIP, config: RISCLIPConfig) -> None:
        super().__init__(clip, config)
        self.config = config
        self.locator = RISCLIPLocator(clip, config)
        self.stride, size = self.locator.stride, self.locator.clip.image_size
        self.context_length = self.locator.context_length
        self.decoder = Decoder(self.locator.clip.image_dim, config.decoder_channels, size // self.stride)
        if not config.joint:
            self.locator.requires_grad_(False)
        self.train()

    def adopt(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take over the weights of a trained `RISCLIPLocator`. Raises WeightsError unless its state dict fits."""
        load_strictly(self.locator, state, "The first stage does not fit this RISCLIP")

    def train(self, mode: bool = True) -> RISCLIP:
        super().train(mode)
        self.locator.train(mode and self.config.joint)
        return self

    def encode_image(self, images: torch.Tensor) -> ImageFeatures:
        """See `RISCLIPLocator.encode_image`."""
        with self._locator_mode():
            return self.locator.encode_image(images)

    def locate(
        self, features: ImageFeatures, tokens: torch.Tensor, image_index: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Give patch logits (N, 1, g, g). See `RISCLIPLocator.locate`."""
        with self._locator_mode():
            return self.locator.locate(features, tokens, image_index)

    def segment(
        self, features: ImageFeatures, tokens: torch.Tensor, image_index: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Give pixel logits (N, 1, S/stride, S/stride), at least float32. Arguments as in `RISCLIPLocator.locate`."""
        with self._locator_mode():
            logits, skips = self.locator.locate_with_skips(features, tokens, image_index)
        return self.decoder(logits, skips)

    def forward(
        self, images: torch.Tensor, tokens: torch.Tensor, image_index: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Run `segment` after `encode_image`: pixel logits (N, 1, S/stride, S/stride)."""
        return self.segment(self.encode_image(images), tokens, image_index)

    def loss(self, output: torch.Tensor, target: torch.Tensor, params: LossParams) -> torch.Tensor:
        """Give the loss of pixel logits that `forward` gave; targets (N, 1, S/stride, S/stride) uint8 0..255 or float 0..1."""
        return segmentation_loss(output, target, params)

    def role(self, name: str) -> Role:
        """Call the locator, trained if joint, the backbone."""
        return "backbone" if name.startswith("locator.") else "head"

    def _locator_mode(self) -> torch.set_grad_enabled:
        return torch.set_grad_enabled(self.config.joint and torch.is_grad_enabled())


def output_stride(patch_size: int, stages: int) -> int:
    """Give input pixels per output cell after `stages` doublings of the patch grid; 1 where they do not divide a patch."""
    return max(1, patch_size >> stages) if patch_size % 2**stages == 0 else 1


def patch_target(target: torch.Tensor, grid: int) -> torch.Tensor:
    """Map masks (N, 1, H, W), uint8 0..255 or float 0..1, to float 0 or 1 (N, 1, grid, grid): cells covered by half or more.

    An object too small for any such cell gets the one that it covers most [F1: binary, area mean fits best; R: the rest].
    """
    target = target.float() / 255 if target.dtype == torch.uint8 else target.float()
    covered = F.adaptive_avg_pool2d(target, grid).flatten(1)
    cells = torch.arange(covered.shape[1], device=covered.device)
    inside = covered >= 0.5
    largest = (cells == covered.argmax(dim=1, keepdim=True)) & (covered > 0)
    inside = inside | (largest & ~inside.any(dim=1, keepdim=True))
    return inside.float().view(-1, 1, grid, grid)


def _misfits(clip: CLIP, config: RISCLIPConfig) -> list[str]:
    """Tell why RISCLIP cannot stand on a CLIP; nothing if it can."""
    from open_clip.transformer import ResidualAttentionBlock, VisionTransformer

    visual = clip.visual
    if not isinstance(visual, VisionTransformer):
        return [f"its visual tower is a {type(visual).__name__}: take a ViT CLIP such as ViT-B-16-quickgelu"]
    image_blocks, text_blocks = visual.transformer.resblocks, clip.transformer.resblocks
    depths = len(image_blocks), len(text_blocks)
    size, patch, shared = visual.image_size, visual.patch_size[0], visual.output_dim
    plain = all(isinstance(block, ResidualAttentionBlock) for block in (*image_blocks, *text_blocks))
    checks = {
        "its transformer blocks are not CLIP's own (qk_norm, scaled attention, ...)": plain,
        "its image tower ends in an attention pool": visual.attn_pool is None,
        "its text is not read causally, pooled at the end mark (argmax) and projected by a matrix": (
            clip.attn_mask is not None
            and clip.text_pool_type == "argmax"
            and isinstance(clip.text_projection, nn.Parameter)
        ),
        f"it reads images of {size[0]}x{size[1]} pixels: use square ones, a multiple of its patch size {patch}": (
            size[0] == size[1] and size[0] % patch == 0
        ),
        f"cfe_layers is {config.cfe_layers}, but its towers have {depths[0]} and {depths[1]} layers: use "
        f"{min(depths)} or less": config.cfe_layers <= min(depths),
        f"skip_layers is {config.skip_layers}, but its image tower has {depths[0]} layers": (
            max(config.skip_layers) <= depths[0]
        ),
        f"ske_heads is {config.ske_heads}: it must divide the width of the shared space, {shared}": (
            config.ske_blocks == 0 or shared % config.ske_heads == 0
        ),
    }
    return [problem for problem, fine in checks.items() if not fine]


def _adapters(count: int, dim: int, width: int) -> nn.ModuleList:
    return nn.ModuleList(BlockAdapters(dim, width) for _ in range(count))


def _of_layer(adapters: nn.ModuleList, layer: int) -> Any:
    """Give the adapters of a layer counted from the end, if it has some."""
    return adapters[layer] if -layer <= len(adapters) else None
