"""`params.yaml` with the sections of the orchestration."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines import paths
from ris_core import config
from ris_core.data.own.description import named
from ris_core.data.refer.reader import DatasetName
from ris_core.errors import ConfigError, list_problems
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
    """Where work runs. It decides no result: the same is expected from one worker or many.

    `train_workers` is a number, or a range `[least, most]`: then as many as fit are taken, and after a node is lost the
    training goes on with those that are left. `max_failures` counts failures without a new checkpoint between them.
    """

    train_workers: Any = option(1)
    cpus_per_worker: int | None = option(None, minimum=1)
    use_gpu: str = option("auto", choices=("auto", "yes", "no"))
    max_failures: int = option(2, minimum=0)
    evaluate_actors: int = option(2, minimum=1)

    def __post_init__(self) -> None:
        given = self.train_workers
        numbers = list(given) if isinstance(given, list | tuple) else [given, given]
        if not (len(numbers) == 2 and all(type(each) is int for each in numbers) and 1 <= numbers[0] <= numbers[1]):
            problem = f"train_workers is {given!r}: a number from 1, or a range of two, [least, most]"
            raise ConfigError(list_problems("cluster", [problem]))

    @property
    def least_and_most(self) -> tuple[int, int]:
        """Give the fewest and the most workers of a training."""
        given = self.train_workers
        return (given, given) if isinstance(given, int) else (given[0], given[1])


@dataclass
class Params(config.Params):
    """The whole of `params.yaml`."""

    register: RegisterParams = field(default_factory=RegisterParams)
    cluster: ClusterParams = field(default_factory=ClusterParams)


def load_params(path: str | Path = "params.yaml") -> Params:
    """Read, check and merge a parameter file; see `ris_core.config.load_params`. Datasets of one's own have to be there."""
    return config.load_params_as(Params, path, dataset_name)


def dataset_name(name: str) -> DatasetName:
    """Give the dataset of that name: a published one, an embedded one, or one's own, which has a `dataset.yaml`.

    Raises DataError, with the known ones, if there is none.
    """
    root = paths.raw(name)
    return named(root) if root.name == name else DatasetName.parse(name)  # which refuses a path
