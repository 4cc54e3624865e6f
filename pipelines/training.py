"""One training as the pipeline knows it: what it is called, what it has left, and whether anything is left to do.

A run's name ends in a fingerprint of parameters, data, initial weights and code. Started again after a crash it goes on
from its newest checkpoint in `RIS_STORAGE` (default `runs/`); with anything changed it is another run and starts afresh.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipelines import fingerprint, paths
from pipelines.params import Params
from ris_core.data.shards import MANIFEST
from ris_core.errors import ClusterError, DataError
from ris_core.files import file_sha256
from ris_core.models.contract import MapSystem
from ris_core.storage import Storage
from ris_core.training.checkpoint import Checkpoint, Checkpoints
from ris_core.training.params import SystemSection, TrainParams
from ris_core.training.run import first_stage_model, starting_model

Stage = Literal["initialise", "train"]


@dataclass(frozen=True)
class Training:
    """One training of a system on a dataset: a stage of it by its parameters (None where nothing is trained).

    `base` is the folder of what is begun with, a CLIP for stage `initialise` and a model for stage `train`; its digest
    stands for its content. `first_stage_run` names the run that trained a first stage before.
    """

    system: str
    dataset: str
    stage: Stage
    section: SystemSection
    params: TrainParams | None
    base: Path
    base_digest: str
    first_stage_run: str = ""

    @property
    def data_digest(self) -> str:
        """Give the digest of the shards that are read."""
        return file_sha256(paths.shards(self.dataset) / MANIFEST)

    def name(self, label: str | None = None) -> str:
        """Give `<label>-<system>-<dataset>-<fingerprint>`; the label is the stage, by default."""
        decisive = (self.section.model, self.params, self.data_digest, self.base_digest)
        name = fingerprint.run_name(self.stage, self.system, self.dataset, *decisive)
        return name if label is None else f"{label}{name.removeprefix(self.stage)}"

    def model(self, base: Path) -> MapSystem:
        """Make the model as training finds it, of a folder with the content of `base`."""
        make = {"initialise": first_stage_model, "train": starting_model}[self.stage]
        return make(self.section, self.system, base)


class Left:
    """What the run of a training leaves in the storage: checkpoints, and at its end a note that all of it is logged."""

    def __init__(self, name: str, storage: str):
        self.storage = Storage(storage).below(name)
        self.checkpoints = Checkpoints(self.storage.below("checkpoints"))

    def ended(self, epochs: int) -> bool:
        """Tell whether the newest checkpoint is of the end, and the tracking store of today was told all of it."""
        position = self.checkpoints.position()
        if position is None or position.epoch < epochs:
            return False
        try:
            return bool(json.loads(self.storage.read("logged.json"))["store"] == paths.tracking_uri())
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return False

    def note_logged(self) -> None:
        """Note that the tracking store was told all of it."""
        self.storage.write("logged.json", json.dumps({"store": paths.tracking_uri()}).encode())


def check_splits(dataset: str, needed: Sequence[str]) -> None:
    """Raise DataError, before anything is started, if there is nothing to train on, or to choose the best epoch by."""
    splits = json.loads((paths.shards(dataset) / MANIFEST).read_text(encoding="utf-8"))["splits"]
    missing = [split for split in needed if not splits.get(split, {}).get("refs")]
    if missing:
        raise DataError(
            f"{dataset} has no referents in {' and '.join(missing)}, which its training needs; it has "
            f"{', '.join(splits) or 'none at all'}. A model trained elsewhere can be scored on it"
        )


def trained(params: Params, training: Training) -> tuple[Checkpoint, str]:
    """Run a training from its beginning, or from where it was interrupted, to its end: final checkpoint and name of its run.

    One that has ended needs neither Ray nor MLflow. Raises ClusterError where nodes, storage or tracking store do not do.
    """
    name = training.name()
    assert training.params is not None
    left = Left(name, paths.storage())
    done = left.checkpoints.load() if left.ended(training.params.epochs) else None
    if done is not None and done.position.epoch >= training.params.epochs:  # else the newest one was damaged
        print(f"{name} was trained to its end before: nothing is left to do", file=sys.stderr)
        left.checkpoints.conclude()
        return done, name
    check_splits(training.dataset, ["train", training.params.validate_split])
    from pipelines import ray_training  # takes seconds

    ray_training.tracked_fit(params, training, name)
    done = left.checkpoints.load()
    if done is None or done.position.epoch < training.params.epochs:
        raise ClusterError(
            f"{name} was trained to its end, but {left.storage.place} does not hold that any more: start again"
        )
    left.checkpoints.conclude()
    return done, name
