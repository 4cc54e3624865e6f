"""One training as a library, with or without any orchestration: what it starts from, and the trainer that is ready to go."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch

from ris_core.data.dataset import BatchPlan, ShardStore, TrainingBatches
from ris_core.errors import ConfigError, WeightsError, list_problems
from ris_core.evaluation.answers import MapAnswers
from ris_core.evaluation.evaluator import evaluate
from ris_core.evaluation.metrics import iou, suited
from ris_core.evaluation.queries import queries_of
from ris_core.models.clip import load_saved_clip
from ris_core.models.contract import MapSystem, SystemConfig
from ris_core.models.registry import build_model, first_stage, load_model, read_description
from ris_core.options import deciding
from ris_core.training.loop import Trainer, Validate
from ris_core.training.params import SystemSection, TrainParams
from ris_core.training.runtime import Runtime, sum_over_ranks


def first_stage_model(section: SystemSection, system: str, clip: Path) -> MapSystem:
    """Make the part of a two-stage system that is trained first, on a fresh CLIP.

    The same in every process: new layers are initialised from the seed of its training.
    """
    part, training = first_stage(system), section.initialise
    assert part is not None  # config.py sees to it
    assert training is not None
    torch.manual_seed(training.seed)
    return part(load_saved_clip(clip), section.model)


def starting_model(section: SystemSection, system: str, start: Path) -> MapSystem:
    """Load the model in the folder `start`, with which the training of a system begins."""
    check_start(start, system, section.model)
    model, _ = load_model(start)
    assert isinstance(model, MapSystem)
    return model


def initial_model(
    section: SystemSection, system: str, clip: Path, first: Mapping[str, torch.Tensor] | None, seed: int
) -> dict[str, torch.Tensor]:
    """Make weights that a system's training starts from: fresh layers on a CLIP and, where there is one, its first stage."""
    torch.manual_seed(seed)
    model = build_model(system, section.model, load_saved_clip(clip))
    if first is not None:
        assert isinstance(model, MapSystem)
        model.adopt(first)
    return dict(model.state_dict())


def check_start(start: Path, system: str, config: SystemConfig) -> None:
    """Raise ConfigError if the model in the folder `start` is of another system or of other dimensions than `config`.

    Raises WeightsError if there is none.
    """
    if not (start / "model.json").exists():
        raise WeightsError(f"{start} holds no model to start from: run the stage initialise for it first")
    found = read_description(start)
    if found.system != system:
        raise ConfigError(f"{start} holds a {found.system}, not the {system} to be trained")
    there = deciding(found.config)
    problems = [
        f"{key} is {there.get(key)!r} in {start}, {value!r} in the parameters"
        for key, value in deciding(config.saved()).items()
        if there.get(key) != value
    ]
    if problems:
        raise ConfigError(
            list_problems(f"{start} is another {system}", problems, "Run the stage initialise again, or change back.")
        )


def make_trainer(model: MapSystem, params: TrainParams, store: ShardStore, runtime: Runtime) -> Trainer:
    """Join a model with its batches and its validation. Raises ConfigError if the model cannot read `word_len` tokens."""
    if params.word_len > model.context_length:
        raise ConfigError(
            f"train.word_len is {params.word_len}, but the model's CLIP reads at most {model.context_length} tokens: lower "
            "it, or take a CLIP with a longer context"
        )
    shape = params.batch_images, params.expressions_per_image
    plan = BatchPlan(*shape, params.seed, params.steps_per_epoch, params.text)
    tokenize = partial(model.tokenize, length=params.word_len)
    batches = TrainingBatches(store, "train", plan, tokenize, model.stride, runtime.rank, runtime.world)
    return Trainer(model, batches, make_validation(store, params, runtime), params, runtime)


def make_validation(store: ShardStore, params: TrainParams, runtime: Runtime) -> Validate:
    """Give what scores the validation split, each image on exactly one rank, summed before any division."""
    protocol = suited([params.validate_protocol], store.is_generalised)[0]
    images = store.images_of(params.validate_split)[: params.validate_images]
    queries = queries_of(store, params.validate_split, protocol, images[runtime.rank :: runtime.world].tolist())

    def validate(model: MapSystem) -> dict[str, float]:
        answers = MapAnswers(model, params.word_len)
        table = evaluate(answers, store, queries, protocol, split=params.validate_split, with_objects=False)
        intersection, union = (table[name].to_numpy().astype(np.float64) for name in ("intersection", "union"))
        sums = [len(union), iou(intersection, union, protocol.empty_union).sum(), intersection.sum(), union.sum()]
        total = sum_over_ranks(torch.tensor(sums, dtype=torch.float64, device=runtime.device)).tolist()
        return {"val/mIoU": total[1] / total[0], "val/oIoU": total[2] / max(1.0, total[3])}

    return validate
