"""Versions in the MLflow registry: packaging a model, moving the champion's alias, fetching one."""

from __future__ import annotations

import base64
import io
import shutil
import sys
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
from mlflow import MlflowException
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema
from PIL import Image

from pipelines import tracking
from ris_core.errors import ClusterError

OF_MODEL = ("weights_sha256", "clip_digest", "config_digest", "data_digest")  # tags that tell one model from another


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
    client = tracking.connect()
    same = client.search_model_versions(f"name = '{name}'")
    for known in same:
        if all(known.tags.get(key) == tags[key] for key in (*OF_MODEL, "code_digest", "score")):
            return str(known.version)
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
    tracking.log_metrics(run_id, {f"test/{key}": value for key, value in metrics.items()}, 0)
    print(f"logged {logged.model_uri}", file=sys.stderr)
    number = str(mlflow.register_model(logged.model_uri, name, tags=dict(tags)).version)
    if notice:
        client.update_model_version(name, number, description=notice)
    return number


def requirements() -> list[str]:
    """List what the packaged model needs, at the versions it was tested with."""
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
    until it is removed by hand. The same model with other code takes over unless its score is lower: faults that were
    mended must not stay in service.
    """
    client = tracking.connect()
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
        other_code = all(tags.get(key) and champion.tags.get(key) == tags[key] for key in OF_MODEL)
        if float(champion.tags["score"]) > score or (float(champion.tags["score"]) == score and not other_code):
            beaten = f"version {champion.version} has {champion.tags['score']}"
            return {"version": version, "decision": f"challenger: {beaten}"}
    client.set_registered_model_alias(name, alias, version)
    return {"version": version, "decision": f"{alias}"}


def fetch(model: str) -> Path:
    """Give the local folder of the model that `models:/name/version`, `models:/name@alias` or `runs:/id/name` means.

    Raises ClusterError if the store has none.
    """
    tracking.connect()
    try:
        return Path(mlflow.artifacts.download_artifacts(f"{model.rstrip('/')}/artifacts/model"))
    except (MlflowException, OSError) as error:
        raise ClusterError(f"{model} cannot be loaded from {tracking.uri()}: {str(error).splitlines()[0]}") from error
