"""Stage `train` under Ray Train: the library's own weights, with several workers, after a killed one, and only once."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import pytest
import torch
from pipelines_world import DATASET, SYSTEM, Workplace, open_workplace, python, started, wait_for
from safetensors.torch import load_file, save_file

from pipelines import initialise, paths, ray_training, tracking, train
from pipelines.params import ClusterParams, Params
from pipelines.training import Training
from ris_core.data.dataset import ShardStore
from ris_core.errors import ClusterError, ConfigError, WeightsError
from ris_core.files import file_sha256
from ris_core.models.registry import load_model
from ris_core.options import Plain
from ris_core.storage import Storage
from ris_core.training.checkpoint import Checkpoints
from ris_core.training.run import make_trainer, starting_model
from ris_core.training.runtime import LocalRuntime

if TYPE_CHECKING:
    from tiny_world import Tiny

pytestmark = pytest.mark.ray
EPOCHS = 8
MODEL = paths.model(SYSTEM, DATASET)


@dataclass(frozen=True)
class Finished:
    """A run of the stage that was interrupted, and the step at which it was gone on with."""

    place: Workplace
    params: Params
    run_id: str
    resumed_at: int

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.place.root / MODEL / "model.safetensors")


@pytest.fixture(scope="module", autouse=True)
def _workers_get_this_code(ray_session: None) -> Iterator[None]:
    """Ray's workers cannot import a test module: what is defined here travels to them whole."""
    import ray.cloudpickle

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def worker_that_notes_its_first_step(note: Path) -> Callable[[Plain], None]:
    def worker(config: Plain) -> None:
        from ris_core.training.loop import Trainer

        whole = Trainer._step

        def step(self: Trainer, batch: dict[str, torch.Tensor], global_step: int) -> torch.Tensor:
            if not note.exists():
                note.write_text(str(global_step))
            return whole(self, batch, global_step)

        Trainer._step = step  # type: ignore[method-assign]
        ray_training.train_worker(config)

    return worker


@pytest.fixture(scope="module")
def finished(
    tiny: Tiny, untrained: Path, migrated_store: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Finished]:
    """A run whose driver is killed, with all its children, after the first epoch, and started again."""
    import ray

    folder = tmp_path_factory.mktemp("train")
    place = open_workplace(folder / "workplace", tiny, untrained)
    place.link("shards", "start")
    params = place.change(train={"epochs": EPOCHS})
    shutil.copy(migrated_store, folder / "mlflow.db")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place.root)
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
        command = ("-m", "pipelines.train", "--system", SYSTEM, "--dataset", DATASET)
        address = ray.get_runtime_context().gcs_address
        with started(*command, cwd=place.root, RAY_ADDRESS=address) as driver:
            wait_for(lambda: any((place.root / "runs").glob("*/checkpoints/*/state.json")), driver)
        assert driver.returncode == -signal.SIGKILL
        assert {Path(file).parts[0] for file in place.files()} == {"runs"}  # nothing that looks like a result
        patch.setattr(ray_training, "train_worker", worker_that_notes_its_first_step(folder / "first_step"))
        train.main(SYSTEM, DATASET)
        patch.undo()
        patch.chdir(place.root)
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
        run_id = tracking.find_run("ris", load_model(MODEL)[1].info.run)
        assert run_id is not None
        yield Finished(place, params, run_id, int((folder / "first_step").read_text()))


