"""The only door to MLflow (besides the packaged model itself).

Without `MLFLOW_TRACKING_URI` runs go to an embedded sqlite store in `mlflow/`: no server is needed. The driver opens a
run and closes it; a restart with the same fingerprint goes on in the same run.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.fingerprint import git_commit
from ris_core.errors import ClusterError

if TYPE_CHECKING:
    from mlflow import MlflowClient

FOLDER = Path("mlflow")
MAX_PARAM = 6000
SQLITE = "sqlite:///"
ANSWER_SECONDS = 5


def uri() -> str:
    """The tracking store: `MLFLOW_TRACKING_URI`, or the embedded sqlite file (absolute, so that workers find it)."""
    place = os.environ.get("MLFLOW_TRACKING_URI") or f"{SQLITE}{FOLDER / 'mlflow.db'}"
    return f"{SQLITE}{_database(place).absolute()}" if place.startswith(SQLITE) else place


def _database(place: str) -> Path:
    return Path(place.removeprefix(SQLITE))


def connect() -> MlflowClient:
    """A client of the store, which is created and brought to its newest schema here, by one driver at a time.

    Raises ClusterError when the store cannot be used, a server within seconds (MLflow's own default is minutes).
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    place = uri()
    if place.startswith(SQLITE):
        _database(place).parent.mkdir(parents=True, exist_ok=True)
    elif place.startswith("http"):
        _check_answers(place)
    import logging

    logging.getLogger("alembic").setLevel(logging.WARNING)
    import mlflow
    from sqlalchemy.exc import SQLAlchemyError

    mlflow.set_tracking_uri(place)
    try:
        with _alone(place):
            client = mlflow.MlflowClient()
            client.search_experiments(max_results=1)
    except (mlflow.MlflowException, SQLAlchemyError) as error:
        raise _unusable(place, error) from error
    return client


@contextmanager
def _alone(place: str) -> Iterator[None]:
    """Inside the block no other process is, of those that use the same sqlite store: MLflow creates its tables unguarded."""
    if not place.startswith(SQLITE):
        yield
        return
    import fcntl

    with _database(place).with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed
        yield


def _check_answers(server: str) -> None:
    """Raise ClusterError unless a server answers, with whatever status. MLflow itself would try for minutes."""
    import http.client
    import urllib.error
    import urllib.request

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
    """Id of the experiment; a new one keeps a sqlite store's artifacts beside its database."""
    from mlflow import MlflowException

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
    """Id of the run called `name` (which ends in its fingerprint): the one there is, set running again, or a new one.

    A new one is shown under the run `parent`, if the store has that.
    """
    client = connect()
    experiment_id = _experiment(client, experiment)
    found = client.search_runs([experiment_id], f"tags.`ris.run` = '{name}'", max_results=1)
    if found:
        run_id = found[0].info.run_id
        client.update_run(run_id, status="RUNNING")
        return run_id
    lineage = {"ris.run": name, "ris.git_commit": git_commit(), **dvc_tags(), **tags}
    if parent is not None and has_run(parent):
        lineage["mlflow.parentRunId"] = parent
    run_id = client.create_run(experiment_id, tags=lineage, run_name=name).info.run_id
    from mlflow.entities import Param

    client.log_batch(run_id, params=[Param(key, str(value)[:MAX_PARAM]) for key, value in flat(params).items()])
    return run_id


def open_parent(experiment: str, name: str) -> str:
    """Id of a run that only holds others: the stages of one training are its children."""
    run_id = open_run(experiment, name, {}, {})
    connect().set_terminated(run_id)
    return run_id


def has_run(run_id: str) -> bool:
    """Whether the store has this run; a model from DVC's cache was trained with another store, perhaps."""
    from mlflow import MlflowException

    client = connect()
    try:
        return bool(client.get_run(run_id).info.lifecycle_stage == "active")
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return False


def dvc_tags() -> dict[str, str]:
    """The DVC experiment and stage this process runs in, where DVC says so."""
    names = ("DVC_EXP_NAME", "DVC_EXP_BASELINE_REV", "DVC_STAGE")
    return {f"dvc.{name[4:].lower()}": os.environ[name] for name in names if os.environ.get(name)}


def flat(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as dotted names, the form in which MLflow shows and compares parameters."""
    result: dict[str, Any] = {}
    for key, value in section.items():
        if isinstance(value, Mapping):
            result |= flat(value, f"{prefix}{key}.")
        else:
            result[f"{prefix}{key}"] = value
    return result


def metric_name(name: str) -> str:
    """MLflow rejects '@' in metric names: `Pr@0.5` becomes `Pr_0.5`."""
    return name.replace("@", "_")


def log_metrics(run_id: str, metrics: Mapping[str, float], step: int) -> None:
    """All metrics of a step in one request."""
    from mlflow import MlflowClient
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    batch = [Metric(metric_name(name), float(value), now, step) for name, value in metrics.items()]
    MlflowClient(uri()).log_batch(run_id, metrics=batch)


def log_dataset(run_id: str, name: str, path: Path, digest: str, context: str) -> None:
    """Record which data a run used: its DVC path and the digest of its manifest."""
    from mlflow.data.code_dataset_source import CodeDatasetSource
    from mlflow.data.meta_dataset import MetaDataset
    from mlflow.entities import DatasetInput, InputTag

    dataset = MetaDataset(CodeDatasetSource(tags={"dvc.path": str(path)}), name=name, digest=digest[:36])
    entry = DatasetInput(dataset._to_mlflow_entity(), tags=[InputTag("mlflow.data.context", context)])
    connect().log_inputs(run_id, [entry])


@contextmanager
def running(run_id: str, system_metrics: bool = True) -> Iterator[None]:
    """Mark the run FINISHED when the block ends, FAILED when it raises; sample this machine's load meanwhile."""
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    client = connect()
    monitor = SystemMetricsMonitor(run_id, sampling_interval=5) if system_metrics else None
    if monitor:
        monitor.start()
    status = "FAILED"
    try:
        yield
        status = "FINISHED"
    finally:
        if monitor:
            monitor.finish()
        client.set_terminated(run_id, status)


def register_model(
    run_id: str,
    name: str,
    folder: Path,
    metrics: Mapping[str, float],
    tags: Mapping[str, str],
    pictures: Path | None,
    notice: str | None = None,
) -> str:
    """Log a model folder as a pyfunc model of the run, with signature and input example, and register it; its version.

    `notice` becomes the description of the version. One with the same weights, configuration, data, score and code (by
    its tags) is not registered twice.
    """
    import base64
    import io

    import mlflow
    import numpy as np
    import pandas as pd
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema
    from PIL import Image

    client = connect()
    same = client.search_model_versions(f"name = '{name}'")
    alike = ("weights_sha256", "clip_digest", "config_digest", "data_digest", "code_digest", "score")
    for version in same:
        if all(version.tags.get(key) == tags[key] for key in alike):
            return str(version.version)
    buffer = io.BytesIO()
    Image.fromarray(np.full((48, 64, 3), 127, np.uint8)).save(buffer, "PNG")
    example = pd.DataFrame({"image": [base64.b64encode(buffer.getvalue()).decode()], "text": ["the red star"]})
    root = Path(__file__).parent.parent
    with tempfile.TemporaryDirectory() as place, mlflow.start_run(run_id=run_id):
        copy = shutil.copytree(folder, Path(place) / "model")  # MLflow refuses links, which DVC's cache may make
        logged = mlflow.pyfunc.log_model(
            name=name,
            python_model=str(root / "pipelines" / "serving_model.py"),
            artifacts={"model": str(copy)},
            code_paths=[str(root / "ris_core")],
            signature=ModelSignature(
                inputs=Schema([ColSpec("string", "image"), ColSpec("string", "text")]),
                outputs=Schema(
                    [
                        ColSpec("string", "counts"),
                        ColSpec("long", "height"),
                        ColSpec("long", "width"),
                        ColSpec("double", "score"),
                    ]
                ),
                params=ParamSchema([ParamSpec("threshold", "double", 0.5)]),
            ),
            model_config={"allow_paths": False},  # who loads the model in process may set it, a client may not
            input_example=example,
            pip_requirements=requirements(),
        )
        if pictures is not None:
            mlflow.log_artifacts(str(pictures), "gallery")
    log_metrics(run_id, {f"test/{key}": value for key, value in metrics.items()}, 0)
    print(f"logged {logged.model_uri}", file=sys.stderr)
    number = str(mlflow.register_model(logged.model_uri, name, tags=dict(tags)).version)
    if notice:
        client.update_model_version(name, number, description=notice)
    return number


def requirements() -> list[str]:
    """What the packaged model needs, at the versions it was tested with."""
    from importlib.metadata import version

    needed = (
        "mlflow",
        "torch",
        "torchvision",
        "open_clip_torch",
        "timm",
        "numpy",
        "pandas",
        "pyarrow",
        "pillow",
        "pycocotools",
        "omegaconf",
        "safetensors",
        "scikit-image",
    )
    return [f"{name}=={version(name)}" for name in needed]


def promote(name: str, version: str, alias: str, tags: Mapping[str, str], minimum: float) -> dict[str, str]:
    """Move `alias` to `version` if its score is at least `minimum` and better than that of the version that has it.

    Scores are compared only for the same protocol, split and metric on the same data; another champion keeps its alias
    until it is removed by hand.
    """
    from mlflow import MlflowException

    client = connect()
    score = float(tags["score"])
    if score < minimum:
        return {"version": version, "decision": f"not promoted: {score} is below the minimum {minimum}"}
    try:
        champion = client.get_model_version_by_alias(name, alias)
    except MlflowException as error:
        if "alias" not in str(error).lower():
            raise
        champion = None
    if champion is not None and str(champion.version) == version:
        return {"version": version, "decision": f"already {alias}"}
    if champion is not None:
        differing = [k for k in ("protocol", "split", "metric", "data_digest") if champion.tags.get(k) != tags[k]]
        if differing:
            reason = f"version {champion.version} was scored with another {', '.join(differing)}"
            return {"version": version, "decision": f"challenger: {reason}; not comparable"}
        if float(champion.tags["score"]) >= score:
            beaten = f"version {champion.version} has {champion.tags['score']}"
            return {"version": version, "decision": f"challenger: {beaten}"}
    client.set_registered_model_alias(name, alias, version)
    return {"version": version, "decision": f"{alias}"}


def model_folder(model: str) -> Path:
    """The local folder of a trained model: a path as it is, or `models:/...` fetched from the registry."""
    if not model.startswith("models:/"):
        return Path(model)
    import mlflow

    connect()
    try:
        return Path(mlflow.artifacts.download_artifacts(f"{model.rstrip('/')}/artifacts/model"))
    except mlflow.MlflowException as error:
        raise ClusterError(f"{model} cannot be loaded from {uri()}: {str(error).splitlines()[0]}") from error
