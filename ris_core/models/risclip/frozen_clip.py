"""A CLIP that nothing changes, opened up block by block, for RISCLIP to work between its layers.

open_clip's own classes, unmodified; the blocks are run through their public parts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from ris_core.errors import ConfigError
from ris_core.models.contract import keep_out_of_state

if TYPE_CHECKING:
    from open_clip.model import CLIP

    from ris_core.models.risclip.layers import BlockAdapters


class FrozenClip(nn.Module):
    """An open_clip CLIP with a ViT that nothing changes, opened up block by block.

    No gradient, always in evaluation mode, no part of any state dict, and shared instead of copied by `copy.deepcopy`.
    Layers are counted from the end, -1 being the last: so the blocks of towers of unequal depth are paired.

    `value_only`: the last image block's attention copies values, as in MaskCLIP.
    """

    def __init__(self, clip: CLIP, value_only: bool) -> None:
        super().__init__()
        self.clip = clip.requires_grad_(False)
        self.value_only = value_only
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
        """Map normalised images (B, 3, S, S) to tokens (B, T, C) before the first block. Raises ConfigError at another size."""
        if images.shape[-2:] != (self.image_size, self.image_size):
            height, width = images.shape[-2:]
            raise ConfigError(
                f"images of {height}x{width} pixels, but this CLIP's position embedding is for {self.image_size}x"
                f"{self.image_size}: resize the images, or load the CLIP with another image size"
            )
        return self.clip.visual._embeds(images)  # the only private part of open_clip in use; a test guards it

    def embed_text(self, tokens: torch.Tensor) -> torch.Tensor:
        """Map tokens (N, L) int64 to (N, L, C) before the first block. Raises ConfigError above the context length."""
        length = tokens.shape[1]
        if length > self.clip.context_length:
            raise ConfigError(
                f"{length} tokens a sentence, but this CLIP reads at most {self.clip.context_length}; shorten the "
                "token length"
            )
        return self.clip.token_embedding(tokens) + self.clip.positional_embedding[:length]

    def image_block(self, layer: int, x: torch.Tensor, adapters: BlockAdapters | None) -> torch.Tensor:
        """Put tokens (B, T, C) through an image block."""
        block = self.clip.visual.transformer.resblocks[layer]
        return _run_block(block, x, adapters, value_only=self.value_only and layer == -1)

    def text_block(self, layer: int, x: torch.Tensor, adapters: BlockAdapters | None) -> torch.Tensor:
        """Put tokens (N, L, C) through a text block, under CLIP's causal mask."""
        length = x.shape[1]
        mask = self.clip.attn_mask[:length, :length]
        return _run_block(self.clip.transformer.resblocks[layer], x, adapters, mask)

    def to_shared_space(self, image: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Map all tokens after the last blocks to (N, T, E) and (N, L, E): what CLIP does to its two pooled ones [F1]."""
        clip = self.clip
        return clip.visual.ln_post(image) @ clip.visual.proj, clip.ln_final(text) @ clip.text_projection


def _run_block(
    block: Any,
    x: torch.Tensor,
    adapters: BlockAdapters | None,
    mask: torch.Tensor | None = None,
    value_only: bool = False,
) -> torch.Tensor:
    """Run open_clip's ResidualAttentionBlock, opened up for adapters; without any, the same operations in the same order."""
    normed = block.ln_1(x)
    x = x + block.ls_1(_own_values(block.attn, normed) if value_only else block.attention(normed, attn_mask=mask))
    if adapters is not None:
        x = adapters.after_attention(x)
    x = x + block.ls_2(block.mlp(block.ln_2(x)))
    return x if adapters is None else adapters.after_mlp(x)


def _own_values(attn: nn.MultiheadAttention, x: torch.Tensor) -> torch.Tensor:
    """Do attention in which every token sees only itself (MaskCLIP, Zhou et al., ECCV 2022): its own value, projected."""
    assert attn.in_proj_weight is not None
    weight, bias = attn.in_proj_weight.chunk(3)[2], attn.in_proj_bias.chunk(3)[2]
    return attn.out_proj(F.linear(x, weight, bias))