def same_weights(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    assert first.keys() == second.keys()
    return all(torch.allclose(first[name], second[name], rtol=0, atol=1e-6) for name in first)


def rows(place: Path) -> list[dict[str, float]]:
    with (place / "history.csv").open() as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def test_an_interrupted_run_ends_with_the_weights_of_an_undisturbed_plain_process(
    finished: Finished, tiny: Tiny, untrained: Path, tmp_path: Path
) -> None:
    assert finished.resumed_at >= 3  # the first epoch's steps were not trained again
    section = finished.params.of(SYSTEM)
    assert section.train is not None
    runtime = LocalRuntime(Checkpoints(Storage(tmp_path)), "cpu")
    plain = make_trainer(starting_model(section, SYSTEM, untrained), section.train, ShardStore(tiny.shards), runtime)
    position = plain.fit()
    assert same_weights(finished.weights, plain.best_weights())
    assert not same_weights(finished.weights, load_file(untrained / "model.safetensors"))  # it did learn something
    history = rows(finished.place.root / paths.training(SYSTEM, DATASET))
    assert history == [pytest.approx(row, abs=1e-6) for row in position.history]
    metrics = json.loads((finished.place.root / paths.training(SYSTEM, DATASET) / "metrics.json").read_text())
    assert metrics == {"best_epoch": position.best_epoch, **history[position.best_epoch - 1]}


def test_the_model_folder_tells_where_it_came_from(finished: Finished, tiny: Tiny) -> None:
    model, described = load_model(finished.place.root / MODEL)
    info = described.info
    assert not model.training
    assert (described.system, info.dataset, info.image_size, info.word_len) == (SYSTEM, DATASET, 64, 12)
    assert info.data_digest == file_sha256(tiny.shards / "manifest.json")
    assert info.clip_digest == file_sha256(tiny.clip / "clip.safetensors")
    left = {Path(file).parts[0] for file in finished.place.files()}
    assert left == {"models", "results", "runs"}
    assert not [file for file in finished.place.files() if "partial" in file or file.endswith(".tmp")]


def test_the_run_is_recorded_in_mlflow(finished: Finished) -> None:
    client = tracking.connect()
    run = client.get_run(finished.run_id)
    assert run.info.status == "FINISHED"
    assert run.info.run_name.startswith("train-cris-shapes-")
    assert (finished.place.root / "runs" / run.info.run_name).is_dir()  # the checkpoints bear the same name
    assert {
        "train.epochs": str(EPOCHS),
        "cris.vis_dim": "32",
        "preprocess.image_size": "64",
    }.items() <= run.data.params.items()
    assert run.data.tags["ris.system"] == SYSTEM
    history = client.get_metric_history(finished.run_id, "val/mIoU")
    steps = [metric.step for metric in history]
    assert sorted(set(steps)) == [3 * epoch for epoch in range(1, EPOCHS + 1)]  # steps of the optimiser
    assert [dataset.dataset.name for dataset in run.inputs.dataset_inputs] == [DATASET]


def worker_that_may_not_train(config: Plain) -> None:
    from ris_core.training.loop import Trainer

    def step(self: Trainer, batch: dict[str, torch.Tensor], global_step: int) -> torch.Tensor:
        raise AssertionError(f"step {global_step} was trained again")

    Trainer._step = step  # type: ignore[method-assign]
    ray_training.train_worker(config)


def test_the_same_inputs_do_not_train_again(finished: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (finished.place.root / MODEL / "model.safetensors").read_bytes()
    client = tracking.connect()
    logged = len(client.get_metric_history(finished.run_id, "val/mIoU"))
    shutil.rmtree(finished.place.root / MODEL)  # as DVC does before it runs a stage
    shutil.rmtree(finished.place.root / "results")
    with monkeypatch.context() as patch:
        patch.setattr(ray_training, "train_worker", worker_that_may_not_train)
        train.main(SYSTEM, DATASET)
    assert (finished.place.root / MODEL / "model.safetensors").read_bytes() == before
    epochs = [row["epoch"] for row in rows(finished.place.root / paths.training(SYSTEM, DATASET))]
    assert epochs == list(range(1, EPOCHS + 1))
    assert tracking.find_run("ris", load_model(finished.place.root / MODEL)[1].info.run) == finished.run_id
    assert client.get_run(finished.run_id).info.status == "FINISHED"
    assert len(client.get_metric_history(finished.run_id, "val/mIoU")) == logged


def worker_that_dies_once(marker: Path, rank: int, at_step: int) -> Callable[[Plain], None]:
    """A training worker that is killed, as by the kernel, just before a step: the first time it comes there."""

    def worker(config: Plain) -> None:
        from ris_core.training.loop import Trainer

        whole = Trainer._step

        def step(self: Trainer, batch: dict[str, torch.Tensor], global_step: int) -> torch.Tensor:
            if global_step == at_step and self.runtime.rank == rank and not marker.exists():
                marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return whole(self, batch, global_step)

        Trainer._step = step  # type: ignore[method-assign]
        ray_training.train_worker(config)

    return worker


def test_two_workers_of_which_one_is_killed_end_as_if_undisturbed(
    workplace: Workplace, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workplace.link("shards", "clip")
    workplace.change(cluster={"train_workers": 2, "max_failures": 1}, train={"checkpoint_every_steps": 2})
    initialise.main(SYSTEM, DATASET)
    monkeypatch.setenv("RIS_STORAGE", str(tmp_path / "storage"))
    marker = tmp_path / "killed"
    monkeypatch.setattr(ray_training, "train_worker", worker_that_dies_once(marker, rank=1, at_step=5))
    train.main(SYSTEM, DATASET)
    assert marker.exists()
    assert [path.name.startswith("train-cris-shapes-") for path in (tmp_path / "storage").iterdir()] == [True]
    assert not (workplace.root / "runs").exists()

    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "ris_core.train")
    inputs = ("--shards", str(paths.shards(DATASET)), "--clip", str(paths.clip("rn")), "--device", "cpu")
    done = python(*launcher, *inputs, "--out", str(tmp_path / "plain"), cwd=workplace.root)
    assert done.returncode == 0, done.stderr
    plain = load_file(tmp_path / "plain" / "model" / "model.safetensors")
    assert same_weights(load_file(workplace.root / MODEL / "model.safetensors"), plain)
    history = rows(workplace.root / paths.training(SYSTEM, DATASET))
    (run,) = (tmp_path / "plain" / "checkpoints").iterdir()
    position = Checkpoints(Storage(run)).position()
    assert position is not None
    assert history == [pytest.approx(row, abs=1e-6) for row in position.history]


def test_a_cluster_that_is_too_small_is_told_instead_of_waited_for(workplace: Workplace, store: Path) -> None:
    workplace.link("shards", "start")
    workplace.change(cluster={"train_workers": 3, "cpus_per_worker": 2, "use_gpu": "yes"})
    with pytest.raises(ClusterError) as told:
        train.main(SYSTEM, DATASET)
    assert str(told.value).startswith("the cluster is too small: 3 x 2 CPU wanted, the cluster has 4; 3 x 1 GPU wanted")
    assert str(told.value).endswith("Ask for less in the section `cluster` of params.yaml, or add nodes")
    assert workplace.files() == set()
    client = tracking.connect()
    (run,) = client.search_runs([client.get_experiment_by_name("ris").experiment_id])
    assert run.info.status == "FAILED"


def test_nothing_to_start_from_is_told_before_anything_starts(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "open_run", lambda *_: pytest.fail("a run was opened"))
    workplace.link("shards", "clip")
    with pytest.raises(WeightsError, match="models/start/cris-shapes holds no model to start from: run the stage init"):
        train.main(SYSTEM, DATASET)
    workplace.link("start")
    workplace.change(cris={"model": {"num_layers": 2, "ffn_dim": 48}})
    with pytest.raises(ConfigError, match=r"models/start/cris-shapes is another cris \(2 problems\)"):
        train.main(SYSTEM, DATASET)
    assert workplace.files() == set()


class Enough(Exception):
    """What was wanted is seen."""


def test_a_changed_input_is_another_run(workplace: Workplace, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, str]] = []

    def fit(place: ClusterParams, training: Training, name: str, run_id: str) -> NoReturn:
        assert (training.stage, training.base) == ("train", paths.start(SYSTEM, DATASET))
        seen.append((name, run_id))
        raise Enough

    def start() -> tuple[str, str]:
        with pytest.raises(Enough):
            train.main(SYSTEM, DATASET)
        return seen[-1]

    monkeypatch.setattr(ray_training, "fit", fit)
    workplace.link("shards", "start")
    first = start()
    assert start() == first
    workplace.change(cluster={"train_workers": 2}, evaluate={"bootstrap_samples": 7}, risclip={"train": {"lr": 1.0}})
    workplace.change(train={"loader_workers": 1, "checkpoint_every_steps": 2})
    assert start() == first  # these do not change what is trained
    workplace.change(train={"lr": 3e-3})
    changed = [start()]
    workplace.change(cris={"train": {"lr": 4e-3}})
    changed.append(start())
    manifest = workplace.own(paths.shards(DATASET)) / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"part-00000', '"./part-00000'))
    changed.append(start())
    model = workplace.own(paths.start(SYSTEM, DATASET))
    info = model / "model.json"
    info.write_text(info.read_text().replace('"clip_digest": "', '"clip_digest": "0'))
    changed.append(start())
    weights = load_file(model / "model.safetensors")
    save_file({**weights, "proj.txt.bias": weights["proj.txt.bias"] + 1}, model / "model.safetensors")
    with pytest.raises(
        WeightsError, match=r"is not the file that was written \(checksums differ\): run the stage init"
    ):
        train.main(SYSTEM, DATASET)
    content = json.loads(info.read_text())
    info.write_text(json.dumps({**content, "weights_sha256": file_sha256(model / "model.safetensors")}))
    changed.append(start())
    assert len({first, *changed}) == 6
    assert len({run_id for _, run_id in [first, *changed]}) == 6


def test_an_expected_error_of_a_worker_is_shown_as_such(
    workplace: Workplace, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.train import WorkerGroupError
    from ray.train.torch import TorchTrainer
    from ray.train.v2._internal.util import construct_user_exception_with_traceback

    def failing(cause: Exception) -> Callable[[TorchTrainer], None]:
        def fit(trainer: TorchTrainer) -> None:
            raise WorkerGroupError("rank 0 failed", {0: construct_user_exception_with_traceback(cause)})

        return fit

    workplace.link("shards", "start")
    monkeypatch.setattr(TorchTrainer, "fit", failing(ConfigError("train.precision: fp16 needs a GPU")))
    with pytest.raises(ConfigError, match=r"^train.precision: fp16 needs a GPU$"):
        train.main(SYSTEM, DATASET)
    monkeypatch.setattr(TorchTrainer, "fit", failing(KeyError("a mistake of ours")))
    with pytest.raises(WorkerGroupError, match="rank 0 failed"):
        train.main(SYSTEM, DATASET)
