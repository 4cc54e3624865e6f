"""Training inside Ray Train: the library's loop in a `TorchTrainer`, tracked by MLflow, resumed by its fingerprint.

A run's name ends in a fingerprint of parameters, data, initial weights and code. Started again after a crash it goes on
from its newest checkpoint in `RIS_STORAGE` (default `runs/`); with anything changed it is another run and starts afresh.
"""

from __future__ import annotations

import logging
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import ray.train
import ray.train.torch
import torch
from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig, WorkerGroupError
from ray.train.torch import TorchTrainer
from torch import nn

from pipelines import cluster, fingerprint, paths, tracking
from pipelines.params import ClusterParams, Params
from ris_core.data.dataset import ShardStore
from ris_core.errors import RISError
from ris_core.options import Plain, deciding
from ris_core.training import checkpoint as checkpoints
from ris_core.training.checkpoint import Checkpoint
from ris_core.training.params import SystemSection, TrainParams
from ris_core.training.run import first_stage_trainer, trainer_from

Stage = Literal["initialise", "train"]


@dataclass(frozen=True)
class Training:
    """One training of a system on a dataset: a stage of it by its parameters (None where nothing is trained).

    `base` is the folder of what is begun with, a CLIP for stage `initialise` and a model for stage `train`; its digest
    stands for its content.
    """

    system: str
    dataset: str
    stage: Stage
    section: SystemSection
    params: TrainParams | None
    base: Path
    base_digest: str

    @property
    def data_digest(self) -> str:
        """Give the digest of the shards that are read."""
        return fingerprint.file_digest(paths.shards(self.dataset) / "manifest.json")

    def name(self, label: str | None = None) -> str:
        """Give `<label>-<system>-<dataset>-<fingerprint>`; the label is the stage, by default."""
        decisive = (self.section.model, self.params, self.data_digest, self.base_digest)
        name = fingerprint.run_name(self.stage, self.system, self.dataset, *decisive)
        return name if label is None else f"{label}{name.removeprefix(self.stage)}"


def open_run(
    params: Params, training: Training, proposals: Plain | None = None, parent: str | None = None
) -> tuple[str, str]:
    """Open a training's MLflow run, new or found again: its name, which ends in a fingerprint of its inputs, and its id."""
    shards = paths.shards(training.dataset)
    manifest = ShardStore(shards).manifest
    told = {
        training.system: deciding(training.section.model),
        "train": deciding(training.params) or {},
        "preprocess": {key: manifest[key] for key in ("image_size", "storage", "resample")},
    }
    if proposals is not None:
        told["proposals"] = proposals
    name = training.name()
    run_id = tracking.open_run(
        params.register.experiment,
        name,
        told,
        {
            "ris.stage": training.stage,
            "ris.system": training.system,
            "ris.dataset": training.dataset,
            "ris.data_digest": training.data_digest,
            "ris.start_digest": training.base_digest,
        },
        parent,
    )
    tracking.log_dataset(run_id, training.dataset, shards, training.data_digest, "training")
    return name, run_id


def tracked_fit(params: Params, training: Training, parent: str | None = None) -> tuple[Checkpoint, str]:
    """Run a training from its beginning, or from where it was interrupted, to its end: final checkpoint and name of its run.

    `parent` is the MLflow run that its own is shown under.
    """
    name, run_id = open_run(params, training, parent=parent)
    with tracking.running(run_id), cluster.connected():
        return fit(params.cluster, training, name, run_id), name


def fit(place: ClusterParams, training: Training, name: str, run_id: str) -> Checkpoint:
    """Run the workers to the end and return the final checkpoint, which carries the best weights too.

    Raises ClusterError if the cluster is too small, and what a worker raised if that is an error meant for people.
    """
    use_gpu = cluster.has_gpu(place.use_gpu)
    cpus = place.cpus_per_worker or cluster.cpus_each(place.train_workers, int(use_gpu))
    cluster.check_resources(place.train_workers, cpus, int(use_gpu))
    config = {
        "section": training.section,
        "system": training.system,
        "stage": training.stage,
        "shards": str(paths.shards(training.dataset).absolute()),
        "base": str(training.base.absolute()),
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
        context = ray.train.get_context()
        self.rank, self.world = context.get_world_rank(), context.get_world_size()
        self.device: torch.device = ray.train.torch.get_device()

    def prepare(self, model: nn.Module) -> nn.Module:
        if self.world > 1 and self.device.type == "cuda":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return ray.train.torch.prepare_model(model)

    def load(self) -> Checkpoint | None:
        saved = ray.train.get_checkpoint()
        if saved is None:
            return None
        with saved.as_directory() as folder:
            return checkpoints.load(Path(folder))

    def report(self, metrics: dict[str, float], checkpoint: Checkpoint | None) -> None:
        with tempfile.TemporaryDirectory() as folder:
            saved = None
            if checkpoint is not None:
                checkpoints.write_into(Path(folder), checkpoint)
                saved = ray.train.Checkpoint.from_directory(folder)
            ray.train.report(metrics, checkpoint=saved)


def train_worker(config: Plain) -> None:
    """Run in each Ray Train worker: build the system, then the library's loop."""
    logging.getLogger().setLevel(logging.WARNING)  # one of Ray's loggers escapes its LoggingConfig
    os.environ["MLFLOW_TRACKING_URI"] = config["tracking_uri"]

    def log(metrics: dict[str, float], step: int) -> None:
        tracking.log_metrics(config["run_id"], metrics, step)

    make = {"initialise": first_stage_trainer, "train": trainer_from}[config["stage"]]
    trainer = make(config["section"], config["system"], Path(config["shards"]), Path(config["base"]), RayRuntime())
    trainer.fit(log)
