"""MLflow: runs that are found again by their name, what they record, and stores that cannot be used."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pipelines_world import REPOSITORY

from pipelines import fingerprint, inputs, tracking
from pipelines.predict import model_folder
from ris_core.errors import ClusterError

PARAMS = {"cris": {"num_layers": 1, "fpn_out": [16, 32]}, "train": {"lr": 1e-3, "loss": {"dice_weight": 0.5}}}


def open_run(name: str) -> str:
    return tracking.open_run("ris", name, PARAMS, {"ris.dataset": "shapes"})


def test_a_run_is_found_again_by_its_name(store: Path) -> None:
    first = open_run("train-cris-shapes-aaaa")
    client = tracking.connect()
    client.set_terminated(first, "FAILED")
    assert open_run("train-cris-shapes-aaaa") == first
    assert client.get_run(first).info.status == "RUNNING"
    assert open_run("train-cris-shapes-bbbb") != first


def test_a_run_records_params_lineage_and_data(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DVC_EXP_NAME", "dizzy-otter")
    monkeypatch.setattr(tracking, "git_commit", lambda: "abc-dirty")
    run_id = open_run("train-cris-shapes-aaaa")
    for _ in range(2):  # a resumed run names its data again
        tracking.log_dataset(run_id, "shapes", Path("data/shards/shapes"), "0123456789abcdef" * 4, "training")
    run = tracking.connect().get_run(run_id)
    assert run.info.run_name == "train-cris-shapes-aaaa"
    assert run.data.params == {
        "cris.num_layers": "1",
        "cris.fpn_out": "[16, 32]",
        "train.lr": "0.001",
        "train.loss.dice_weight": "0.5",
    }
    assert run.data.tags["ris.git_commit"] == "abc-dirty"
    assert run.data.tags["ris.dataset"] == "shapes"
    assert run.data.tags["dvc.exp_name"] == "dizzy-otter"
    (data,) = run.inputs.dataset_inputs
    assert (data.dataset.name, data.dataset.digest) == ("shapes", ("0123456789abcdef" * 4)[:36])
    assert '"dvc.path": "data/shards/shapes"' in data.dataset.source.replace('\\"', '"')
    assert [(tag.key, tag.value) for tag in data.tags] == [("mlflow.data.context", "training")]


def test_metrics_keep_their_steps_and_lose_their_at_signs(store: Path) -> None:
    run_id = open_run("train-cris-shapes-aaaa")
    for step in (20, 40):
        tracking.log_metrics(run_id, {"Pr@0.5": step / 100, "val/mIoU": 0.5}, step)
    history = tracking.connect().get_metric_history(run_id, "Pr_0.5")
    assert [(metric.step, metric.value) for metric in history] == [(20, 0.2), (40, 0.4)]
    assert tracking.connect().get_run(run_id).data.metrics == {"Pr_0.5": 0.4, "val/mIoU": 0.5}


def test_a_block_decides_how_its_run_ends(store: Path) -> None:
    run_id = open_run("train-cris-shapes-aaaa")
    with pytest.raises(KeyboardInterrupt), tracking.running(run_id):
        raise KeyboardInterrupt
    assert tracking.connect().get_run(run_id).info.status == "FAILED"
    with tracking.running(run_id, system_metrics=False):
        pass
    assert tracking.connect().get_run(run_id).info.status == "FINISHED"


def test_system_metrics_are_sampled_meanwhile(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_id = open_run("train-cris-shapes-aaaa")
    with tracking.running(run_id):
        deadline = time.monotonic() + 60
        while not (found := tracking.connect().get_run(run_id).data.metrics) and time.monotonic() < deadline:
            time.sleep(0.2)
    assert found["system/cpu_utilization_percentage"] >= 0
    assert found["system/system_memory_usage_megabytes"] > 0


def test_stages_of_one_training_are_children_of_one_run(store: Path) -> None:
    client = tracking.connect()
    parent = tracking.open_parent("ris", "two-stage-risclip-shapes-aaaa")
    assert tracking.open_parent("ris", "two-stage-risclip-shapes-aaaa") == parent
    assert client.get_run(parent).info.status == "FINISHED"
    child = tracking.open_run("ris", "train-risclip-shapes-aaaa", PARAMS, {}, parent)
    assert tracking.open_run("ris", "train-risclip-shapes-aaaa", PARAMS, {}, parent) == child
    assert client.get_run(child).data.tags["mlflow.parentRunId"] == parent
    assert "mlflow.parentRunId" not in client.get_run(parent).data.tags
    other = tracking.open_run("ris", "train-risclip-shapes-bbbb", PARAMS, {}, "0" * 32)  # of another store
    assert "mlflow.parentRunId" not in client.get_run(other).data.tags


def test_the_parent_of_a_run_is_found_by_the_runs_name(store: Path) -> None:
    """A model's description names runs, not their ids, which differ from store to store."""
    client = tracking.connect()
    parent = tracking.open_parent("ris", "two-stage-risclip-shapes-aaaa")
    child = tracking.open_run("ris", "initialise-risclip-shapes-aaaa", PARAMS, {}, parent)
    open_run("train-cris-shapes-aaaa")
    assert tracking.find_run("ris", "initialise-risclip-shapes-aaaa") == child
    assert tracking.parent_of("ris", "initialise-risclip-shapes-aaaa") == parent
    assert tracking.parent_of("ris", "train-cris-shapes-aaaa") is None  # it has none
    for name in ("initialise-risclip-shapes-bbbb", ""):  # of another store; of a system with one stage
        assert tracking.find_run("ris", name) is None
        assert tracking.parent_of("ris", name) is None
    assert tracking.find_run("other", "initialise-risclip-shapes-aaaa") is None
    client.delete_run(parent)
    assert tracking.parent_of("ris", "initialise-risclip-shapes-aaaa") is None


