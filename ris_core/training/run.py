"""One training run without any orchestration: a plain process, or several under torchrun.

python -m ris_core.training.run --system cris --shards data/shards/shapes --clip data/clip --out runs/plain
torchrun --nproc-per-node 2 -m ris_core.training.run --system cris ...
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ris_core.config import Params, load_params
from ris_core.data.dataset import BatchPlan, ShardStore, TrainingBatches
from ris_core.evaluation.evaluator import evaluate, queries_of
from ris_core.evaluation.metrics import PROTOCOLS, iou
from ris_core.models.clip import load_saved_clip
from ris_core.models.systems import build_model, export_model
from ris_core.training.loop import Trainer, Validate
from ris_core.training.runtime import LocalRuntime, Runtime, sum_over_ranks


def make_trainer(params: Params, system: str, shards: Path, clip: Path, runtime: Runtime) -> Trainer:
    """Build the system on its CLIP, its batches and its validation, ready to `fit`.

    The same on every rank: new layers are initialised from `train.seed` before the ranks go their own ways.
    """
    torch.manual_seed(params.train.seed)
    store = ShardStore(shards)
    model = build_model(system, getattr(params, system), load_saved_clip(clip))
    chosen = params.train
    plan = BatchPlan(chosen.batch_images, chosen.expressions_per_image, chosen.seed, chosen.steps_per_epoch)
    batches = TrainingBatches(store, "train", plan, chosen.word_len, runtime.rank, runtime.world)
    return Trainer(model, batches, make_validation(store, params, runtime), chosen, runtime)


def make_validation(store: ShardStore, params: Params, runtime: Runtime) -> Validate:
    """Scores of the validation split, each image on exactly one rank, summed before any division."""
    chosen = params.train
    protocol = PROTOCOLS[chosen.validate_protocol]
    images = store.images_of(chosen.validate_split)[: chosen.validate_images]
    queries = queries_of(store, chosen.validate_split, protocol, images[runtime.rank :: runtime.world].tolist())

    def validate(model: nn.Module) -> dict[str, float]:
        table = evaluate(
            model, store, queries, protocol, word_len=chosen.word_len, split=chosen.validate_split, with_objects=False
        )
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
    parser.add_argument("--clip", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint and the best model")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ...; default: the GPU if there is one")
    arguments = parser.parse_args()
    params = load_params(arguments.params)
    runtime = LocalRuntime(arguments.out, arguments.device)
    trainer = make_trainer(params, arguments.system, arguments.shards, arguments.clip, runtime)
    position = trainer.fit()
    if runtime.rank == 0:
        assert trainer.best is not None
        folder = arguments.out / "model"
        folder.mkdir(parents=True, exist_ok=True)
        store = trainer.batches.store
        info = {"word_len": params.train.word_len, "image_size": store.image_size, "resample": store.resample}
        export_model(folder, arguments.system, trainer.best, getattr(params, arguments.system), arguments.clip, info)
        print(f"{folder}: best epoch {position.best_epoch}, val mIoU {position.best_score:.3f}")


if __name__ == "__main__":
    main()
