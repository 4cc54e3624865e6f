"""Stage `initialise`: what training starts from; for RISCLIP its first stage, under Ray Train, and then `train` from it."""

from __future__ import annotations

import csv
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import pytest
import torch
from pipelines_world import DATASET, SYSTEM, Workplace, contents, open_workplace
from safetensors.torch import load_file

from pipelines import cluster, initialise, paths, ray_training, tracking, train
from pipelines.params import ClusterParams, Params
from pipelines.training import Training
from ris_core.data.dataset import ShardStore
from ris_core.errors import ConfigError, WeightsError
from ris_core.files import file_sha256
from ris_core.models.clip import read_clip_config
from ris_core.models.registry import ModelInfo, load_model, read_description
from ris_core.models.risclip import RISCLIPConfig
from ris_core.options import Plain
from ris_core.storage import Storage
from ris_core.training.checkpoint import Checkpoints
from ris_core.training.run import first_stage_model, initial_model, make_trainer, starting_model
from ris_core.training.runtime import LocalRuntime

if TYPE_CHECKING:
    from tiny_world import Tiny

TWO = "risclip"
START, MODEL, RESULTS = paths.start(TWO, DATASET), paths.model(TWO, DATASET), paths.initialisation(TWO, DATASET)


def same_weights(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    assert first.keys() == second.keys() != set()
    return all(torch.allclose(first[name], second[name], rtol=0, atol=1e-6) for name in first)


# A system with one stage


def test_fresh_layers_on_a_clip_need_no_cluster_and_no_tracking(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "connected", lambda **_: pytest.fail("Ray was asked for"))
    monkeypatch.setattr(tracking, "connect", lambda: pytest.fail("MLflow was asked for"))
    workplace.link("shards", "clip")
    initialise.main(SYSTEM, DATASET)
    tiny, folder = workplace.tiny, paths.start(SYSTEM, DATASET)
    params = tiny.params()
    weights = load_file(folder / "model.safetensors")
    expected = initial_model(params.of(SYSTEM), SYSTEM, tiny.clip, None, params.train.seed)
    assert all(torch.equal(weights[name], value) for name, value in expected.items())
    assert read_description(folder).info == ModelInfo(
        dataset=DATASET,
        image_size=64,
        resample="opencv4",
        clip_digest=file_sha256(tiny.clip / "clip.safetensors"),
        data_digest=file_sha256(tiny.shards / "manifest.json"),
    )
    assert json.loads((paths.initialisation(SYSTEM, DATASET) / "metrics.json").read_text()) == {}
    assert workplace.files() == {
        *(f"models/start/cris-shapes/{name}" for name in ("model.json", "model.safetensors", "clip/clip.json")),
        "results/initialise/cris-shapes/metrics.json",
    }
    before = contents(folder)
    torch.manual_seed(99)
    initialise.main(SYSTEM, DATASET)
    assert contents(folder) == before  # the same bytes: training is not run again


def test_the_seed_and_the_dimensions_decide_what_is_written(workplace: Workplace) -> None:
    workplace.link("shards", "clip")
    weights = paths.start(SYSTEM, DATASET) / "model.safetensors"
    made = []
    for change in ({}, {"train": {"seed": 1}}, {"cris": {"model": {"ffn_dim": 48}}}):
        workplace.change(**change)
        initialise.main(SYSTEM, DATASET)
        made.append(file_sha256(weights))
    assert len(set(made)) == 3
    workplace.change(cris={"train": {"lr": 9e-3}}, risclip={"model": {"cfe_dim": 32}})  # of training, of another system
    initialise.main(SYSTEM, DATASET)
    assert file_sha256(weights) == made[-1]


def test_what_is_missing_is_named(workplace: Workplace) -> None:
    workplace.link("shards", "clip")
    with pytest.raises(WeightsError, match=r"no saved CLIP in data/clip/vit: clip\.json is missing"):
        initialise.main(TWO, DATASET)
    assert workplace.files() == set()


# A system with two stages


class Enough(Exception):
    """What was wanted is seen."""


@pytest.mark.ray
def test_a_changed_input_is_another_first_stage(
    workplace: Workplace, store: Path, ray_session: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, str]] = []

    def fit(place: ClusterParams, training: Training, name: str, run_id: str) -> NoReturn:
        assert (training.stage, training.base) == ("initialise", paths.clip("vit"))
        seen.append((name, run_id))
        raise Enough

    def start() -> tuple[str, str]:
        with pytest.raises(Enough):
            initialise.main(TWO, DATASET)
        return seen[-1]

    monkeypatch.setattr(ray_training, "fit", fit)
    workplace.link("shards", "clip", "clip_vit")
    first = start()
    assert first[0].startswith("initialise-risclip-shapes-")
    assert start() == first
    workplace.change(cluster={"train_workers": 2}, cris={"clip": "rn", "train": {"lr": 1.0}})
    workplace.change(risclip={"train": {"lr": 1.0}})
    workplace.change(train={"loader_workers": 1, "checkpoint_every_steps": 2})
    assert start() == first  # the second stage's own settings do not change what is trained in the first
    workplace.change(risclip={"initialise": {"lr": 1e-2}})
    changed = [start()]
    workplace.change(risclip={"model": {"ske_heads": 4}})
    changed.append(start())
    clip = workplace.own(paths.clip("vit")) / "clip.json"
    clip.write_text(clip.read_text().replace('"weights_sha256": "', '"weights_sha256": "0'))
    changed.append(start())
    workplace.change(train={"word_len": 11})
    changed.append(start())
    assert len({first, *changed}) == 5
    assert len({run_id for _, run_id in [first, *changed]}) == 5
    assert {Path(file).parts[0] for file in workplace.files()} == {"data"}  # nothing that looks like a result


