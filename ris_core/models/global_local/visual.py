"""Visual side of zero-shot Global-Local: views of an image and its mask proposals, and the features CLIP gives them.

Yu, Seo, Son, "Zero-shot Referring Image Segmentation with Global-Local Context Features", CVPR 2023, arXiv 2303.17811,
section 3; numerics as the authors' code computes them (Seonghoon-Yu/Zero-shot-RIS). Two features per proposal: the
global one sees the whole image and is masked late, inside CLIP; the local one is plain CLIP on the masked, cropped
pixels. The CLIPs are open_clip's own classes, unchanged, at their own input size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from ris_core.errors import ConfigError, DataError
from ris_core.models import clip as openai_clip
from ris_core.models.clip import resnet_feature_maps
from ris_core.models.layers import attention

if TYPE_CHECKING:
    from open_clip.modified_resnet import AttentionPool2d, ModifiedResNet
    from open_clip.transformer import VisionTransformer

NORMALISATIONS = {  # RGB mean and standard deviation in 0..1
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": (openai_clip.IMAGE_MEAN, openai_clip.IMAGE_STD),
}
FILLS = ("official", "mean_color", "zero")
BOX_MODES = ("freesolo", "tight")
OFFICIAL_FILL = (0.485, 0.456, 0.406)  # meant as a colour, but put where pixels are already normalised

MaskedEncoder = Callable[[torch.Tensor], torch.Tensor]  # masks (N, H, W) float -> features (N, E)


def check_proposals(image: np.ndarray, masks: np.ndarray) -> None:
    """Raise DataError unless the image is uint8 (H, W, 3) and the masks bool or uint8 (N, H, W), none of them empty."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        raise DataError(f"an image is uint8 (H, W, 3) RGB; got {image.dtype} {image.shape}")
    if masks.dtype not in (np.bool_, np.uint8) or masks.ndim != 3 or masks.shape[1:] != image.shape[:2]:
        height, width = image.shape[:2]
        raise DataError(
            f"proposals of this image are bool or uint8 (N, {height}, {width}); got {masks.dtype} {masks.shape}"
        )
    empty = np.flatnonzero(~masks.any(axis=(1, 2)))
    if empty.size:
        raise DataError(f"proposals {empty.tolist()} of {len(masks)} have no pixel: leave them out")


def proposal_boxes(masks: torch.Tensor, mode: str) -> torch.Tensor:
    """Give boxes int64 (N, 4) x1, y1, x2, y2 of masks (N, H, W) bool; x2 and y2 are exclusive, no box is empty.

    "tight" encloses the mask. "freesolo" is the published one: centre of the occupied columns and rows -/+ half their
    number, truncated. It begins one pixel early, loses the last column and row, and is too small for masks with gaps.
    """
    sides = []
    for occupied in (masks.any(dim=1), masks.any(dim=2)):  # columns (N, W), rows (N, H)
        places = torch.arange(occupied.shape[1], dtype=torch.float32, device=masks.device)
        if mode == "tight":
            low = torch.where(occupied, places, torch.inf).amin(dim=1)
            high = torch.where(occupied, places, -torch.inf).amax(dim=1) + 1
        else:
            count = occupied.sum(dim=1, dtype=torch.float32)
            centre = (occupied * places).sum(dim=1) / count
            low, high = (centre - count / 2).trunc(), (centre + count / 2).trunc()
        sides.append((low, torch.maximum(high, low + 1)))  # a lone first column or row would give an empty crop
    (x1, x2), (y1, y2) = sides
    return torch.stack([x1, y1, x2, y2], dim=1).long()


