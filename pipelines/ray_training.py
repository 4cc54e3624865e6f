"""Training inside Ray Train: the library's loop in a `TorchTrainer`, tracked by MLflow.

Checkpoints are the library's own, so a worker group that is started again, by whichever driver, finds the newest of them.
Who starts it again is the driver: only then can it tell what is worth another try, wait for a node aloud, and go on with
fewer workers.
"""

from __future__ import annotations

import logging
import os
import sys
import time

import psutil
import ray
import ray.train.torch
import torch
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig, TrainingFailedError, WorkerGroupError
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.torch.config import _TorchBackend  # it alone knows the workers before they meet
from ray.train.v2._internal.execution.worker_group import WorkerGroup
from torch import nn

from pipelines import cluster, paths, tracking, transport
from pipelines.journal import Journal
from pipelines.params import ClusterParams, Params
from pipelines.training import Left, Training
from ris_core.data.dataset import ShardStore
from ris_core.errors import ClusterError, RISError
from ris_core.options import Plain, deciding
from ris_core.training.run import make_trainer
from ris_core.training.runtime import LocalRuntime

PATIENCE = 3600  # seconds that a lost node may take to come back
TELLS_EVERY = 30
# Faults of our code: they come again however often they are tried.
OURS = (LookupError, TypeError, AttributeError, NameError, ImportError, AssertionError, ValueError)


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


def tracked_fit(params: Params, training: Training, name: str) -> None:
    """Run a training to its end, which its checkpoints then hold, in its MLflow run, which lacks nothing then."""
    assert training.params is not None
    left = Left(name, paths.storage())
    parent = (
        tracking.open_parent(params.register.experiment, training.name("two-stage"))
        if training.stage == "initialise"
        else tracking.parent_of(params.register.experiment, training.first_stage_run)
    )
    _, run_id = open_run(params, training, parent=parent)
    with tracking.running(run_id):
        position = left.checkpoints.position()
        if position is None or position.epoch < training.params.epochs:
            ShardStore(paths.shards(training.dataset)).verify()
            left.storage.check()
            with cluster.connected():
                fit(params.cluster, training, name, run_id)
            position = left.checkpoints.position()
        assert position is not None
        points = position.points
        tracking.patiently(lambda: tracking.log_points(run_id, points, tracking.logged(run_id)))
    left.note_logged()


def fit(place: ClusterParams, training: Training, name: str, run_id: str) -> None:
    """Run workers until the training's last checkpoint is written, starting them again after failures.

    Raises ClusterError if the cluster is too small or stays so, and what a worker raised if that is an error meant for
    people, or a fault of our code.
    """
    road = transport.Road.find()
    config = {
        "training": training,
        "name": name,
        "shards": road.offer(paths.shards(training.dataset)),
        "base": road.offer(training.base),
        "run_id": run_id,
        "storage": paths.storage(),
        "tracking_uri": tracking.uri(),
    }
    use_gpu = cluster.has_gpu(place.use_gpu)
    if road.storage is not None and tracking.uri().startswith(tracking.SQLITE):
        raise ClusterError(
            f"workers on other nodes could not log to {tracking.uri()}, a file of this machine: start a server (`mlflow "
            "server`) and set MLFLOW_TRACKING_URI to its address"
        )
    cluster.check_resources(place.least_and_most[0], place.cpus_per_worker or 1, int(use_gpu))
    checkpoints = Left(name, paths.storage()).checkpoints
    failures, newest = 0, checkpoints.names()[-1:]
    while True:
        workers, cpus = awaited(place, training, use_gpu)
        try:
            _run(config, name, workers, cpus, use_gpu)
            return
        except TrainingFailedError as error:
            reason = _reason(error)
            if isinstance(reason, RISError):
                raise reason from error
            if _only_late(error):
                print("the cluster is busy: waiting for workers", file=sys.stderr)
                continue
            if isinstance(reason, OURS):
                raise
            reached = checkpoints.names()[-1:]
            failures = failures + 1 if reached == newest else 1
            newest = reached
            told = str(reason).strip().splitlines() or [type(reason).__name__]
            if failures > place.max_failures:
                raise ClusterError(
                    f"the training was interrupted {failures} times without a new checkpoint between ({told[0]}). What was "
                    "saved is kept: start again to go on from there"
                ) from error
            goes = f"going on from {reached[0]}" if reached else "beginning again, as there is no checkpoint yet"
            print(f"the training was interrupted ({told[0]}): {goes}", file=sys.stderr)


