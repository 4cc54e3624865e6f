"""A training without any orchestration: a plain process, or several under torchrun.

python -m ris_core.train --system cris --shards data/shards/shapes --clip data/clip/rn --out runs/plain
torchrun --nproc-per-node 2 -m ris_core.train --system risclip --clip data/clip/vit ...
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ris_core.config import load_params
from ris_core.data.dataset import ShardStore
from ris_core.errors import ConfigError, RISError
from ris_core.models.registry import ModelInfo, export_model
from ris_core.training.run import first_stage_trainer, initial_model, trainer_from
from ris_core.training.runtime import LocalRuntime


def main() -> None:
    """Run the command line of this module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--system", default="cris")
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    parser.add_argument("--shards", type=Path, required=True)
    parser.add_argument("--clip", type=Path, required=True, help="folder of the CLIP to start from")
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints and models")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ...; default: the GPU if there is one")
    arguments = parser.parse_args()
    params, system = load_params(arguments.params), arguments.system
    section = params.of(system)
    if section.train is None:
        raise ConfigError(f"{system} is zero-shot: there is nothing to train")
    store = ShardStore(arguments.shards)
    info = ModelInfo(store.image_size, store.resample, section.train.word_len)
    first = None
    if section.initialise is not None:
        runtime = LocalRuntime(arguments.out / "first_stage", arguments.device)
        trainer = first_stage_trainer(section, system, arguments.shards, arguments.clip, runtime)
        trainer.fit()
        first = trainer.best
    runtime = LocalRuntime(arguments.out, arguments.device)
    start, folder = arguments.out / "start", arguments.out / "model"
    if runtime.rank == 0:
        weights = initial_model(section, system, arguments.clip, first, params.train.seed)
        export_model(start, system, weights, section.model, arguments.clip, info)
    runtime.wait()
    trainer = trainer_from(section, system, arguments.shards, start, runtime)
    position = trainer.fit()
    if runtime.rank == 0:
        assert trainer.best is not None
        export_model(folder, system, trainer.best, section.model, arguments.clip, info)
        print(f"{folder}: best epoch {position.best_epoch}, val mIoU {position.best_score:.3f}")


if __name__ == "__main__":
    try:
        main()
    except RISError as error:
        sys.exit(f"error: {error}")
