"""Training inside Ray Train: the library's loop in a `TorchTrainer`, tracked by MLflow, resumed by its fingerprint.

A run's name ends in a fingerprint of parameters, data, initial weights and code. Started again after a crash it goes on
from its newest checkpoint in `RIS_STORAGE` (default `runs/`); with anything changed it is another run and starts afresh.
"""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipelines import cluster, fingerprint, paths, tracking

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ris_core.config import Params
    from ris_core.training.checkpoint import Checkpoint

Stage = Literal["initialise", "train"]


def open_run(
    params: Params, system: str, dataset: str, stage: Stage, base_digest: str, parent: str | None = None
) -> tuple[str, str]:
    """The MLflow run of a training, new or found again: its name, which ends in a fingerprint of its inputs, and its id."""
    from ris_core.models.systems import trains

    section = getattr(params, system)
    training = getattr(section, stage)
    chosen = asdict(training) if training is not None else {}
    data_digest = fingerprint.file_digest(paths.shards(dataset) / "manifest.json")
    name = fingerprint.run_name(stage, system, dataset, asdict(section.model), chosen, data_digest, base_digest)
    run_id = tracking.open_run(
        params.register.experiment,
        name,
        {
            system: asdict(section.model),
            "train": chosen,
            "preprocess": asdict(params.preprocess),
            **({} if trains(system) else {"proposals": asdict(params.proposals)}),
        },
        {
            "ris.stage": stage,
            "ris.system": system,
            "ris.dataset": dataset,
            "ris.data_digest": data_digest,
            "ris.start_digest": base_digest,
        },
        parent,
    )
    tracking.log_dataset(run_id, dataset, paths.shards(dataset), data_digest, "training")
    return name, run_id


def tracked_fit(
    params: Params, system: str, dataset: str, stage: Stage, base: Path, base_digest: str, parent: str | None = None
) -> tuple[Checkpoint, str]:
    """One training from its beginning, or from where it was interrupted, to its end: final checkpoint and MLflow run.

    `base` is the folder of what is begun with, a CLIP for stage `initialise` and a model for stage `train`; its digest
    stands for its content. `parent` is the MLflow run that this one is shown under.
    """
    name, run_id = open_run(params, system, dataset, stage, base_digest, parent)
    with tracking.running(run_id), cluster.connected():
        return fit(params, system, dataset, stage, base, name, run_id), run_id


def fit(params: Params, system: str, dataset: str, stage: Stage, base: Path, name: str, run_id: str) -> Checkpoint:
    """Run the workers to the end and return the final checkpoint, which carries the best weights too.

    `base` is the folder of what is begun with: a CLIP for stage `initialise`, a model for stage `train`.

    Raises ClusterError if the cluster is too small, and what a worker raised if that is an error meant for people.
    """
    from ray.train import (
        CheckpointConfig,
        FailureConfig,
        LoggingConfig,
        RunConfig,
        ScalingConfig,
        WorkerGroupError,
    )
    from ray.train.torch import TorchTrainer

    from ris_core.errors import RISError
    from ris_core.training import checkpoint as checkpoints

    place = params.cluster
    use_gpu = cluster.has_gpu(place.use_gpu)
    cpus = place.cpus_per_worker or cluster.cpus_each(place.train_workers, int(use_gpu))
    cluster.check_resources(place.train_workers, cpus, int(use_gpu))
    config = {
        "params": params,
        "system": system,
        "stage": stage,
        "shards": str(paths.shards(dataset).absolute()),
        "base": str(base.absolute()),
        "run_id": run_id,
        "tracking_uri": tracking.uri(),
    }
    trainer = TorchTrainer(
        train_worker,
        train_loop_config=config,
        scaling_config=ScalingConfig(
            num_workers=place.train_workers,
            use_gpu=use_gpu,
            resources_per_worker={"CPU": cpus, **({"GPU": 1} if use_gpu else {})},
        ),
        run_config=RunConfig(
            name=name,
            storage_path=paths.storage(),
            failure_config=FailureConfig(max_failures=place.max_failures, controller_failure_limit=2),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
            logging_config=LoggingConfig(log_level="WARNING"),  # INFO tells of internals; the loop reports its progress
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

    from ris_core.training.run import first_stage_trainer, trainer_from

    logging.getLogger().setLevel(logging.WARNING)  # one of Ray's loggers escapes its LoggingConfig
    os.environ["MLFLOW_TRACKING_URI"] = config["tracking_uri"]

    def log(metrics: dict[str, float], step: int) -> None:
        tracking.log_metrics(config["run_id"], metrics, step)

    make = {"initialise": first_stage_trainer, "train": trainer_from}[config["stage"]]
    trainer = make(config["params"], config["system"], Path(config["shards"]), Path(config["base"]), RayRuntime())
    trainer.fit(log)
