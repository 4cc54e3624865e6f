"""What a system is: all that the rest of the project asks of one, in one screen.

A system is a folder of `ris_core.models` whose `__init__.py` names its class `SYSTEM`; the folder's name is the system's,
here, in params.yaml and in the registry of models. There are two kinds: a `MapSystem` is trained and predicts a map of
logits, a `ProposalSystem` is zero-shot and chooses among mask proposals. Text is the system's own: it gets sentences.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, TypeVar

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from ris_core.data.text import encode, tokenize
from ris_core.models.losses import LossParams
from ris_core.options import Plain

if TYPE_CHECKING:
    from open_clip.model import CLIP

Role = Literal["backbone", "positions", "head"]  # pre-trained; its positional embeddings; and all that is new
Features = TypeVar("Features")  # what a system knows of some images before it hears an expression
Output = TypeVar("Output")  # what a training step's forward pass gives


@dataclass(frozen=True)
class SystemConfig:
    """Base of a system's options, the section `model` of its parameters. Raises ConfigError where they contradict."""

    def saved(self) -> SystemConfig:
        """Give the options of the same model once all of its weights lie in its folder."""
        return self


class System(nn.Module, ABC):
    """A model made of a CLIP, which it takes over, and its options. Raises ConfigError if the two do not fit."""

    config_class: ClassVar[type[SystemConfig]]
    keeps_clip: ClassVar[bool] = False  # as it is, and its weights out of the system's own (`keep_out_of_state`)
    notice: ClassVar[str | None] = None  # goes with every registered version
    config: SystemConfig
    context_length: int  # the most tokens a sentence may have

    def __init__(self, clip: CLIP | None, config: SystemConfig) -> None:
        super().__init__()

    def count_tokens(self, text: str) -> int:
        """Count the tokens of a whole sentence: here CLIP's byte pairs and two marks."""
        return len(encode(text))


class MapSystem(System, Generic[Features, Output]):
    """A system that is trained and predicts mask logits.

    Dims: B images of S x S pixels, N expressions of L tokens.
    """

    stride: int  # input pixels per cell of mask logits
    locates: bool = False  # whether there is a coarse map to look at, scored beside the masks
    first_stage: ClassVar[type[MapSystem] | None] = None  # of a part that is trained before the rest

    def tokenize(self, texts: Sequence[str], length: int) -> torch.Tensor:
        """Give int64 (N, L) of sentences, each cut at `length`, L being that of the longest: here CLIP's byte pairs."""
        return torch.from_numpy(tokenize(texts, length))

    @abstractmethod
    def encode_image(self, images: torch.Tensor) -> Features:
        """Give what needs no text, of images (B, 3, S, S) normalised as for CLIP."""

    @abstractmethod
    def segment(
        self, features: Features, tokens: torch.Tensor, image_index: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Give mask logits (N, 1, S/stride, S/stride). `image_index` int64 (N,) says whose image an expression is about; None:
        each its own, in order.
        """

    def locate(self, features: Features, tokens: torch.Tensor, image_index: torch.Tensor | None = None) -> torch.Tensor:
        """Give the coarse map of a system that `locates`, logits (N, 1, g, g)."""
        raise TypeError(f"{type(self).__name__} has no coarse map")

    @abstractmethod
    def forward(self, images: torch.Tensor, tokens: torch.Tensor, image_index: torch.Tensor | None = None) -> Output:
        """Do one training step's forward pass."""

    @abstractmethod
    def loss(self, output: Output, target: torch.Tensor, params: LossParams) -> torch.Tensor:
        """Give the scalar loss of what `forward` gave; target (N, 1, S/stride, S/stride), uint8 0..255 or float 0..1."""

    @abstractmethod
    def role(self, name: str) -> Role:
        """Tell what the parameter of that name is to the optimiser."""

    def adopt(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take over the weights of the trained `first_stage`. Raises WeightsError unless they fit."""
        raise TypeError(f"{type(self).__name__} has no first stage")

    def located(self, features: Features, tokens: torch.Tensor, image_index: torch.Tensor, size: int) -> torch.Tensor:
        """Give `locate` at the size of masks for images of `size` pixels: its cells mean areas, those of a mask points."""
        logits = self.locate(features, tokens, image_index).float()
        side = size // self.stride
        return F.interpolate(logits, (side, side), mode="bilinear", align_corners=False)

    def trained(self) -> Iterator[tuple[Role, nn.Parameter]]:
        """Give all parameters that training changes, each with its role, in the model's order."""
        return ((self.role(name), value) for name, value in self.named_parameters() if value.requires_grad)


class ProposalSystem(System, Generic[Features]):
    """A zero-shot system: nothing is trained, a frozen CLIP scores the proposals of an image."""

    @abstractmethod
    def encode_proposals(self, image: np.ndarray, masks: np.ndarray) -> Features:
        """Give what needs no text, of an image RGB uint8 (H, W, 3) and its proposals (P, H, W), bool or uint8."""

    @abstractmethod
    def score(self, features: Features, expressions: Sequence[str]) -> torch.Tensor:
        """Score each proposal for each expression: (N, P), higher is better."""

    @abstractmethod
    def facts(self) -> Plain:
        """Tell what else a score depends on, to be recorded beside it."""


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
    """Let loading find a frozen CLIP's weights as they are already: nothing is missing, and what is given is unexpected."""
    unexpected += [key for key in state if key.startswith(prefix)]
    state.update(module.get_submodule("clip").state_dict(prefix=f"{prefix}clip."))
