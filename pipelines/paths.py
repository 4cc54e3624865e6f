"""Where everything lies, relative to the repository root (the working directory of every stage)."""

from __future__ import annotations

import os
from pathlib import Path

PARAMS = Path("params.yaml")
WATCHED = Path("results/params")
REPORT = Path("results/report")
TRACKING = Path("mlflow")  # the embedded store
SQLITE = "sqlite:///"
WAITING = Path("results/waiting.json")  # by `python -m benchmarks.waiting --record` alone: no two machines agree on it


def plain(name: str) -> str:
    """Give the name of a run or a model without characters that URLs, filters and stores would need quoted.

    ris-cris-shapes+ is ris-cris-shapesp, and ris-cris-shapes* is ris-cris-shapesstar.
    """
    return name.replace("+", "p").replace("*", "star")


def watched(name: str) -> Path:
    """Locate the values that decide a stage's result; the names are those of `pipelines.inputs.name`."""
    return WATCHED / f"{name}.json"


def raw(dataset: str) -> Path:
    """Locate a dataset in the official REFER layout; for a real one, a folder or link of the user's."""
    return Path("data/raw") / dataset


def records(dataset: str) -> Path:
    return Path("data/records") / f"{dataset}.parquet"


def audit(dataset: str) -> Path:
    return Path("results/audit") / f"{dataset}.json"


def shards(dataset: str) -> Path:
    return Path("data/shards") / dataset


def proposals(dataset: str) -> Path:
    """Locate masks to choose among, as a folder that `ris_core.data.proposal_store` reads."""
    return Path("data/proposals") / dataset


def proposal_scores(dataset: str) -> Path:
    return Path("results/proposals") / f"{dataset}.json"


def clip(name: str) -> Path:
    """Locate a CLIP that systems start from, as a folder that `ris_core.models.clip.load_saved_clip` reads."""
    return Path("data/clip") / name


def clip_scores(name: str) -> Path:
    return Path("results/clip") / f"{name}.json"


def start(system: str, dataset: str) -> Path:
    """Locate the model that training starts from, as a folder that `ris_core.models.registry.load_model` reads."""
    return Path("models/start") / f"{system}-{dataset}"


def initialisation(system: str, dataset: str) -> Path:
    return Path("results/initialise") / f"{system}-{dataset}"


def model(system: str, dataset: str) -> Path:
    """Locate the trained model as a folder that `ris_core.models.registry.load_model` reads."""
    return Path("models") / f"{system}-{dataset}"


def training(system: str, dataset: str) -> Path:
    return Path("results/train") / f"{system}-{dataset}"


def evaluation(system: str, dataset: str) -> Path:
    return Path("results/evaluate") / f"{system}-{dataset}"


def expressions(system: str, dataset: str) -> Path:
    """Locate the per-expression tables of an evaluation, one Parquet file per protocol."""
    return Path("data/expressions") / f"{system}-{dataset}"


def comparison(dataset: str) -> Path:
    """Locate how the systems compare on one dataset: paired tests, and pictures of hard expressions."""
    return Path("results/compare") / dataset


def registration(system: str, dataset: str) -> Path:
    """Tell where it stands that a version is in the tracking store: beside the embedded one, with which it comes and goes.

    Not among the results in git, as a fresh clone has them and no version.
    """
    return TRACKING / "registered" / f"{system}-{dataset}.json"


def storage() -> str:
    """Locate checkpoints, and what travels between nodes: `RIS_STORAGE` (a folder all nodes mount, or a bucket), else `runs/`."""
    place = os.environ.get("RIS_STORAGE") or "runs"
    return place if "://" in place else str(Path(place).absolute())


def tracking_uri() -> str:
    """Locate the tracking store: `MLFLOW_TRACKING_URI`, or the embedded sqlite file (absolute, so that workers find it)."""
    place = os.environ.get("MLFLOW_TRACKING_URI") or f"{SQLITE}{TRACKING / 'mlflow.db'}"
    return f"{SQLITE}{Path(place.removeprefix(SQLITE)).absolute()}" if place.startswith(SQLITE) else place
