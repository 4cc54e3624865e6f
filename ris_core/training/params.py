"""Parameters of a training, and the section that a system has in params.yaml."""

from __future__ import annotations

from dataclasses import dataclass, field

from ris_core.device import PRECISIONS
from ris_core.evaluation.metrics import PROTOCOLS
from ris_core.models.contract import SystemConfig
from ris_core.models.losses import LossParams
from ris_core.options import option


@dataclass
class TrainParams:
    """One training. Steps are the optimiser's own; `batch_images` is the global batch over all workers.

    A worker whose share of it is more than `micro_batch_images` takes so many at a time and adds up their gradients: the
    same step to rounding, but where a batch norm takes its statistics of what it sees at once.

    The section `train` holds what all systems share; a system's own `train` (and `initialise`) is laid over it.
    """

    seed: int = 0
    epochs: int = option(8, minimum=1)
    steps_per_epoch: int | None = option(None, minimum=1)
    batch_images: int = option(16, minimum=1)
    expressions_per_image: int = option(2, minimum=1)
    text: str = option("sent", choices=("sent", "raw"))  # as the annotators typed it: raw
    word_len: int = option(17, minimum=3)
    optimizer: str = option("adamw", choices=("adam", "adamw"))
    lr: float = option(1e-3, minimum=0)
    backbone_lr_multiplier: float = option(0.5, minimum=0)
    first_epoch_backbone_multiplier: float | None = option(None, minimum=0)
    positional_embeddings: str = option("head", choices=("head", "backbone"))
    weight_decay: float = option(0.01, minimum=0)
    schedule: str = option("cosine", choices=("cosine", "multistep", "poly"))
    poly_power: float = option(1.0, minimum=0)
    poly_each: str = option("epoch", choices=("epoch", "step"))  # when a polynomial schedule lowers the rate
    warmup_steps: int = option(0, minimum=0)
    milestones: list[int] = option([35])
    gamma: float = option(0.1, minimum=0)
    ema_decay: float = option(0.0, minimum=0, below=1)
    clip_grad_norm: float = option(0.0, minimum=0)
    precision: str = option("auto", choices=PRECISIONS)
    compile: bool = False
    loss: LossParams = field(default_factory=LossParams)
    loader_workers: int = option(0, minimum=0, decides=False)
    micro_batch_images: int | None = option(None, minimum=1)
    checkpoint_every_steps: int | None = option(200, minimum=1, decides=False)  # and after each epoch
    keep: str = option("best", choices=("best", "last"))  # the epoch whose weights are kept; best by validation mIoU
    validate_split: str = "val"
    validate_images: int | None = option(None, minimum=1)
    validate_protocol: str = option("ours", choices=tuple(PROTOCOLS))


@dataclass
class SystemSection:
    """The section of a system: the CLIP it starts from, its options, and its trainings, None where it has none."""

    clip: str
    model: SystemConfig
    initialise: TrainParams | None  # of its first stage
    train: TrainParams | None
