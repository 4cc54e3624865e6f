"""Zero-shot Global-Local: a frozen CLIP ranks mask proposals by an expression. Nothing is trained.

Yu, Seo, Son, "Zero-shot Referring Image Segmentation with Global-Local Context Features", CVPR 2023, arXiv 2303.17811;
code Seonghoon-Yu/Zero-shot-RIS. The defaults are the published behaviour, quirks included. A proposal's feature mixes
the masked image (global) and its crop (local), an expression's mixes the sentence and its target noun phrase, and the
answer is the proposal that scores highest. The proposals of an image are encoded once for all its expressions:

    features = model.encode_proposals(image, masks)                  # text-independent
    scores = model.score(features, ["the man on the left", "dog"])   # (E, N)
    masks[scores.argmax(dim=1).numpy()]                              # one mask per expression
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from ris_core.data.text import encode, pad_token_batch
from ris_core.errors import ConfigError, list_problems
from ris_core.models.clip import encode_words
from ris_core.models.contract import ProposalSystem, SystemConfig, keep_out_of_state
from ris_core.models.global_local.noun_phrase import BACKENDS, NounPhraseFinder
from ris_core.models.global_local.visual import (
    BOX_MODES,
    FILLS,
    NORMALISATIONS,
    Views,
    check_proposals,
    clip_geometry,
    resnet_masked_encoder,
    vit_masked_encoder,
)
from ris_core.options import Plain

if TYPE_CHECKING:
    from open_clip.model import CLIP

SCORES = ("official", "cosine")


@dataclass(frozen=True)
class GlobalLocalConfig(SystemConfig):
    """Every choice of the method; the defaults are the published ones (alpha: 0.85 for RefCOCOg)."""

    alpha: float = 0.95  # share of the global in a proposal's feature; the rest is local
    beta: float = 0.5  # share of the sentence in an expression's feature; the rest is its noun phrase
    masked_blocks: int = 3  # last blocks of a ViT whose patch tokens are masked (k); a ResNet has none
    short_side: int = 800  # pixels the image is resized to before anything else
    norm_stats: str = "imagenet"  # "clip": what CLIP was trained with
    fill: str = "official"  # around a crop's object, after normalisation; "mean_color": 0; "zero": black pixels
    antialias: bool = False  # of all resizes but the first; torchvision has had it on by default since 0.17
    box_mode: str = "freesolo"  # "tight": the mask's real box, for any other proposals than FreeSOLO's
    score: str = "official"  # "cosine": as in the paper, also for ResNets, whose official score is no cosine
    noun_phrase: str = "auto"  # spacy (published), rules, whole; auto: spacy if its model is installed, else rules
    spacy_model: str = "en_core_web_lg"
    template: str = "{}"  # around every text before it is encoded
    proposals_per_batch: int = 64  # bounds memory, changes no result

    def __post_init__(self) -> None:
        choices: dict[str, tuple[str, Sequence[str]]] = {
            "norm_stats": (self.norm_stats, tuple(NORMALISATIONS)),
            "fill": (self.fill, FILLS),
            "box_mode": (self.box_mode, BOX_MODES),
            "score": (self.score, SCORES),
            "noun_phrase": (self.noun_phrase, BACKENDS),
        }
        checks = {
            f"{name} is {value!r}: use one of {', '.join(known)}": value in known
            for name, (value, known) in choices.items()
        }
        checks |= {
            f"{name} is {value}: use 0 to 1": 0 <= value <= 1
            for name, value in {"alpha": self.alpha, "beta": self.beta}.items()
        }
        counts = {"masked_blocks": self.masked_blocks, "short_side": self.short_side}
        counts["proposals_per_batch"] = self.proposals_per_batch
        checks |= {f"{name} is {value}: use 1 or more": value >= 1 for name, value in counts.items()}
        checks[f"template is {self.template!r}: it must hold one {{}}"] = self.template.count("{}") == 1
        if problems := [problem for problem, fine in checks.items() if not fine]:
            raise ConfigError(list_problems("The configuration of Global-Local is wrong", problems))


class ProposalFeatures(NamedTuple):
    """What is known of an image's N proposals before an expression is heard: all that sweeps of alpha need."""

    global_context: torch.Tensor  # (N, E)
    local_context: torch.Tensor  # (N, E)

    def mix(self, alpha: float) -> torch.Tensor:
        return alpha * self.global_context + (1 - alpha) * self.local_context


class TextFeatures(NamedTuple):
    """What is known of T expressions: all that sweeps of beta need."""

    sentence: torch.Tensor  # (T, E)
    phrase: torch.Tensor  # (T, E), of the target noun phrases

    def mix(self, beta: float) -> torch.Tensor:
        return beta * self.sentence + (1 - beta) * self.phrase


