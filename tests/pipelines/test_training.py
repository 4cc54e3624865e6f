"""What a training is called, which decides whether it goes on or starts afresh, and how it travels to Ray's workers."""

from __future__ import annotations

from pathlib import Path

import pytest
import ray.cloudpickle
from pipelines_world import DATASET, Workplace, python

from pipelines import inputs, paths, stage
from pipelines.training import Stage, Training, check_splits
from ris_core.errors import DataError
from ris_core.options import digest


def training_of(what: Stage, system: str) -> Training:
    """As the stage makes it: of the section's parts only those that DVC watches can be read."""
    section = stage.params(what, system).of(system)
    params, base = {
        "initialise": (section.initialise, paths.clip("vit")),
        "train": (section.train, paths.start(system, DATASET)),
    }[what]
    return Training(system, DATASET, what, section, params, base, "0" * 12)


@pytest.mark.parametrize(
    "changes",
    [
        {"train": {"loader_workers": 3}},
        {"train": {"checkpoint_every_steps": 7}},
        {"cris": {"train": {"loader_workers": 3, "checkpoint_every_steps": 7}}},
        {"cluster": {"train_workers": 2, "max_failures": 5}},
        {"evaluate": {"bootstrap_samples": 7}, "register": {"minimum": 0.5}},
        {"risclip": {"train": {"lr": 1.0}, "initialise": {"lr": 1.0}, "model": {"cfe_dim": 32}}},
        {"preset": "other", "presets": {"other": {"evaluate": {"bootstrap_samples": 7}}}},
    ],
    ids=str,
)
def test_what_decides_no_weights_changes_no_name(changes: dict[str, object], workplace: Workplace) -> None:
    workplace.link("shards")
    before = training_of("train", "cris").name()
    workplace.change(**changes)
    assert training_of("train", "cris").name() == before


@pytest.mark.parametrize(
    "changes",
    [
        {"train": {"seed": 1}},
        {"train": {"loss": {"focal_gamma": 3.0}}},
        {"cris": {"train": {"validate_images": 3}}},
        {"cris": {"model": {"ffn_dim": 48}}},
        {"preset": "other", "presets": {"other": {"train": {"lr": 0.1}}}},
    ],
    ids=str,
)
def test_what_decides_the_weights_is_in_the_name(changes: dict[str, object], workplace: Workplace) -> None:
    workplace.link("shards")
    before = training_of("train", "cris").name()
    workplace.change(**changes)
    assert training_of("train", "cris").name() != before


def test_splits_that_training_needs_are_looked_for_before_anything_starts(workplace: Workplace) -> None:
    workplace.link("shards")
    check_splits(DATASET, ["train", "val"])
    with pytest.raises(DataError, match=r"has no referents in test, which its training needs; it has .*train.*scored"):
        check_splits(DATASET, ["train", "test"])


RENAMED = {  # of what: the training of CRIS, the first stage of RISCLIP, its second
    "ris_core/models/cris/system.py": (True, False, False),
    "ris_core/models/cris/layers.py": (True, False, False),
    "ris_core/models/risclip/system.py": (False, True, True),
    "ris_core/models/risclip/frozen_clip.py": (False, True, True),
    "ris_core/models/lts/system.py": (False, False, False),
    "ris_core/models/global_local/visual.py": (False, False, False),
    "ris_core/models/layers.py": (True, True, True),
    "ris_core/models/losses.py": (True, True, True),
    "ris_core/models/contract.py": (True, True, True),
    "ris_core/models/configs/tiny_rn.json": (True, True, True),
    "ris_core/training/loop.py": (True, True, True),
    "ris_core/training/optim.py": (True, True, True),
    "ris_core/data/dataset.py": (True, True, True),
    "ris_core/evaluation/evaluator.py": (True, True, True),  # validation chooses the epoch
    "pipelines/training.py": (True, True, True),
    "pipelines/ray_training.py": (True, True, True),
    "pipelines/journal.py": (False, False, False),
    "pipelines/transport.py": (False, False, False),
    "pipelines/train.py": (True, False, True),
    "pipelines/initialise.py": (False, True, False),
    "pipelines/cluster.py": (False, False, False),
    "pipelines/tracking.py": (False, False, False),
    "pipelines/evaluate.py": (False, False, False),
    "ris_core/config.py": (False, False, False),  # its values are in the name themselves
    "ris_core/evaluation/cost.py": (False, False, False),
    "ris_core/evaluation/behaviour.py": (False, False, False),
    "ris_core/data/shapes/wording.py": (False, False, False),
    "ris_core/predictor.py": (False, False, False),
}


def test_code_is_in_the_name_of_what_runs_it(workplace: Workplace, sources: Path) -> None:
    workplace.link("shards")
    trainings = [training_of("train", "cris"), training_of("initialise", "risclip"), training_of("train", "risclip")]

    def renamed(file: str) -> tuple[bool, ...]:
        before = [training.name() for training in trainings]
        with (sources / file).open("a") as opened:
            opened.write("\n")
        return tuple(training.name() != name for training, name in zip(trainings, before, strict=True))

    assert {file: renamed(file) for file in RENAMED} == RENAMED


def test_another_system_beside_changes_no_name(workplace: Workplace, sources: Path) -> None:
    workplace.link("shards")
    training = training_of("train", "cris")
    before = training.name()
    (sources / "ris_core/models/fifth").mkdir()
    (sources / "ris_core/models/fifth/__init__.py").write_text("from ris_core.models.cris import CRIS as SYSTEM\n")
    assert training.name() == before
    (sources / "ris_core/models/cris/__init__.py").write_text("from ris_core.models.cris.more import SYSTEM\n")
    (sources / "ris_core/models/cris/more.py").write_text("from ris_core.models.cris.system import CRIS as SYSTEM\n")
    inputs.code.cache_clear()
    changed = training.name()
    assert changed != before
    (sources / "ris_core/models/cris/more.py").write_text("SYSTEM = None\n")  # a new file of its own is followed
    assert training.name() != changed


@pytest.mark.parametrize(
    ("what", "system", "unread"), [("train", "cris", "initialise"), ("initialise", "risclip", "train")]
)
def test_a_training_travels_to_another_process(what: Stage, system: str, unread: str, workplace: Workplace) -> None:
    """Classes of sections are made at run time; the worker gets them whole, what it must not read included."""
    workplace.link("shards")
    training = training_of(what, system)
    Path("training.pkl").write_bytes(ray.cloudpickle.dumps(training))
    done = python(
        "-c",
        "import pickle\n"
        "from ris_core.models.registry import system_class\n"
        "from ris_core.options import digest\n"
        "from ris_core.training.params import SystemSection, TrainParams\n"
        "training = pickle.load(open('training.pkl', 'rb'))\n"
        "assert isinstance(training.section, SystemSection)\n"
        "assert type(training.section.model) is system_class(training.system).config_class\n"
        "assert type(training.params) is TrainParams\n"
        "print(training.system, training.base, digest([training.section.model, training.params]))\n"
        f"print(training.section.{unread}.epochs)\n",
        cwd=workplace.root,
    )
    values = digest([training.section.model, training.params])
    assert done.stdout == f"{system} {training.base} {values}\n", done.stderr
    told = f"LookupError: stage {what} reads {system}.{unread}.epochs: name it in pipelines.inputs.SECTIONS"
    assert done.stderr.splitlines()[-1] == told
