"""CRIS: CLIP-driven referring image segmentation, on open_clip's own ResNet CLIP.

Wang et al., CVPR 2022, arXiv 2111.15174; code DerrickWang005/CRIS.pytorch. The state dict equals the official one key
for key, so official checkpoints load and ours load there. An image is encoded once for all its expressions:

    features = model.encode_image(normalise(images))           # text-independent
    logits = model.segment(features, tokens, image_index)      # (N, 1, H/4, W/4)
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ris_core.data.text import PAD_ID
from ris_core.errors import ConfigError, WeightsError, list_problems
from ris_core.models.clip import build_clip, encode_words, resnet_feature_maps
from ris_core.models.contract import MapSystem, Role, SystemConfig
from ris_core.models.cris.layers import Decoder, ImageFeatures, Neck, Projector, spatial_attention_pool
from ris_core.models.losses import LossParams, segmentation_loss
from ris_core.weights import load_strictly, state_of

if TYPE_CHECKING:
    from open_clip.model import CLIP


@dataclass(frozen=True)
class CRISConfig(SystemConfig):
    """Dimensions and options of CRIS that its CLIP does not decide. The defaults are the published models."""

    vis_dim: int = 512  # width of the fused map and the decoder; equals fpn_out[1] and CLIP's text width
    fpn_out: tuple[int, int, int] = (256, 512, 1024)  # channels of the projected C3, C4, C5
    num_layers: int = 3
    num_heads: int = 8
    ffn_dim: int = 2048
    dropout: float = 0.1
    coord_levels: str = "aggregate"  # "all": X and Y at every level of the neck (not official)
    freeze_token_embedding: bool = False  # the official code means to freeze it but trains it
    freeze_logit_scale: bool = True  # CLIP's temperature has no gradient here: False only stops DDP
    round_fp16: bool = False  # round CLIP's weights to fp16 as the official builder does (nothing changes for OpenAI's)

    def __post_init__(self) -> None:
        object.__setattr__(self, "fpn_out", tuple(self.fpn_out))  # JSON and YAML bring a list
        fpn, dim, heads = self.fpn_out, self.vis_dim, self.num_heads
        checks = {
            f"fpn_out is {fpn}: use three positive channel counts": len(fpn) == 3 and min(fpn) > 0,
            f"fpn_out is {fpn}: its second entry must equal vis_dim {dim}": fpn[1:2] == (dim,),
            f"vis_dim is {dim}: use a multiple of 4 (2D sine positions)": dim % 4 == 0,
            f"num_heads is {heads}: it must divide vis_dim {dim}": heads > 0 and dim % heads == 0,
            f"num_layers is {self.num_layers}: use 1 or more": self.num_layers > 0,
            f"ffn_dim is {self.ffn_dim}: use 1 or more": self.ffn_dim > 0,
            f"dropout is {self.dropout}: use 0 or more and less than 1": 0 <= self.dropout < 1,
            f"coord_levels is {self.coord_levels!r}: use aggregate or all": self.coord_levels in ("aggregate", "all"),
        }
        if problems := [problem for problem, fine in checks.items() if not fine]:
            raise ConfigError(list_problems("The configuration of CRIS is wrong", problems))


class CRIS(MapSystem[ImageFeatures, torch.Tensor]):
    """CLIP ResNet and text transformer, neck, decoder, projector. Takes over the CLIP it is given as `backbone`.

    The CLIP stays an unmodified open_clip model; its attention pool receives one more submodule, `connect`, and is read
    as a map. Dims: fpn_in = channels of C3 and C4 and the CLIP's embedding E, which is also the state's.

    Raises:
        ConfigError: the CLIP is not a ResNet one, or its text is not vis_dim wide.
    """

    config_class = CRISConfig
    stride = 4

    config: CRISConfig

    def __init__(self, clip: CLIP, config: CRISConfig) -> None:
        super().__init__(clip, config)
        from open_clip.modified_resnet import ModifiedResNet

        if not isinstance(clip.visual, ModifiedResNet):
            raise ConfigError(f"CRIS needs a ResNet CLIP such as RN50-quickgelu, got {type(clip.visual).__name__}")
        if config.vis_dim != (text_width := clip.ln_final.weight.shape[0]):
            raise ConfigError(
                f"vis_dim is {config.vis_dim}, but the CLIP's text is {text_width} wide: they must be equal"
            )
        self.config = config
        self.context_length = int(clip.context_length)
        pool = clip.visual.attnpool
        width, embed_dim = pool.c_proj.in_features, pool.c_proj.out_features
        pool.connect = nn.Sequential(nn.Conv2d(width, embed_dim, 1, bias=False), nn.BatchNorm2d(embed_dim))
        self.backbone = clip
        self.neck = Neck((width // 4, width // 2, embed_dim), config.fpn_out, config.coord_levels == "all")
        self.decoder = Decoder(config.num_layers, config.vis_dim, config.num_heads, config.ffn_dim, config.dropout)
        self.proj = Projector(embed_dim, config.vis_dim)
        if config.round_fp16:
            round_to_fp16(clip)
        clip.logit_scale.requires_grad_(not config.freeze_logit_scale)
        clip.token_embedding.requires_grad_(not config.freeze_token_embedding)

    def encode_image(self, images: torch.Tensor) -> ImageFeatures:
        """Encode normalised images (B, 3, H, W), sides multiples of 32 -> everything that needs no text."""
        if images.shape[-2] % 32 or images.shape[-1] % 32:
            raise ConfigError(f"CRIS reads images whose sides are multiples of 32, got {tuple(images.shape[-2:])}")
        c3, c4, layer4 = resnet_feature_maps(self.backbone.visual, images)
        return self.neck.project_image(c3, c4, spatial_attention_pool(self.backbone.visual.attnpool, layer4))

    def segment(
        self, features: ImageFeatures, tokens: torch.Tensor, image_index: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Give logits (N, 1, H/4, W/4) of expressions, tokens (N, L) int64 with 0 as padding.

        `image_index` (N,) int64 says which image each expression belongs to; None means one expression per image, in
        order. Any L up to the CLIP's context length does; the longest sentence of the batch is enough.
        """
        words, state = encode_words(self.backbone, tokens)
        if image_index is not None:
            features = features.of(image_index)
        fused = self.neck(features, state)
        return self.proj(self.decoder(fused, words, tokens != PAD_ID), state)

    def forward(
        self, images: torch.Tensor, tokens: torch.Tensor, image_index: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Run `segment` after `encode_image`.

        In training, the batch norms of the image part see each image once, however many expressions it has; with one
        expression per image this is exactly the official model.
        """
        return self.segment(self.encode_image(images), tokens, image_index)

    def role(self, name: str) -> Role:
        """Call CLIP the backbone; among it its positional embeddings, which the official code trains as fast as the head."""
        if not name.startswith("backbone."):
            return "head"
        return "positions" if "positional_embedding" in name else "backbone"

    def loss(self, output: torch.Tensor, target: torch.Tensor, params: LossParams) -> torch.Tensor:
        """Give the loss of the logits that `forward` gave; targets (N, 1, H/4, W/4)."""
        return segmentation_loss(output, target, params)

    def official_state_dict(self) -> dict[str, torch.Tensor]:
        """Give detached CPU tensors under the keys of the official checkpoints (without "module.")."""
        if self.config.coord_levels != "aggregate":
            raise ConfigError("coordinates at all levels change shapes: this model has no official counterpart")
        return {key: value.detach().cpu() for key, value in self.state_dict().items()}

    @classmethod
    def from_official_state_dict(cls, state: Mapping[str, object], num_heads: int = 8, dropout: float = 0.1) -> CRIS:
        """Build a model with every dimension read from the keys and shapes of an official checkpoint.

        Args:
            state: the checkpoint as a whole or its "state_dict", with "module." before every name or without: see
                `ris_core.weights.state_of`; its `read_state` reads either from a file.
            num_heads: of the decoder. Heads leave no trace in shapes: CLIP's are its width / 64.
            dropout: of the decoder.

        Raises:
            WeightsError: the keys are not those of CRIS, or a tensor is missing, unknown or misshapen; all are listed.
        """
        state = state_of(state, "This checkpoint")
        architecture, dims = infer_dimensions(state)
        try:
            model = cls(build_clip(architecture), CRISConfig(**dims, num_heads=num_heads, dropout=dropout))
        except (ConfigError, RuntimeError, ArithmeticError) as error:
            raise WeightsError(f"The dimensions read from the state dict contradict each other. {error}") from error
        load_strictly(model, state, "The state dict does not fit CRIS as its own keys describe it")
        return model


def round_to_fp16(clip: CLIP) -> None:
    """Round, in place, what CLIP keeps in fp16: convolutions, linear and attention layers, the text projection."""
    rounded: list[torch.Tensor | None] = [clip.text_projection]
    for module in clip.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            rounded += [module.weight, module.bias]
        elif isinstance(module, nn.MultiheadAttention):
            rounded += [module.in_proj_weight, module.in_proj_bias]
    with torch.no_grad():
        for tensor in rounded:
            if tensor is not None:
                tensor.copy_(tensor.half())


def infer_dimensions(state: Mapping[str, torch.Tensor]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Infer (open_clip architecture, fields of CRISConfig) from the shapes of an official state dict, see `unwrapped`.

    Raises:
        WeightsError: keys that tell a dimension are missing; all of them are listed.
    """
    missing: list[str] = []

    def rows(key: str) -> int:
        """Give the first dimension of a tensor, 64 where it is missing (the error below comes before that is used)."""
        if key not in state or state[key].ndim == 0 or not len(state[key]):
            missing.append(key)
            return 64
        return state[key].shape[0]

    def count(pattern: str) -> int:
        """Count how many of pattern.format(0), pattern.format(1), ... are there."""
        numbers = itertools.takewhile(lambda n: pattern.format(n) in state, itertools.count())
        found = sum(1 for _ in numbers)
        if found == 0:
            missing.append(pattern.format(0))
        return found

    text_width = rows("backbone.ln_final.weight")
    architecture = {
        "embed_dim": rows("backbone.visual.attnpool.c_proj.weight"),
        "quick_gelu": True,
        "vision_cfg": {
            "layers": [count(f"backbone.visual.layer{level}.{{}}.conv1.weight") for level in (1, 2, 3, 4)],
            "width": rows("backbone.visual.layer1.0.conv1.weight"),
            "image_size": 32 * math.isqrt(rows("backbone.visual.attnpool.positional_embedding") - 1),
        },
        "text_cfg": {
            "context_length": rows("backbone.positional_embedding"),
            "vocab_size": rows("backbone.token_embedding.weight"),
            "width": text_width,
            "heads": max(1, text_width // 64),
            "layers": count("backbone.transformer.resblocks.{}.ln_1.weight"),
        },
    }
    dims = {
        "vis_dim": rows("decoder.norm.weight"),
        "fpn_out": tuple(rows(f"neck.{name}.0.weight") for name in ("f3_v_proj", "f2_v_proj", "f1_v_proj")),
        "num_layers": count("decoder.layers.{}.norm1.weight"),
        "ffn_dim": rows("decoder.layers.0.ffn.0.weight"),
    }
    if missing:
        remedy = "Give the 'state_dict' of a CRIS checkpoint (keys like 'module.neck.txt_proj.0.weight')."
        raise WeightsError(list_problems("This is not a CRIS state dict, these keys are missing", missing, remedy))
    return architecture, dims