def awaited(place: ClusterParams, training: Training, use_gpu: bool) -> tuple[int, int]:
    """Wait, aloud, until the cluster's nodes could hold the fewest workers: how many are taken, and CPUs for each.

    Of a range it is the most that fit and among which the batch divides. Raises ClusterError after `PATIENCE`.
    """
    assert training.params is not None
    batch = training.params.batch_images
    least, most = place.least_and_most
    began = told = time.monotonic()
    while True:
        for workers in range(most, least - 1, -1):
            cpus = place.cpus_per_worker or cluster.cpus_each(workers, int(use_gpu))
            if cluster.room(cpus, int(use_gpu)) >= workers and (batch % workers == 0 or least == most):
                if workers < most:
                    print(f"training with {workers} of at most {most} workers: no more fit now", file=sys.stderr)
                return workers, cpus
        now = time.monotonic()
        wanted = f"{least} workers of {place.cpus_per_worker or 1} CPU{' and a GPU' if use_gpu else ''} each"
        if now - began > PATIENCE:
            raise ClusterError(
                f"the nodes that are left could not hold {wanted} for {PATIENCE // 60} minutes. What was saved is kept: bring "
                "a node back, or let cluster.train_workers be a range, and start again"
            )
        if now - told > TELLS_EVERY or now - began < 1:
            print(f"waiting for nodes: there must be room for {wanted}", file=sys.stderr)
            told = now
        time.sleep(1)


def _run(config: Plain, name: str, workers: int, cpus: int, use_gpu: bool) -> None:
    resources = {"CPU": cpus, **({"GPU": 1} if use_gpu else {})}
    TorchTrainer(
        train_worker,
        train_loop_config=config,
        torch_config=NodesTorchConfig(),
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=use_gpu, resources_per_worker=resources),
        run_config=RunConfig(
            name=name,
            storage_path=config["storage"],
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=0, max_preemption_failures=0),
            logging_config=LoggingConfig(log_level="ERROR"),  # the driver tells of failures, the loop of its progress
        ),
    ).fit()


def _reason(error: TrainingFailedError) -> Exception:
    """Find what began it: of several workers' errors one meant for people, else a fault of our code, else any."""
    if not isinstance(error, WorkerGroupError):
        return _explained(getattr(error, "controller_failure", error))
    causes = [getattr(failure, "_base_exc", failure) for failure in error.worker_failures.values()]  # Ray wraps them
    for kind in (RISError, OURS):
        for cause in causes:
            if isinstance(cause, kind):
                return cause
    return next(iter(causes), error)


def _explained(error: Exception) -> Exception:
    """Say what to do where workers did not find each other."""
    text = str(error)
    if not any(word in text for word in ("Gloo", "gloo", "NCCL", "init_process_group")):
        return error
    line = next((line for line in reversed(text.strip().splitlines()) if line.strip()), text)
    return ClusterError(
        f"the workers could not connect to each other ({line.strip()}): name the network interface that the nodes share in "
        "GLOO_SOCKET_IFNAME (on GPUs NCCL_SOCKET_IFNAME), and see that their firewalls let each other in"
    )


def _only_late(error: TrainingFailedError) -> bool:
    """Tell whether workers did not start in time, because others use the cluster."""
    return "WorkerGroupStartupTimeoutError" in f"{type(getattr(error, 'controller_failure', None)).__name__} {error}"


class NodesTorchConfig(TorchConfig):
    """Ray's, whose workers first learn by which network interface the nodes know each other.

    Left to itself, gloo takes the one that the host's own name stands for, often the loopback.
    """

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _Backend


class _Backend(_TorchBackend):
    def on_start(self, worker_group: WorkerGroup, backend_config: TorchConfig) -> None:
        worker_group.execute(name_interface)
        super().on_start(worker_group, backend_config)


def name_interface() -> None:
    """Name the interface that has this node's address to gloo and NCCL, unless the environment names one."""
    address = ray.util.get_node_ip_address()
    found = [name for name, known in psutil.net_if_addrs().items() if any(each.address == address for each in known)]
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if found else ():
        os.environ.setdefault(variable, found[0])


class RayRuntime(LocalRuntime):
    """The loop's surroundings inside a Ray Train worker."""

    def __init__(self, left: Left) -> None:
        context = ray.train.get_context()
        self.checkpoints = left.checkpoints
        self.rank, self.world = context.get_world_rank(), context.get_world_size()
        self.device: torch.device = ray.train.torch.get_device()

    def prepare(self, model: nn.Module) -> nn.Module:
        if self.world > 1 and self.device.type == "cuda":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return ray.train.torch.prepare_model(model)


def train_worker(config: Plain) -> None:
    """Run in each Ray Train worker: build the system, then the library's loop."""
    logging.getLogger().setLevel(logging.WARNING)  # one of Ray's loggers escapes its LoggingConfig
    os.environ["MLFLOW_TRACKING_URI"] = config["tracking_uri"]
    try:
        _train(config)
    except RISError:
        logging.getLogger("ray.train").setLevel(
            logging.CRITICAL
        )  # the driver gives the message, Ray a traceback with it
        raise


def _train(config: Plain) -> None:
    training: Training = config["training"]
    assert training.params is not None
    store = ShardStore(config["shards"].local())
    store.verify()
    runtime = RayRuntime(Left(config["name"], config["storage"]))
    model = training.model(config["base"].local())
    trainer = make_trainer(model, training.params, store, runtime)
    if runtime.rank:
        trainer.fit()
        return
    journal = Journal(config["run_id"])
    try:
        trainer.fit(journal)
    finally:
        journal.close()
