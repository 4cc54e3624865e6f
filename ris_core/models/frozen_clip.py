"""A CLIP that nothing changes, opened up block by block, for RISCLIP to work between its layers.

open_clip's own classes, unmodified; the blocks are run through their public parts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from ris_core.errors import ConfigError, list_problems

if TYPE_CHECKING:
    from open_clip.model import CLIP

    from ris_core.models.risclip import RISCLIPConfig
    from ris_core.models.risclip_layers import BlockAdapters


class FrozenClip(nn.Module):
    """An open_clip CLIP with a ViT that nothing changes, opened up block by block.

    No gradient, always in evaluation mode, no part of any state dict, and shared instead of copied by `copy.deepcopy`.
    Layers are counted from the end, -1 being the last: so the blocks of towers of unequal depth are paired.

    Raises:
        ConfigError: the CLIP's towers cannot be opened up like this, or do not fit the config; all reasons are listed.
    """

    def __init__(self, clip: CLIP, config: RISCLIPConfig) -> None:
        super().__init__()
        if problems := _misfits(clip, config):
            raise ConfigError(list_problems("RISCLIP cannot stand on this CLIP", problems))
        self.clip = clip.requires_grad_(False)
        self.value_only = config.dense == "value"
        self.image_depth = len(clip.visual.transformer.resblocks)
        self.text_depth = len(clip.transformer.resblocks)
        self.image_dim = clip.visual.transformer.width
        self.text_dim = clip.transformer.width
        self.shared_dim = clip.text_projection.shape[1]
        self.image_size: int = clip.visual.image_size[0]
        self.patch_size: int = clip.visual.patch_size[0]
        keep_out_of_state(self)
        self.train()

    def train(self, mode: bool = True) -> FrozenClip:
        return super().train(False)

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenClip:
        return self

    def embed_image(self, images: torch.Tensor) -> torch.Tensor:
        """Normalised images (B, 3, S, S) -> tokens (B, T, C) before the first block. Raises ConfigError at another size."""
        if images.shape[-2:] != (self.image_size, self.image_size):
            height, width = images.shape[-2:]
            raise ConfigError(
                f"images of {height}x{width} pixels, but this CLIP's position embedding is for {self.image_size}x"
                f"{self.image_size}: resize the images, or load the CLIP with another image size"
            )
        return self.clip.visual._embeds(images)  # the only private part of open_clip in use; a test guards it

    def embed_text(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens (N, L) int64 -> (N, L, C) before the first block. Raises ConfigError above the context length."""
        length = tokens.shape[1]
        if length > self.clip.context_length:
            raise ConfigError(
                f"{length} tokens a sentence, but this CLIP reads at most {self.clip.context_length}; shorten the "
                "token length"
            )
        return self.clip.token_embedding(tokens) + self.clip.positional_embedding[:length]

    def image_block(self, layer: int, x: torch.Tensor, adapters: BlockAdapters | None) -> torch.Tensor:
        """Tokens (B, T, C) through an image block."""
        block = self.clip.visual.transformer.resblocks[layer]
        return _run_block(block, x, adapters, value_only=self.value_only and layer == -1)

    def text_block(self, layer: int, x: torch.Tensor, adapters: BlockAdapters | None) -> torch.Tensor:
        """Tokens (N, L, C) through a text block, under CLIP's causal mask."""
        length = x.shape[1]
        mask = self.clip.attn_mask[:length, :length]
        return _run_block(self.clip.transformer.resblocks[layer], x, adapters, mask)

    def to_shared_space(self, image: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """All tokens after the last blocks -> (N, T, E) and (N, L, E): what CLIP does to its two pooled ones [F1]."""
        clip = self.clip
        return clip.visual.ln_post(image) @ clip.visual.proj, clip.ln_final(text) @ clip.text_projection


def _misfits(clip: Any, config: RISCLIPConfig) -> list[str]:
    """Why RISCLIP cannot stand on a CLIP; nothing if it can."""
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


def keep_out_of_state(module: nn.Module) -> None:
    """Leave everything in a module out of state dicts; all of it is the frozen CLIP in its attribute `clip`."""
    module.register_state_dict_post_hook(_leave_out)
    module.register_load_state_dict_pre_hook(_bring_own)


def _leave_out(module: nn.Module, state: dict[str, torch.Tensor], prefix: str, _: Any) -> None:
    for key in [key for key in state if key.startswith(prefix)]:
        del state[key]


def _bring_own(
    module: nn.Module, state: dict[str, torch.Tensor], prefix: str, _: Any, strict: bool, missing: list[str],
    unexpected: list[str], errors: list[str],
) -> None:  # fmt: skip
    """Loading finds a frozen CLIP's weights as they are already: nothing is missing, and what is given is unexpected."""
    unexpected += [key for key in state if key.startswith(prefix)]
    state.update(module.get_submodule("clip").state_dict(prefix=f"{prefix}clip."))


def _run_block(
    block: Any,
    x: torch.Tensor,
    adapters: BlockAdapters | None,
    mask: torch.Tensor | None = None,
    value_only: bool = False,
) -> torch.Tensor:
    """open_clip's ResidualAttentionBlock, opened up for adapters; without any, the same operations in the same order."""
    normed = block.ln_1(x)
    x = x + block.ls_1(_own_values(block.attn, normed) if value_only else block.attention(normed, attn_mask=mask))
    if adapters is not None:
        x = adapters.after_attention(x)
    x = x + block.ls_2(block.mlp(block.ln_2(x)))
    return x if adapters is None else adapters.after_mlp(x)


def _own_values(attn: nn.MultiheadAttention, x: torch.Tensor) -> torch.Tensor:
    """Attention in which every token sees only itself (MaskCLIP, Zhou et al., ECCV 2022): its own value, projected."""
    assert attn.in_proj_weight is not None
    weight, bias = attn.in_proj_weight.chunk(3)[2], attn.in_proj_bias.chunk(3)[2]
    return attn.out_proj(F.linear(x, weight, bias))