@dataclass(frozen=True)
class Both:
    """Both stages, made by the pipeline; weights as they are on disk."""

    place: Workplace
    params: Params

    @property
    def start(self) -> dict[str, torch.Tensor]:
        return load_file(self.place.root / START / "model.safetensors")

    @property
    def model(self) -> dict[str, torch.Tensor]:
        return load_file(self.place.root / MODEL / "model.safetensors")


@pytest.fixture(scope="module")
def _workers_get_this_code(ray_session: None) -> Iterator[None]:
    """Ray's workers cannot import a test module: what is defined here travels to them whole."""
    import ray.cloudpickle

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


@pytest.fixture(scope="module")
def both(
    tiny: Tiny,
    untrained: Path,
    migrated_store: Path,
    _workers_get_this_code: None,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Both]:
    """`initialise` and then `train` of RISCLIP; the second stage is one epoch, and shorter than the first."""
    with trained(tmp_path_factory.mktemp("two_stages"), tiny, untrained, migrated_store) as found:
        yield found


@contextmanager
def trained(folder: Path, tiny: Tiny, untrained: Path, migrated_store: Path) -> Iterator[Both]:
    """Both stages, in a working directory and an MLflow store of their own, in which the block stays."""
    place = open_workplace(folder / "workplace", tiny, untrained)
    place.link("shards", "clip", "clip_vit")
    params = place.change(risclip={"train": {"epochs": 1}})
    shutil.copy(migrated_store, folder / "mlflow.db")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place.root)
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
        initialise.main(TWO, DATASET)
        train.main(TWO, DATASET)
        yield Both(place, params)


def locator(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix("locator."): value for name, value in state.items() if name.startswith("locator.")}


def rows(file: Path) -> list[dict[str, float]]:
    with file.open() as opened:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(opened)]


@pytest.mark.ray
def test_both_stages_end_with_the_weights_of_a_plain_process(both: Both, tiny: Tiny, tmp_path: Path) -> None:
    section, store = both.params.of(TWO), ShardStore(tiny.shards)
    assert section.initialise is not None
    assert section.train is not None
    runtimes = [LocalRuntime(Checkpoints(Storage(tmp_path / name)), "cpu") for name in ("first", "second")]
    first = make_trainer(first_stage_model(section, TWO, tiny.clip_vit), section.initialise, store, runtimes[0])
    position = first.fit()
    assert same_weights(locator(both.start), first.best_weights())
    history = rows(both.place.root / RESULTS / "history.csv")
    assert history == [pytest.approx(row, abs=1e-6) for row in position.history]
    metrics = json.loads((both.place.root / RESULTS / "metrics.json").read_text())
    assert metrics == {"best_epoch": position.best_epoch, **history[position.best_epoch - 1]}

    start = starting_model(section, TWO, both.place.root / START)
    second = make_trainer(start, section.train, store, runtimes[1])
    second.fit()
    assert same_weights(both.model, second.best_weights())
    assert all(torch.equal(value, both.start[name]) for name, value in both.model.items() if "locator" in name)
    assert not torch.equal(both.model["decoder.head.weight"], both.start["decoder.head.weight"])
    assert len(rows(paths.training(TWO, DATASET) / "history.csv")) == 1


@pytest.mark.ray
def test_the_model_tells_of_both_its_stages(both: Both, tiny: Tiny) -> None:
    model, described = load_model(MODEL)
    info = described.info
    assert not model.training
    assert (described.system, info.dataset, info.image_size, info.word_len) == (TWO, DATASET, 64, 12)
    assert info.clip_digest == read_clip_config(tiny.clip_vit)["weights_sha256"]
    assert file_sha256(MODEL / "clip/clip.safetensors") == info.clip_digest
    started = read_description(START).info
    assert info.first_stage_run == started.first_stage_run != ""
    assert (started.run, started.word_len, started.epoch, started.val_mIoU) == ("", None, None, None)
    metrics = json.loads((both.place.root / paths.training(TWO, DATASET) / "metrics.json").read_text())
    assert (info.epoch, info.val_mIoU) == (metrics["best_epoch"], metrics["val/mIoU"])
    left = both.place.files()
    assert {Path(file).parts[0] for file in left} == {"models", "results", "runs"}
    assert not [file for file in left if "partial" in file or file.endswith(".tmp")]


