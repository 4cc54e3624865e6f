"""One training run without any orchestration: a plain process, or several under torchrun.

python -m ris_core.training.run --system cris --shards data/shards/shapes --clip data/clip/rn --out runs/plain
torchrun --nproc-per-node 2 -m ris_core.training.run --system risclip --clip data/clip/vit ...
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ris_core.config import Params, TrainParams, load_params
from ris_core.data.dataset import BatchPlan, ShardStore, TrainingBatches
from ris_core.errors import ConfigError, WeightsError, list_problems
from ris_core.evaluation.answers import MapAnswers
from ris_core.evaluation.evaluator import evaluate
from ris_core.evaluation.metrics import PROTOCOLS, iou
from ris_core.evaluation.queries import queries_of
from ris_core.models.clip import load_saved_clip
from ris_core.models.systems import (
    build_model,
    export_model,
    load_model,
    read_model_info,
    system_class,
    without_fetching,
)
from ris_core.training.loop import Trainer, Validate
from ris_core.training.runtime import LocalRuntime, Runtime, sum_over_ranks


def first_stage_trainer(params: Params, system: str, shards: Path, clip: Path, runtime: Runtime) -> Trainer:
    """The part of a two-stage system that is trained first, on a fresh CLIP, ready to `fit`.

    The same on every rank: new layers are initialised from the seed before the ranks go their own ways.
    """
    section = getattr(params, system)
    torch.manual_seed(section.initialise.seed)
    model = system_class(system).first_stage.build(load_saved_clip(clip), section.model)
    return make_trainer(model, section.initialise, ShardStore(shards), runtime)


def trainer_from(params: Params, system: str, shards: Path, start: Path, runtime: Runtime) -> Trainer:
    """The training of a system that begins with the model in the folder `start`, ready to `fit`."""
    section = getattr(params, system)
    check_start(start, system, section.model)
    model, _ = load_model(start)
    return make_trainer(model, section.train, ShardStore(shards), runtime)


def initial_model(
    params: Params, system: str, clip: Path, first_stage: dict[str, torch.Tensor] | None
) -> dict[str, torch.Tensor]:
    """Weights that a system's training starts from: fresh layers on a CLIP and, where there is one, its first stage."""
    section = getattr(params, system)
    torch.manual_seed(params.train.seed)
    model: Any = build_model(system, section.model, load_saved_clip(clip))
    if first_stage is not None:
        model.adopt(first_stage)
    return dict(model.state_dict())


def check_start(start: Path, system: str, config: Any) -> None:
    """Raise ConfigError if the model in the folder `start` is of another system or of other dimensions than `config`.

    Raises WeightsError if there is none.
    """
    if not (start / "model.json").exists():
        raise WeightsError(f"{start} holds no model to start from: run the stage initialise for it first")
    found = read_model_info(start)
    wanted = asdict(without_fetching(config))
    if found["system"] != system:
        raise ConfigError(f"{start} holds a {found['system']}, not the {system} to be trained")
    # JSON has lists for tuples
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in wanted.items()}
    problems = [
        f"{key} is {found['config'].get(key)!r} in {start}, {value!r} in the parameters"
        for key, value in plain.items()
        if found["config"].get(key) != value
    ]
    if problems:
        raise ConfigError(
            list_problems(f"{start} is another {system}", problems, "Run the stage initialise again, or change back.")
        )


def make_trainer(model: nn.Module, params: TrainParams, store: ShardStore, runtime: Runtime) -> Trainer:
    """A model with its batches and its validation. Raises ConfigError if the model cannot read `word_len` tokens."""
    context: Any = model.context_length
    if params.word_len > context:
        raise ConfigError(
            f"train.word_len is {params.word_len}, but the model's CLIP reads at most {context} tokens: lower it, or take "
            "a CLIP with a longer context"
        )
    plan = BatchPlan(params.batch_images, params.expressions_per_image, params.seed, params.steps_per_epoch)
    stride: Any = model.stride
    batches = TrainingBatches(store, "train", plan, params.word_len, stride, runtime.rank, runtime.world)
    return Trainer(model, batches, make_validation(store, params, runtime), params, runtime)


def make_validation(store: ShardStore, params: TrainParams, runtime: Runtime) -> Validate:
    """Scores of the validation split, each image on exactly one rank, summed before any division."""
    protocol = PROTOCOLS[params.validate_protocol]
    images = store.images_of(params.validate_split)[: params.validate_images]
    queries = queries_of(store, params.validate_split, protocol, images[runtime.rank :: runtime.world].tolist())

    def validate(model: nn.Module) -> dict[str, float]:
        answers = MapAnswers(model, params.word_len)
        table = evaluate(answers, store, queries, protocol, split=params.validate_split, with_objects=False)
        intersection, union = (table[name].to_numpy().astype(np.float64) for name in ("intersection", "union"))
        sums = [len(union), iou(intersection, union).sum(), intersection.sum(), union.sum()]
        total = sum_over_ranks(torch.tensor(sums, dtype=torch.float64, device=runtime.device)).tolist()
        return {"val/mIoU": total[1] / total[0], "val/oIoU": total[2] / max(1.0, total[3])}

    return validate


def main() -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--system", default="cris")
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    parser.add_argument("--shards", type=Path, required=True)
    parser.add_argument("--clip", type=Path, required=True, help="folder of the CLIP to start from")
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints and models")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ...; default: the GPU if there is one")
    arguments = parser.parse_args()
    params = load_params(arguments.params)
    section = getattr(params, arguments.system)
    store = ShardStore(arguments.shards)
    info = {"word_len": section.train.word_len, "image_size": store.image_size, "resample": store.resample}
    first = None
    if section.initialise is not None:
        runtime = LocalRuntime(arguments.out / "first_stage", arguments.device)
        trainer = first_stage_trainer(params, arguments.system, arguments.shards, arguments.clip, runtime)
        trainer.fit()
        first = trainer.best
    runtime = LocalRuntime(arguments.out, arguments.device)
    start, folder = arguments.out / "start", arguments.out / "model"
    if runtime.rank == 0:
        weights = initial_model(params, arguments.system, arguments.clip, first)
        export_model(start, arguments.system, weights, section.model, arguments.clip, info)
    runtime.wait()
    trainer = trainer_from(params, arguments.system, arguments.shards, start, runtime)
    position = trainer.fit()
    if runtime.rank == 0:
        assert trainer.best is not None
        export_model(folder, arguments.system, trainer.best, section.model, arguments.clip, info)
        print(f"{folder}: best epoch {position.best_epoch}, val mIoU {position.best_score:.3f}")


if __name__ == "__main__":
    main()