def test_the_embedded_store_is_made_where_one_works(
    migrated_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert tracking.uri() == f"sqlite:///{tmp_path}/mlflow/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///tracking/runs.db")
    monkeypatch.chdir(tmp_path.parent)
    assert tracking.uri() == f"sqlite:///{tmp_path.parent}/tracking/runs.db"  # workers run in other directories
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking:5000")
    assert tracking.uri() == "http://tracking:5000"


def test_a_run_of_another_store_is_not_there(store: Path) -> None:
    run_id = open_run("train-cris-shapes-aaaa")
    assert tracking.has_run(run_id)
    assert not tracking.has_run("0" * 32)
    tracking.connect().delete_run(run_id)
    assert not tracking.has_run(run_id)


def test_a_server_that_is_not_there_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    started = time.monotonic()
    with pytest.raises(ClusterError, match=rf"http://127.0.0.1:{port} cannot be used: .*refused.* unset MLFLOW_TRACK"):
        tracking.connect()
    assert time.monotonic() - started < 10


def test_a_server_that_says_nothing_is_told_within_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "ANSWER_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
        started = time.monotonic()
        with pytest.raises(ClusterError, match=rf"127.0.0.1:{port} cannot be used: timed out"):
            tracking.connect()
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("place", ["sqlite:///{folder}/notes.db", "somewhere://else", "http://"])
def test_a_store_that_is_none(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "notes.db").write_text("no database at all " * 60)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", place.format(folder=tmp_path))
    with pytest.raises(ClusterError, match="cannot be used"):
        tracking.connect()


def test_a_model_that_is_not_registered(store: Path) -> None:
    with pytest.raises(ClusterError, match="models:/ris-cris-shapes@champion cannot be loaded from sqlite:"):
        model_folder("models:/ris-cris-shapes@champion")
    assert model_folder("models/cris-shapes") == Path("models/cris-shapes")