@pytest.mark.ray
def test_the_same_inputs_make_the_same_folders_wherever_the_runs_are_kept(
    both: Both, tiny: Tiny, untrained: Path, migrated_store: Path, tmp_path: Path
) -> None:
    """Run ids of MLflow differ from store to store: a model names its runs instead, and DVC finds nothing changed."""
    with trained(tmp_path, tiny, untrained, migrated_store) as elsewhere:
        info = read_description(MODEL).info
        second = [tracking.find_run("ris", name) for name in (info.run, info.first_stage_run)]
    first = [tracking.find_run("ris", name) for name in (info.run, info.first_stage_run)]
    assert None not in first + second
    assert len({*first, *second}) == 4
    for folder in (START, MODEL):
        assert contents(elsewhere.place.root / folder) == contents(both.place.root / folder)
        text = (both.place.root / folder / "model.json").read_text()
        assert not [run_id for run_id in first + second if str(run_id) in text]


@pytest.mark.ray
def test_the_stages_are_two_finished_runs_under_one(both: Both) -> None:
    client = tracking.connect()
    info = load_model(MODEL)[1].info
    ids = (
        tracking.parent_of("ris", info.first_stage_run),
        tracking.find_run("ris", info.first_stage_run),
        tracking.find_run("ris", info.run),
    )
    parent, first, second = (client.get_run(run_id) for run_id in ids)
    assert [run.info.status for run in (parent, first, second)] == ["FINISHED"] * 3
    for run, verb in ((parent, "two-stage"), (first, "initialise"), (second, "train")):
        assert run.info.run_name.startswith(f"{verb}-risclip-shapes-")
    assert "mlflow.parentRunId" not in parent.data.tags
    for run, verb in ((first, "initialise"), (second, "train")):
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert (run.data.tags["ris.stage"], run.data.tags["ris.system"]) == (verb, TWO)
        assert (both.place.root / "runs" / run.info.run_name).is_dir()
        assert run.data.params["risclip.cfe_dim"] == "16"
    assert (first.data.params["train.epochs"], second.data.params["train.epochs"]) == ("2", "1")
    assert [metric.step for metric in client.get_metric_history(first.info.run_id, "val/mIoU")] == [3, 6]
    assert [metric.step for metric in client.get_metric_history(second.info.run_id, "val/mIoU")] == [3]
    assert len(client.search_runs([first.info.experiment_id])) == 3


def worker_that_may_not_train(worker: Callable[[Plain], None]) -> Callable[[Plain], None]:
    def wrapped(config: Plain) -> None:
        from ris_core.training.loop import Trainer

        def step(self: Trainer, batch: dict[str, torch.Tensor], global_step: int) -> torch.Tensor:
            raise AssertionError(f"step {global_step} was trained again")

        Trainer._step = step  # type: ignore[method-assign]
        worker(config)

    return wrapped


@pytest.mark.ray
def test_a_finished_first_stage_is_not_trained_again(both: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its results gone, as DVC removes them before it runs a stage, they come back from the last checkpoint."""
    before, results = contents(both.place.root / START), contents(both.place.root / RESULTS)
    shutil.rmtree(both.place.root / START)
    shutil.rmtree(both.place.root / RESULTS)
    with monkeypatch.context() as patch:
        patch.setattr(ray_training, "train_worker", worker_that_may_not_train(ray_training.train_worker))
        initialise.main(TWO, DATASET)
    assert contents(both.place.root / START) == before
    assert contents(both.place.root / RESULTS) == results
    run_id = tracking.find_run("ris", read_description(START).info.first_stage_run)
    client = tracking.connect()
    assert client.get_run(run_id).info.status == "FINISHED"
    assert len(client.get_metric_history(run_id, "val/mIoU")) == 2


@pytest.mark.ray
def test_other_dimensions_than_those_of_the_start_are_refused(both: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    section, changed = both.params.of(TWO), copy(both.params)
    assert isinstance(section.model, RISCLIPConfig)
    setattr(changed, TWO, replace(section, model=replace(section.model, adapter_dim=8)))
    monkeypatch.setattr(train, "params", lambda stage, system: changed)
    with pytest.raises(ConfigError, match="adapter_dim is 4 in models/start/risclip-shapes, 8 in the parameters"):
        train.main(TWO, DATASET)
