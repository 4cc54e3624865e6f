"""The only door to MLflow (besides the packaged model itself).

Without `MLFLOW_TRACKING_URI` runs go to an embedded sqlite store in `mlflow/`: no server is needed. The driver opens a
run and closes it; a restart with the same fingerprint goes on in the same run.
"""

from __future__ import annotations

import fcntl
import http.client
import logging
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import mlflow
from mlflow import MlflowClient, MlflowException
from mlflow.data.code_dataset_source import CodeDatasetSource
from mlflow.data.meta_dataset import MetaDataset
from mlflow.entities import DatasetInput, InputTag, Metric, Param
from sqlalchemy.exc import SQLAlchemyError

from pipelines import paths, relocation
from pipelines.fingerprint import git_commit
from ris_core.errors import ClusterError

MAX_PARAM = 6000
SQLITE = paths.SQLITE
ANSWER_SECONDS = 5
PATIENCE = 600  # seconds that a store which was there may be away
AGAIN_AFTER = 5
PASSING = {"INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED"}  # errors of a server that is away
BATCH = 1000  # metrics a request may hold
uri = paths.tracking_uri

T = TypeVar("T")
Points = Sequence[Mapping[str, float]]  # metrics, each row with its step
Logged = set[tuple[str, int]]


def _database(place: str) -> Path:
    return Path(place.removeprefix(SQLITE))


def connect() -> MlflowClient:
    """Make a client of the store, which is created and brought to its newest schema here, by one driver at a time.

    Raises ClusterError when the store cannot be used, a server within seconds (MLflow's own default is minutes).
    """
    place = uri()
    if place.startswith(SQLITE):
        _database(place).parent.mkdir(parents=True, exist_ok=True)
    elif place.startswith("http"):
        _check_answers(place)
    for name in ("alembic", "mlflow"):  # INFO tells of internals
        logging.getLogger(name).setLevel(logging.WARNING)
    mlflow.set_tracking_uri(place)
    try:
        with alone("mlflow"):  # which creates its tables unguarded
            if place.startswith(SQLITE):
                relocation.follow(_database(place))
            client = mlflow.MlflowClient()
            client.search_experiments(max_results=1)
    except (mlflow.MlflowException, SQLAlchemyError) as error:
        raise _unusable(place, error) from error
    return client