def test_lineage_names_the_commit_and_whether_files_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        return subprocess.run(["git", *identity, *arguments], capture_output=True, text=True, check=True).stdout.strip()

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert fingerprint.git_commit() == "unknown"
    git("init", "--quiet")
    (tmp_path / "a.py").write_text("1")
    git("add", "a.py")
    git("commit", "--quiet", "--message", "one")
    assert fingerprint.git_commit() == git("rev-parse", "HEAD")
    (tmp_path / "results").mkdir()
    for made in ("results/metrics.json", "dvc.lock"):
        (tmp_path / made).write_text("1")
        git("add", made)
    git("commit", "--quiet", "--message", "two")
    (tmp_path / "results/metrics.json").unlink()  # as DVC does before a stage that runs beside
    (tmp_path / "dvc.lock").write_text("2")
    monkeypatch.chdir(tmp_path / "results")
    assert fingerprint.git_commit() == git("rev-parse", "HEAD")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.py").write_text("2")
    assert fingerprint.git_commit() == git("rev-parse", "HEAD") + "-dirty"


def test_run_names_change_with_every_input_and_with_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    base = fingerprint.run_name("train", "cris", "shapes+", {"lr": 1e-3}, "data", "clip")
    assert base == fingerprint.run_name("train", "cris", "shapes+", {"lr": 1e-3}, "data", "clip")
    assert base.startswith("train-cris-shapesp-")
    others = [({"lr": 2e-3}, "data", "clip"), ({"lr": 1e-3}, "other", "clip"), ({"lr": 1e-3}, "data", "other")]
    assert base not in {fingerprint.run_name("train", "cris", "shapes+", *inputs) for inputs in others}
    monkeypatch.setattr(inputs, "digest_of", lambda files: "other")
    assert fingerprint.run_name("train", "cris", "shapes+", {"lr": 1e-3}, "data", "clip") != base


def test_the_code_of_a_run_is_that_of_the_sources_wherever_they_lie(
    sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = fingerprint.run_name("train", "cris", "shapes")
    with monkeypatch.context() as patch:
        patch.setattr(inputs, "ROOT", REPOSITORY)
        inputs.code.cache_clear()
        assert fingerprint.run_name("train", "cris", "shapes") == copied
    inputs.code.cache_clear()
    with (sources / "ris_core" / "training" / "loop.py").open("a") as file:
        file.write("# a comment\n")
    assert fingerprint.run_name("train", "cris", "shapes") != copied


SERVED = {
    "pipelines/serving_model.py": True,
    "ris_core/predictor.py": True,
    "ris_core/data/images.py": True,
    "ris_core/models/answer.py": True,
    "ris_core/models/cris/layers.py": True,
    "ris_core/models/lts/layers.py": False,
    "ris_core/training/loop.py": False,
    "ris_core/evaluation/cost.py": False,
    "pipelines/train.py": False,
}


def test_the_served_code_is_what_a_registered_model_answers_with(sources: Path) -> None:
    def changed_by(file: str) -> bool:
        before = fingerprint.served_code("cris")
        with (sources / file).open("a") as opened:
            opened.write("\n")
        return fingerprint.served_code("cris") != before

    assert {file: changed_by(file) for file in SERVED} == SERVED


def test_flat_names() -> None:
    assert tracking.flat({"a": {"b": {"c": 1}, "d": [2]}, "e": None}) == {"a.b.c": 1, "a.d": [2], "e": None}


def test_processes_that_meet_at_a_new_store_wait_for_each_other(tmp_path: Path) -> None:
    """Stages side by side: MLflow itself would create the same tables twice."""
    code = "from pipelines import tracking; tracking.connect()"
    environment = {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path / 'mlflow.db'}"}
    command = [sys.executable, "-c", code]
    drivers = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for _ in range(3)
    ]
    printed = [driver.communicate(timeout=180)[0] for driver in drivers]
    assert [driver.returncode for driver in drivers] == [0, 0, 0], "\n".join(printed)