class Views:
    """What CLIP is shown of one image: the whole of it, and one crop per proposal. All on `device`, float32.

    The image is resized to `short_side` (Pillow, bilinear), normalised, and from there to the CLIP's input and back to
    its own size (H, W); the latter round trip is the official code's and slightly blurs the crops.
    """

    def __init__(
        self,
        image: np.ndarray,
        clip_size: tuple[int, int],
        *,
        short_side: int,
        norm_stats: str,
        fill: str,
        box_mode: str,
        antialias: bool,
        device: torch.device,
    ) -> None:
        height, width = image.shape[:2]
        scale = short_side / min(height, width)
        size = [short_side if side == min(height, width) else int(side * scale) for side in (height, width)]
        resized = np.asarray(Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.BILINEAR))
        mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in NORMALISATIONS[norm_stats])
        pixels = torch.tensor(resized, device=device).permute(2, 0, 1).float() / 255
        pixels = (pixels - mean) / std
        self.clip_size, self.box_mode, self.antialias = clip_size, box_mode, antialias
        self.whole = self._resize(pixels, clip_size)[None]  # (1, 3, S, S), aspect ratio squashed
        self.original = self._resize(pixels, (height, width))  # (3, H, W)
        official = torch.tensor(OFFICIAL_FILL, device=device).view(3, 1, 1)
        self.fill = {"official": official, "mean_color": torch.zeros_like(mean), "zero": -mean / std}[fill]

    def crops(self, masks: torch.Tensor) -> torch.Tensor:
        """Turn masks (N, H, W) bool into what is inside each on a plain background, cut to its box: (N, 3, S, S), squashed."""
        crops = self.whole.new_empty((len(masks), 3, *self.clip_size))
        for crop, mask, (x1, y1, x2, y2) in zip(
            crops, masks, proposal_boxes(masks, self.box_mode).tolist(), strict=True
        ):
            inside = torch.where(mask[y1:y2, x1:x2], self.original[:, y1:y2, x1:x2], self.fill)
            crop.copy_(self._resize(inside, self.clip_size))
        return crops

    def grids(self, masks: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Turn masks (N, H, W) bool into soft masks (N, g * g) float32 on CLIP's grid, in [0, 1]."""
        return self._resize(masks.float(), grid).flatten(1)

    def _resize(self, maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """Resize (C, H, W) to (C, *size). torchvision 0.11, which the official numbers were made with, did not antialias."""
        return F.interpolate(maps[None], size, mode="bilinear", align_corners=False, antialias=self.antialias)[0]


def clip_geometry(visual: nn.Module, masked_blocks: int) -> tuple[tuple[int, int], tuple[int, int], bool]:
    """Give input size (H, W), grid (h, w) that masks are applied on, and whether it is a ViT (else a ResNet).

    Raises:
        ConfigError: neither of CLIP's two families, a ViT with an attention pool, or one with fewer blocks than are to be
            masked.
    """
    from open_clip.modified_resnet import ModifiedResNet
    from open_clip.transformer import VisionTransformer

    if isinstance(visual, ModifiedResNet):
        return (visual.image_size, visual.image_size), (visual.image_size // 32, visual.image_size // 32), False
    if not isinstance(visual, VisionTransformer):
        raise ConfigError(f"Global-Local needs CLIP's own ResNet or ViT, got {type(visual).__name__}")
    if visual.attn_pool is not None or visual.pool_type not in ("tok", "avg") or visual.final_ln_after_pool:
        raise ConfigError("Global-Local reads a ViT's class token or the mean of its patches; this one pools otherwise")
    blocks = len(visual.transformer.resblocks)
    if masked_blocks > blocks:
        raise ConfigError(f"masked_blocks is {masked_blocks}, but this ViT has only {blocks} blocks")
    return visual.image_size, visual.grid_size, True


def vit_masked_encoder(visual: VisionTransformer, image: torch.Tensor, masked_blocks: int) -> MaskedEncoder:
    """Give global features of one normalised image (1, 3, S, S): the mask multiplies the patch tokens before each last block.

    The class token stays as it is, and zeroed tokens stay keys and values. The blocks before the masked ones run once
    here. The returned function maps soft masks (N, g * g) to features (N, E), not normalised. A ViT that pools its
    patches by their mean (none of OpenAI's does) is pooled by the mean over the mask.
    """
    patches = visual.conv1(image).flatten(2).transpose(1, 2)  # (1, g * g, C)
    tokens = torch.cat([visual.class_embedding.expand(1, 1, -1), patches], dim=1) + visual.positional_embedding
    blocks = list(visual.transformer.resblocks)
    start = len(blocks) - masked_blocks
    tokens = visual.ln_pre(tokens)
    for block in blocks[:start]:
        tokens = block(tokens)

    def encode(masks: torch.Tensor) -> torch.Tensor:
        keep = F.pad(masks, (1, 0), value=1.0)[:, :, None]
        x = tokens.expand(len(masks), -1, -1)
        for block in blocks[start:]:
            x = block(x * keep)
        if visual.pool_type == "tok":
            return visual.ln_post(x[:, 0]) @ visual.proj
        share = masks / masks.sum(dim=1, keepdim=True).clamp(min=1e-6)  # a speck may fall between the grid's samples
        return (share[:, None] @ visual.ln_post(x[:, 1:]))[:, 0] @ visual.proj

    return encode


def resnet_masked_encoder(visual: ModifiedResNet, image: torch.Tensor) -> MaskedEncoder:
    """Give global features of one normalised image (1, 3, S, S): the mask multiplies the last map before attention pooling.

    The map is L2-normalised over channels first, as in the official code; masked positions keep their positional
    embedding and take part in the attention. The returned function maps soft masks (N, g * g) to features (N, E), not
    normalised.
    """
    _, _, layer4 = resnet_feature_maps(visual, image)
    positions = F.normalize(layer4, dim=1)[0].flatten(1).T  # (g * g, C)
    pool: AttentionPool2d = visual.attnpool
    # A projection is linear: W(m x + p) = m W x + W p. So the map is projected once, whatever the number of masks.
    projections = [
        (F.linear(positions, part.weight), part(pool.positional_embedding))
        for part in (pool.q_proj, pool.k_proj, pool.v_proj)
    ]

    def encode(masks: torch.Tensor) -> torch.Tensor:
        (query, query_place), (key, key_place), (value, value_place) = projections

        def mean(projected: torch.Tensor) -> torch.Tensor:
            """Give the pool's mean token, over all positions and not only those inside the mask: (N, 1, C)."""
            return (masks @ projected / len(projected))[:, None]

        def tokens(projected: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
            return torch.cat([mean(projected), masks[:, :, None] * projected], dim=1) + place

        # Only the mean token's answer is read, so it is the only query.
        pooled = attention(
            mean(query) + query_place[:1], tokens(key, key_place), tokens(value, value_place), pool.num_heads
        )
        return pool.c_proj(pooled[:, 0])

    return encode
