"""Stage `train`: the library's training loop inside a Ray Train `TorchTrainer`.

python -m pipelines.train --system cris --dataset shapes

The run's name ends in a fingerprint of parameters, data, initial weights and code. Started again after a crash it goes on
from its newest checkpoint in `RIS_STORAGE` (default `runs/`); with anything changed it is another run and starts afresh.
"""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipelines import cluster, files, fingerprint, paths, tracking
from pipelines.stage import run

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ris_core.config import Params
    from ris_core.training.checkpoint import Checkpoint


def main(
    system: Annotated[str, typer.Option(help="cris")],
    dataset: Annotated[str, typer.Option(help="a preprocessed dataset")],
) -> None:
    """Train one system on one dataset; writes the best model and the learning curves."""
    from pipelines.stage import check_names, params
    from ris_core.config import digest
    from ris_core.data.dataset import ShardStore
    from ris_core.models.clip import read_clip_config
    from ris_core.models.systems import export_model

    check_names(dataset, system)
    chosen = params()
    store = ShardStore(paths.shards(dataset))
    data_digest = fingerprint.file_digest(paths.shards(dataset) / "manifest.json")
    clip_digest = read_clip_config(paths.CLIP)["weights_sha256"]
    section = asdict(getattr(chosen, system))
    name = fingerprint.run_name("train", system, dataset, section, asdict(chosen.train), data_digest, clip_digest)
    run_id = tracking.open_run(
        chosen.register.experiment,
        name,
        {system: section, "train": asdict(chosen.train), "preprocess": asdict(chosen.preprocess)},
        {"ris.system": system, "ris.dataset": dataset, "ris.data_digest": data_digest, "ris.clip_digest": clip_digest},
    )
    tracking.log_dataset(run_id, dataset, paths.shards(dataset), data_digest, "training")
    with tracking.running(run_id), cluster.connected():
        best = fit(chosen, system, dataset, name, run_id)
    position = best.position
    with files.replaced_folder(paths.model(system, dataset)) as folder:
        info = {
            "dataset": dataset,
            "word_len": chosen.train.word_len,
            "image_size": store.image_size,
            "resample": store.resample,
            "epoch": position.best_epoch,
            "val_mIoU": position.best_score,
            "data_digest": data_digest,
            "clip_digest": clip_digest,
            "config_digest": digest([section, asdict(chosen.train)]),
            "mlflow_run": run_id,
        }
        assert best.best is not None
        export_model(folder, system, best.best, getattr(chosen, system), paths.CLIP, info)
    out = paths.training(system, dataset)
    files.write_csv(out / "history.csv", position.history)
    files.write_json(
        out / "metrics.json", {"best_epoch": position.best_epoch, **position.history[position.best_epoch - 1]}
    )
    typer.echo(f"{paths.model(system, dataset)}: best epoch {position.best_epoch}, val mIoU {position.best_score:.3f}")


def fit(params: Params, system: str, dataset: str, name: str, run_id: str) -> Checkpoint:
    """Run the workers to the end and return the final checkpoint, which carries the best weights too.

    Raises ClusterError if the cluster is too small, and what a worker raised if that is an error meant for people.
    """
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, WorkerGroupError
    from ray.train.torch import TorchTrainer

    from ris_core.errors import RISError
    from ris_core.training import checkpoint as checkpoints

    place = params.cluster
    use_gpu = cluster.has_gpu(place.use_gpu)
    cluster.check_resources(place.train_workers, place.cpus_per_worker, int(use_gpu))
    config = {
        "params": params,
        "system": system,
        "shards": str(paths.shards(dataset).absolute()),
        "clip": str(paths.CLIP.absolute()),
        "run_id": run_id,
        "tracking_uri": tracking.uri(),
    }
    trainer = TorchTrainer(
        train_worker,
        train_loop_config=config,
        scaling_config=ScalingConfig(
            num_workers=place.train_workers,
            use_gpu=use_gpu,
            resources_per_worker={"CPU": place.cpus_per_worker, **({"GPU": 1} if use_gpu else {})},
        ),
        run_config=RunConfig(
            name=name,
            storage_path=paths.storage(),
            failure_config=FailureConfig(max_failures=place.max_failures, controller_failure_limit=2),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
        ),
    )
    try:
        result = trainer.fit()
    except WorkerGroupError as error:
        for failure in error.worker_failures.values():
            cause = getattr(failure, "_base_exc", failure)  # Ray wraps it, together with its traceback as a text
            if isinstance(cause, RISError):
                raise cause from error
        raise
    with result.checkpoint.as_directory() as folder:
        return checkpoints.load(Path(folder))


class RayRuntime:
    """The loop's surroundings inside a Ray Train worker."""

    def __init__(self) -> None:
        import ray.train
        import ray.train.torch

        context = ray.train.get_context()
        self.rank, self.world = context.get_world_rank(), context.get_world_size()
        self.device: torch.device = ray.train.torch.get_device()

    def prepare(self, model: nn.Module) -> nn.Module:
        import ray.train.torch
        from torch import nn

        if self.world > 1 and self.device.type == "cuda":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return ray.train.torch.prepare_model(model)

    def load(self) -> Checkpoint | None:
        import ray.train

        from ris_core.training import checkpoint as checkpoints

        saved = ray.train.get_checkpoint()
        if saved is None:
            return None
        with saved.as_directory() as folder:
            return checkpoints.load(Path(folder))

    def report(self, metrics: dict[str, float], checkpoint: Checkpoint | None) -> None:
        import ray.train

        from ris_core.training import checkpoint as checkpoints

        with tempfile.TemporaryDirectory() as folder:
            saved = None
            if checkpoint is not None:
                checkpoints.write_into(Path(folder), checkpoint)
                saved = ray.train.Checkpoint.from_directory(folder)
            ray.train.report(metrics, checkpoint=saved)


def train_worker(config: dict[str, Any]) -> None:
    """What each Ray Train worker runs: build the system, then the library's loop."""
    import logging
    import os

    from ris_core.training.run import make_trainer

    logging.getLogger("ray.train").setLevel(logging.WARNING)
    os.environ["MLFLOW_TRACKING_URI"] = config["tracking_uri"]

    def log(metrics: dict[str, float], step: int) -> None:
        tracking.log_metrics(config["run_id"], metrics, step)

    trainer = make_trainer(
        config["params"], config["system"], Path(config["shards"]), Path(config["clip"]), RayRuntime()
    )
    trainer.fit(log)


if __name__ == "__main__":
    run(main)
