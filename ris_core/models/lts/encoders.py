"""What LTS hears and sees with: visual backbones with maps at strides 8, 16 and 32, and sentence encoders.

Jing et al., "Locate then Segment", CVPR 2021, arXiv 2103.16284: ConvNet features and a bidirectional GRU [stated], the
ConvNet perhaps Darknet-53 [unconfirmed], pooling of the GRU's states unknown. A CLIP's towers can take either place.
"""

from __future__ import annotations

import difflib
import sys
from typing import TYPE_CHECKING

import torch
from torch import nn

from ris_core.errors import ConfigError, WeightsError
from ris_core.models.clip import IMAGE_MEAN, IMAGE_STD, encode_words, resnet_feature_maps

if TYPE_CHECKING:
    from open_clip.model import CLIP

Levels = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # C3, C4, C5

STRIDES = (8, 16, 32)


# Backbones: modules of (B, 3, H, W) normalised as for CLIP -> Levels, with the three channel counts as `channels`


class ClipBackbone(nn.Module):
    """The visual tower of a ResNet CLIP up to its raw layer4 map. Its attention pool is not used, hence frozen.

    Raises:
        ConfigError: the CLIP is not a ResNet one.
    """

    def __init__(self, clip: CLIP) -> None:
        super().__init__()
        from open_clip.modified_resnet import ModifiedResNet

        if not isinstance(clip.visual, ModifiedResNet):
            raise ConfigError(
                f"backbone 'clip' of LTS needs a ResNet CLIP such as RN50-quickgelu, got {type(clip.visual).__name__}"
            )
        self.visual = clip.visual
        self.visual.attnpool.requires_grad_(False)
        width = self.visual.attnpool.c_proj.in_features
        self.channels = (width // 4, width // 2, width)

    def forward(self, images: torch.Tensor) -> Levels:
        return resnet_feature_maps(self.visual, images)


class TimmBackbone(nn.Module):
    """A `features_only` backbone of timm with maps at strides 8, 16 and 32, renormalising images to what it expects.

    Raises:
        ConfigError: timm has no such model, or it gives no such maps.
        WeightsError: pretrained weights are asked for and do not exist or cannot be fetched.
    """

    def __init__(self, name: str, pretrained: bool) -> None:
        super().__init__()
        import timm

        if not timm.is_model(name):
            close = difflib.get_close_matches(name, timm.list_models(), n=4, cutoff=0.4)
            raise ConfigError(
                f"unknown backbone {name!r}: neither 'clip' nor a model of timm; its closest are "
                f"{', '.join(close) or 'none'}"
            )
        levels = _levels(name)
        try:
            self.net = timm.create_model(name, features_only=True, out_indices=levels, pretrained=pretrained)
        except (OSError, RuntimeError) as error:
            if not pretrained:
                raise
            raise WeightsError(
                f"no pretrained weights for backbone {name!r} in the local cache, and none could be fetched ({error}). "
                "Run once where there is a network (without HF_HUB_OFFLINE), choose one of timm.list_pretrained(), or set "
                "pretrained to false"
            ) from error
        self.channels = tuple(self.net.feature_info.channels())
        theirs = self.net.pretrained_cfg
        scale = [ours / std for ours, std in zip(IMAGE_STD, theirs["std"], strict=True)]
        shift = [(ours - mean) / std for ours, mean, std in zip(IMAGE_MEAN, theirs["mean"], theirs["std"], strict=True)]
        self.register_buffer("scale", torch.tensor(scale).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("shift", torch.tensor(shift).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: torch.Tensor) -> Levels:
        c3, c4, c5 = self.net(torch.addcmul(self.get_buffer("shift"), images, self.get_buffer("scale")))
        return c3, c4, c5


def _levels(name: str) -> list[int]:
    """Tell which outputs of a timm model lie at strides 8, 16 and 32, read from a copy without memory."""
    import timm

    try:
        with torch.device("meta"):
            probe = timm.create_model(name, features_only=True, pretrained=False)
    except (AttributeError, RuntimeError) as error:
        raise ConfigError(f"backbone {name!r} of timm gives no feature maps ({error}); take a ConvNet") from error
    place = {stride: index for index, stride in enumerate(probe.feature_info.reduction())}
    layout = str(getattr(probe, "output_fmt", "NCHW")).removeprefix("Format.")
    if not place.keys() >= set(STRIDES) or layout != "NCHW":
        raise ConfigError(
            f"backbone {name!r} gives {layout} maps at strides {sorted(place)}; LTS needs NCHW ones at 8, 16 and 32: take "
            "a ConvNet such as darknet53 or resnet50"
        )
    return [place[stride] for stride in STRIDES]


# Sentences: modules of tokens (N, L) int64 -> sentence vectors (N, dim). A sentence ends at its largest id, the end mark;
# what follows is padding.


class ClipSentence(nn.Module):
    """The text tower of a CLIP: its projected state at the end mark, not normalised.

    `with_words` sets the sum of the word vectors beside it, brought to one scale by a layer norm: there every word weighs
    the same, whereas the state says what tells captions apart, which words of place hardly do (`benchmarks.ablations lts`,
    "clip_state"). Takes over the tower's modules and parameters under their own names, without the visual tower and the
    temperature.
    """

    def __init__(self, clip: CLIP, with_words: bool = False) -> None:
        super().__init__()
        self.token_embedding = clip.token_embedding
        self.positional_embedding = clip.positional_embedding
        self.transformer = clip.transformer
        self.ln_final = clip.ln_final
        self.text_projection = clip.text_projection
        self.context_length = int(clip.context_length)
        self.register_buffer("attn_mask", clip.attn_mask, persistent=False)
        width, state_dim = self.text_projection.shape
        self.word_norm = nn.LayerNorm(width) if with_words else None
        self.dim = state_dim + width * with_words

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        state = encode_words(self, tokens)[1]
        if self.word_norm is None:
            return state
        words = self.word_norm(self.token_embedding(tokens)) * within(tokens)
        return torch.cat([state, words.sum(dim=1)], dim=1)


class GruSentence(nn.Module):
    """Embedding, bidirectional GRU, one vector of 2 * hidden per sentence.

    Each direction is a GRU of its own; the second reads every sentence reversed within its own length. That is what
    packing computes, without the copy of the lengths to the host that packing needs.

    pooling: "mean" over the tokens, "attention" (a softmax over the tokens for every dimension, as in MCN), "last" (where
    each direction ends).
    """

    context_length = sys.maxsize  # a GRU reads sentences of any length

    def __init__(self, token_embedding: nn.Embedding, hidden: int, pooling: str) -> None:
        super().__init__()
        width = token_embedding.embedding_dim
        self.token_embedding = token_embedding
        self.ahead = nn.GRU(width, hidden, batch_first=True)
        self.back = nn.GRU(width, hidden, batch_first=True)
        self.pooling = pooling
        self.dim = 2 * hidden
        self.scores = nn.Linear(self.dim, self.dim) if pooling == "attention" else None

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        place = torch.arange(tokens.shape[1], device=tokens.device)
        last = tokens.argmax(dim=1, keepdim=True)  # (N, 1)
        keep = within(tokens)
        mirror = torch.where(place <= last, last - place, place)
        words = self.token_embedding(tokens)
        ahead = self.ahead(words)[0]
        back = self.back(_reorder(words, mirror))[0]
        if self.pooling == "last":
            ends = [_reorder(states, last)[:, 0] for states in (ahead, back)]
            return torch.cat(ends, dim=1)
        states = torch.cat([ahead, _reorder(back, mirror)], dim=2)  # (N, L, 2 * hidden)
        if self.scores is None:
            return (states * keep).sum(dim=1) / (last + 1)
        weights = self.scores(states).masked_fill(~keep, float("-inf")).softmax(dim=1)
        return (weights * states).sum(dim=1)


def within(tokens: torch.Tensor) -> torch.Tensor:
    """Map tokens (N, L) to bool (N, L, 1): not padding. Of a sentence that is all padding, the first token counts."""
    place = torch.arange(tokens.shape[1], device=tokens.device)
    return (place <= tokens.argmax(dim=1, keepdim=True))[:, :, None]


def _reorder(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Reorder x (N, L, C) by index (N, K) -> (N, K, C): token index[n, k] of sentence n."""
    return x.gather(1, index[:, :, None].expand(-1, -1, x.shape[2]))
