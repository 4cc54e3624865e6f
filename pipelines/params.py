"""`params.yaml` with the sections of the orchestration."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ris_core import config
from ris_core.options import option


@dataclass
class RegisterParams:
    """Stage `register`: log the model to MLflow and move the alias when the score is better than the champion's."""

    split: str = "val"
    metric: str = option("mIoU", choices=("mIoU", "oIoU"))
    minimum: float = option(0.0, minimum=0)
    alias: str = "champion"
    experiment: str = option("ris", decides=False)  # of all runs


@dataclass
class ClusterParams:
    """Where work runs. It decides no result: the same is expected from one worker or many."""

    train_workers: int = option(1, minimum=1)
    cpus_per_worker: int | None = option(None, minimum=1)
    use_gpu: str = option("auto", choices=("auto", "yes", "no"))
    max_failures: int = option(2, minimum=0)
    evaluate_actors: int = option(2, minimum=1)


@dataclass
class Params(config.Params):
    """The whole of `params.yaml`."""

    register: RegisterParams = field(default_factory=RegisterParams)
    cluster: ClusterParams = field(default_factory=ClusterParams)


def load_params(path: str | Path = "params.yaml") -> Params:
    """Read, check and merge a parameter file; see `ris_core.config.load_params`."""
    return config.load_params_as(Params, path)