@contextmanager
def alone(what: str) -> Iterator[None]:
    """Keep out of the block other processes that do the same with the same sqlite store; a server has no such lock."""
    if not uri().startswith(SQLITE):
        yield
        return
    with (_database(uri()).parent / f"{what}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed
        yield


def _check_answers(server: str) -> None:
    """Raise ClusterError unless a server answers, with whatever status. MLflow itself would try for minutes."""
    try:
        urllib.request.urlopen(server, timeout=ANSWER_SECONDS).close()
    except urllib.error.HTTPError:
        return  # an answer, if only that one has to log in
    except (OSError, http.client.HTTPException) as error:
        raise _unusable(server, error) from error


def _unusable(place: str, error: Exception) -> ClusterError:
    reason = str(error).splitlines()[0]
    remedy = "Start it, or unset MLFLOW_TRACKING_URI to use the embedded store"
    return ClusterError(f"the MLflow store at {place} cannot be used: {reason}. {remedy}")


def _experiment(client: MlflowClient, name: str) -> str:
    """Give the id of the experiment; a new one keeps a sqlite store's artifacts beside its database."""
    found = client.get_experiment_by_name(name)
    if found is None:
        beside = (_database(uri()).parent / "artifacts").as_uri() if uri().startswith(SQLITE) else None
        try:
            return client.create_experiment(name, artifact_location=beside)
        except MlflowException:  # another process created it between the two calls
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    return found.experiment_id


def open_run(
    experiment: str, name: str, params: Mapping[str, Any], tags: Mapping[str, str], parent: str | None = None
) -> str:
    """Give the id of run `name` (which ends in its fingerprint): the one there is, set running again, or a new one.

    A new one is shown under the run `parent`, if the store has that.
    """
    client = connect()
    experiment_id = _experiment(client, experiment)
    known = find_run(experiment, name)
    if known:
        client.update_run(known, status="RUNNING")
        return known
    lineage = {"ris.run": name, "ris.git_commit": git_commit(), **dvc_tags(), **tags}
    if parent is not None and has_run(parent):
        lineage["mlflow.parentRunId"] = parent
    run_id = client.create_run(experiment_id, tags=lineage, run_name=name).info.run_id
    client.log_batch(run_id, params=[Param(key, str(value)[:MAX_PARAM]) for key, value in flat(params).items()])
    return run_id


def open_parent(experiment: str, name: str) -> str:
    """Give the id of a run that only holds others: the stages of one training are its children."""
    run_id = open_run(experiment, name, {}, {})
    connect().set_terminated(run_id)
    return run_id


def parent_of(experiment: str, name: str) -> str | None:
    """Give the id of the run that the one called `name` is shown under, if the store has both."""
    client = connect()
    run_id = find_run(experiment, name)
    found = client.get_run(run_id).data.tags.get("mlflow.parentRunId") if run_id else None
    return found if found and has_run(found) else None


def find_run(experiment: str, name: str) -> str | None:
    """Give the id of the run called `name`; a model from DVC's cache was trained with another store, perhaps."""
    if "'" in name:  # no name of ours, and it would end the filter
        return None
    client = connect()
    found = client.search_runs([_experiment(client, experiment)], f"tags.`ris.run` = '{name}'", max_results=1)
    return str(found[0].info.run_id) if found else None


def has_run(run_id: str) -> bool:
    """Tell whether the store has this run."""
    client = connect()
    try:
        return bool(client.get_run(run_id).info.lifecycle_stage == "active")
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return False


def dvc_tags() -> dict[str, str]:
    """Give the DVC experiment and stage this process runs in, where DVC says so."""
    names = ("DVC_EXP_NAME", "DVC_EXP_BASELINE_REV", "DVC_STAGE")
    return {f"dvc.{name[4:].lower()}": os.environ[name] for name in names if os.environ.get(name)}


def flat(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Give nested sections as dotted names, the form in which MLflow shows and compares parameters."""
    result: dict[str, Any] = {}
    for key, value in section.items():
        if isinstance(value, Mapping):
            result |= flat(value, f"{prefix}{key}.")
        else:
            result[f"{prefix}{key}"] = value
    return result


def metric_name(name: str) -> str:
    """Replace '@', which MLflow rejects in metric names: `Pr@0.5` becomes `Pr_0.5`."""
    return name.replace("@", "_")


def log_metrics(run_id: str, metrics: Mapping[str, float], step: int) -> None:
    """Log all metrics of a step in one request."""
    now = int(time.time() * 1000)
    batch = [Metric(metric_name(name), float(value), now, step) for name, value in metrics.items()]
    MlflowClient(uri()).log_batch(run_id, metrics=batch)


def logged(run_id: str) -> Logged:
    """Give (name, step) of all metrics that a run has, but for this machine's load."""
    client = MlflowClient(uri())
    names = [name for name in client.get_run(run_id).data.metrics if not name.startswith("system/")]
    return {(name, each.step) for name in names for each in client.get_metric_history(run_id, name)}


def log_points(run_id: str, points: Points, there: Logged) -> None:
    """Log rows of metrics, each with its `step`, but those that are `there`, so that none is logged twice."""
    client, now = MlflowClient(uri()), int(time.time() * 1000)
    new = [
        Metric(metric_name(name), float(value), now, int(row["step"]))
        for row in points
        for name, value in row.items()
        if name != "step" and (metric_name(name), int(row["step"])) not in there
    ]
    for first in range(0, len(new), BATCH):
        client.log_batch(run_id, metrics=new[first : first + BATCH])


def patiently(ask: Callable[[], T], seconds: float = PATIENCE) -> T:
    """Ask the store until it answers, saying on stderr that it is waited for.

    Raises ClusterError when it stays away, and at once what it answers if that is an error of another kind.
    """
    deadline, told = time.monotonic() + seconds, False
    while True:
        try:
            return ask()
        except MlflowException as error:
            if error.error_code not in PASSING:
                raise
            if time.monotonic() > deadline:
                raise _unusable(uri(), error) from error
            if not told:
                print(f"the MLflow store at {uri()} does not answer: waiting for it", file=sys.stderr)
            told = True
        time.sleep(AGAIN_AFTER)


def log_dataset(run_id: str, name: str, path: Path, digest: str, context: str) -> None:
    """Record which data a run used: its DVC path and the digest of its manifest."""
    dataset = MetaDataset(CodeDatasetSource(tags={"dvc.path": str(path)}), name=name, digest=digest[:36])
    entry = DatasetInput(dataset._to_mlflow_entity(), tags=[InputTag("mlflow.data.context", context)])
    connect().log_inputs(run_id, [entry])


@contextmanager
def running(run_id: str, system_metrics: bool = True) -> Iterator[None]:
    """Mark the run FINISHED when the block ends, FAILED when it raises; sample this machine's load meanwhile."""
    client = connect()
    monitor = None
    if system_metrics:
        # Wants psutil, which is there where stages are, and need not be where versions are looked at.
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        monitor = SystemMetricsMonitor(run_id, sampling_interval=5)
        monitor.start()
    status = "FAILED"
    try:
        yield
        status = "FINISHED"
    finally:
        if monitor:
            monitor.finish()
        patiently(lambda: client.set_terminated(run_id, status))