class GlobalLocal(ProposalSystem[ProposalFeatures]):
    """The zero-shot system on a CLIP, ViT or ResNet, which it takes over frozen and in evaluation mode.

    Features and scores are float32; lower precision flips near ties.

    Raises:
        ConfigError: the CLIP is of another kind, has fewer blocks than are to be masked, or the noun-phrase backend
            asked for is not installed.
    """

    config_class = GlobalLocalConfig
    keeps_clip = True
    config: GlobalLocalConfig

    def __init__(self, clip: CLIP, config: GlobalLocalConfig) -> None:
        super().__init__(clip, config)
        self.config = config
        self.clip_size, self.grid, self.is_vit = clip_geometry(clip.visual, config.masked_blocks)
        self.clip = clip.requires_grad_(False)
        self.context_length = int(clip.context_length)
        self.noun_phrases = NounPhraseFinder(config.noun_phrase, config.spacy_model)
        keep_out_of_state(self)
        self.train(False)

    def train(self, mode: bool = True) -> GlobalLocal:
        """Stay in evaluation mode whatever is asked: batch norms of a frozen CLIP must not move."""
        return super().train(False)

    @property
    def device(self) -> torch.device:
        return self.clip.logit_scale.device

    @torch.inference_mode()
    def encode_proposals(self, image: np.ndarray, masks: np.ndarray) -> ProposalFeatures:
        """Encode RGB image uint8 (H, W, 3) and its proposals (N, H, W) bool or uint8 (0 is outside) -> features, each (N, E).

        No proposals give features of shape (0, E). Of a ResNet, local features are of unit length.

        Raises:
            DataError: wrong shapes or dtypes, or proposals without a pixel; all of the latter are named.
        """
        check_proposals(image, masks)
        config, visual = self.config, self.clip.visual
        features = ProposalFeatures(
            *self.clip.logit_scale.new_empty((2, len(masks), self.clip.text_projection.shape[1]))
        )
        if not len(masks):
            return features
        with torch.autocast(self.device.type, enabled=False):
            views = Views(
                image,
                self.clip_size,
                short_side=config.short_side,
                norm_stats=config.norm_stats,
                fill=config.fill,
                box_mode=config.box_mode,
                antialias=config.antialias,
                device=self.device,
            )
            if self.is_vit:
                encode_masked = vit_masked_encoder(visual, views.whole, config.masked_blocks)
            else:
                encode_masked = resnet_masked_encoder(visual, views.whole)
            for start in range(0, len(masks), config.proposals_per_batch):
                part = slice(start, start + config.proposals_per_batch)
                inside = torch.tensor(masks[part] != 0, device=self.device)
                features.global_context[part] = encode_masked(views.grids(inside, self.grid))
                features.local_context[part] = self._as_mixed(visual(views.crops(inside)))
        return features

    @torch.inference_mode()
    def encode_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        """Give features (T, E) of tokens (T, L) int64; of unit length for a ResNet, as the official code mixes them."""
        with torch.autocast(self.device.type, enabled=False):
            return self._as_mixed(encode_words(self.clip, tokens.to(self.device))[1])

    def encode_texts(self, expressions: Sequence[str]) -> TextFeatures:
        """Give features of T expressions and of their noun phrases, in one batch in which no text occurs twice.

        Texts longer than the CLIP's context are cut (the official code refuses them).

        Raises:
            ConfigError: the CLIP's vocabulary is not that of OpenAI's tokenizer.
        """
        parsed = [self.noun_phrases(expression) for expression in expressions]
        texts = [self.config.template.replace("{}", text) for pair in parsed for text in pair]
        places = {text: place for place, text in enumerate(dict.fromkeys(texts))}
        if not places:
            return TextFeatures(*self.clip.text_projection.new_empty((2, 0, self.clip.text_projection.shape[1])))
        ids = [encode(text) for text in places]
        tokens = pad_token_batch(ids, min(max(map(len, ids)), self.context_length))
        if tokens.max() >= self.clip.vocab_size:
            raise ConfigError(
                f"this CLIP knows {self.clip.vocab_size} tokens, the tokenizer makes ids up to {tokens.max()}: "
                "Global-Local needs a CLIP with OpenAI's vocabulary of 49408"
            )
        features = self.encode_tokens(torch.from_numpy(tokens))
        index = torch.tensor([places[text] for text in texts], device=self.device).view(-1, 2)
        return TextFeatures(features[index[:, 0]], features[index[:, 1]])

    def score(self, features: ProposalFeatures, expressions: Sequence[str]) -> torch.Tensor:
        """Give scores (T, N) of an image's N proposals for T expressions, higher is better; see `score_features`."""
        return self.score_features(features, self.encode_texts(expressions))

    @torch.inference_mode()
    def score_features(self, features: ProposalFeatures, texts: TextFeatures) -> torch.Tensor:
        """Give scores (T, N): CLIP's temperature times the product of the mixed features of proposals and texts.

        Official: a cosine for ViTs; for ResNets nothing is normalised after mixing, so alpha weighs vectors of different
        length.
        """
        visual, text = features.mix(self.config.alpha), texts.mix(self.config.beta)
        if self.is_vit or self.config.score == "cosine":
            visual, text = F.normalize(visual, dim=-1), F.normalize(text, dim=-1)
        return self.clip.logit_scale.exp() * text @ visual.T

    def facts(self) -> Plain:
        """Tell what the answers depend on beside the CLIP: the configuration, and which finder of noun phrases really ran."""
        return {**asdict(self.config), "noun_phrase": self.noun_phrases.backend}

    def _as_mixed(self, features: torch.Tensor) -> torch.Tensor:
        return features if self.is_vit else F.normalize(features, dim=-1)
