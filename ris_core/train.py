"""A training without any orchestration: a plain process, or several under torchrun.

python -m ris_core.train --system cris --shards data/shards/shapes --clip data/clip/rn --out runs/plain
torchrun --nproc-per-node 2 -m ris_core.train --system risclip --clip data/clip/vit ...

Interrupted, it goes on when it is called again. Its checkpoints lie under a name that stands for parameters, data, CLIP and
code: with anything changed, the same `--out` holds another training, which begins afresh.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError

import ris_core
from ris_core.config import load_params
from ris_core.data.dataset import ShardStore
from ris_core.data.shards import MANIFEST
from ris_core.errors import ClusterError, ConfigError, RISError
from ris_core.models.clip import read_clip_config
from ris_core.models.contract import SystemConfig
from ris_core.models.registry import ModelInfo, export_model
from ris_core.options import digest
from ris_core.storage import Storage
from ris_core.training.checkpoint import Checkpoints
from ris_core.training.loop import Trainer
from ris_core.training.run import first_stage_model, initial_model, make_trainer, starting_model
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
    params, system, out = load_params(arguments.params), arguments.system, arguments.out
    section = params.of(system)
    if section.train is None:
        raise ConfigError(f"{system} is zero-shot: there is nothing to train")
    store = ShardStore(arguments.shards)
    store.verify()
    manifest, clip = (arguments.shards / MANIFEST).read_bytes(), read_clip_config(arguments.clip)["weights_sha256"]
    decisive = [system, section.model, hashlib.sha256(manifest).hexdigest(), clip, library_digest()]
    checkpoints = Storage(out / "checkpoints")
    checkpoints.check("--out")
    info = ModelInfo(store.image_size, store.resample, section.train.word_len)
    first = None
    if section.initialise is not None:
        name = f"initialise-{system}-{digest([*decisive, section.initialise])}"
        runtime = LocalRuntime(Checkpoints(checkpoints.below(name)), arguments.device)
        model = first_stage_model(section, system, arguments.clip)
        first = trained(make_trainer(model, section.initialise, store, runtime), name)
    name = f"train-{system}-{digest([*decisive, section.initialise, section.train, params.train.seed])}"
    runtime = LocalRuntime(Checkpoints(checkpoints.below(name)), arguments.device)
    start, folder = out / "start", out / "model"
    if runtime.rank == 0:
        weights = initial_model(section, system, arguments.clip, first, params.train.seed)
        export(start, system, weights, section.model, arguments.clip, info)
    runtime.wait()
    trainer = make_trainer(starting_model(section, system, start), section.train, store, runtime)
    weights = trained(trainer, name)
    if runtime.rank == 0:
        export(folder, system, weights, section.model, arguments.clip, info)
        print(f"{folder}: best epoch {trainer.position.best_epoch}, val mIoU {trainer.position.best_score:.3f}")


def export(
    folder: Path, system: str, weights: dict[str, torch.Tensor], config: SystemConfig, clip: Path, info: ModelInfo
) -> None:
    """Write a model. Raises ClusterError if the disk does not take it."""
    try:
        export_model(folder, system, weights, config, clip, info)
    except (OSError, SafetensorError) as error:
        remedy = "make room, then start again: it goes on from the newest checkpoint"
        raise ClusterError(f"{folder} could not be written ({error}): {remedy}") from error


def trained(trainer: Trainer, name: str) -> dict[str, torch.Tensor]:
    """Train to the end, from where it stands; the best weights."""
    if trainer.runtime.rank == 0 and trainer.position.epoch >= trainer.params.epochs:
        print(f"{name} was trained to its end before: nothing is left to do", file=sys.stderr)
    trainer.fit()
    return trainer.best_weights()


def library_digest() -> str:
    """Give the digest of this library's code, wherever it lies."""
    root = Path(ris_core.__file__).parent
    files = sorted(file for kind in ("*.py", "*.json") for file in root.rglob(kind))
    return digest(
        [[file.relative_to(root).as_posix(), hashlib.sha256(file.read_bytes()).hexdigest()] for file in files]
    )


if __name__ == "__main__":
    try:
        main()
    except RISError as error:
        sys.exit(f"error: {error}")
