"""Who starts a training's workers again, when, and with how many; what is told at once instead."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from pipelines_world import DATASET, REPOSITORY, SYSTEM, Workplace, wait_for
from ray.train import ControllerError, WorkerGroupError

from pipelines import cluster, paths, ray_training, stage, tracking, transport
from pipelines.params import ClusterParams
from pipelines.training import Left, Training, trained
from ris_core.errors import ClusterError, ConfigError, DataError
from ris_core.storage import Storage


@pytest.fixture
def training(workplace: Workplace) -> Training:
    workplace.link("shards", "start")
    section = stage.params("train", SYSTEM).of(SYSTEM)
    assert section.train is not None
    section = replace(section, train=replace(section.train, batch_images=12))
    return Training(SYSTEM, DATASET, "train", section, section.train, paths.start(SYSTEM, DATASET), "0" * 12)


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def set_nodes(*cpus: int) -> None:
        found = [{"Alive": True, "Resources": {"CPU": float(each)}, "NodeID": str(n)} for n, each in enumerate(cpus)]
        monkeypatch.setattr(ray_training.ray, "nodes", lambda: found)
        monkeypatch.setattr(ray_training.ray, "cluster_resources", lambda: {"CPU": float(sum(cpus))})
        monkeypatch.setattr(ray_training.ray, "available_resources", lambda: {"CPU": float(sum(cpus))})

    return set_nodes


def test_of_a_range_as_many_are_taken_as_fit_and_divide_the_batch(
    training: Training, nodes: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    place = ClusterParams(train_workers=[1, 5], cpus_per_worker=1)
    taken = {}
    for free in (1, 2, 3, 4, 5, 8):
        nodes(free)
        taken[free] = ray_training.awaited(place, training, use_gpu=False)[0]
    assert taken == {1: 1, 2: 2, 3: 3, 4: 4, 5: 4, 8: 4}  # 5 do not divide 12
    assert "training with 1 of at most 5 workers: no more fit now" in capsys.readouterr().err
    nodes(8)
    assert ray_training.awaited(ClusterParams(train_workers=5, cpus_per_worker=1), training, use_gpu=False)[0] == 5


def test_a_lost_node_is_waited_for_aloud_and_not_for_ever(
    training: Training, nodes: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nodes(1)
    waits = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            nodes(1, 1)

    monkeypatch.setattr(ray_training.time, "sleep", sleep)
    place = ClusterParams(train_workers=2, cpus_per_worker=1)
    assert ray_training.awaited(place, training, use_gpu=False) == (2, 1)
    assert "waiting for nodes: there must be room for 2 workers of 1 CPU each" in capsys.readouterr().err
    nodes(1)
    monkeypatch.setattr(ray_training, "PATIENCE", -1)
    with pytest.raises(
        ClusterError, match=r"What was saved is kept: bring a node back, or let cluster.train_workers be"
    ):
        ray_training.awaited(place, training, use_gpu=False)


@pytest.mark.parametrize("given", [0, [2], [3, 2], [0, 2], [1, 2, 3], "4", 1.5, [1, "2"], None, True])
def test_what_is_no_number_of_workers(given: object, workplace: Workplace) -> None:
    with pytest.raises(ConfigError, match=r"cluster: train_workers is .*: a number from 1, or a range of two"):
        workplace.change(cluster={"train_workers": given})


def test_a_range_of_workers_is_read(workplace: Workplace) -> None:
    assert workplace.change(cluster={"train_workers": [1, 4]}).cluster.least_and_most == (1, 4)
    assert workplace.change(cluster={"train_workers": 3}).cluster.least_and_most == (3, 3)


def group_error(*causes: Exception) -> WorkerGroupError:
    from ray.train.v2._internal.util import construct_user_exception_with_traceback

    return WorkerGroupError("ranks failed", dict(enumerate(map(construct_user_exception_with_traceback, causes))))


@pytest.fixture
def failing(
    training: Training, nodes: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[list[int], Callable[[], None]]]:
    """`fit`, of which each attempt fails as given; the number of attempts, and the call."""
    nodes(2)
    monkeypatch.setattr(transport.Road, "find", classmethod(lambda cls: cls(None)))
    monkeypatch.setattr(cluster, "has_gpu", lambda wish: False)

    def make(*errors: Exception, checkpoints: tuple[str, ...] = ()) -> tuple[list[int], Callable[[], None]]:
        attempts: list[int] = []

        def run(config: object, name: str, workers: int, cpus: int, use_gpu: bool) -> None:
            attempts.append(workers)
            for each in checkpoints[len(attempts) - 1 : len(attempts)]:
                Left(name, paths.storage()).checkpoints.storage.write(f"{each}/state.json", b"{}")
            if len(attempts) <= len(errors):
                raise errors[len(attempts) - 1]

        monkeypatch.setattr(ray_training, "_run", run)
        place = ClusterParams(train_workers=[1, 2], cpus_per_worker=1, max_failures=2)
        return attempts, lambda: ray_training.fit(place, training, "train-cris-shapes-0", "run")

    return make


def test_what_is_meant_for_people_is_told_at_once(failing: Callable[..., tuple[list[int], Callable[[], None]]]) -> None:
    attempts, fit = failing(group_error(RuntimeError("connection closed by peer"), DataError("a shard is damaged")))
    with pytest.raises(DataError, match=r"^a shard is damaged$"):
        fit()
    assert len(attempts) == 1
    attempts, fit = failing(group_error(RuntimeError("connection closed by peer"), KeyError("a fault of ours")))
    with pytest.raises(WorkerGroupError, match="ranks failed"):
        fit()
    assert len(attempts) == 1


def test_interruptions_are_counted_between_checkpoints(
    failing: Callable[..., tuple[list[int], Callable[[], None]]], capsys: pytest.CaptureFixture[str]
) -> None:
    lost = group_error(RuntimeError("the actor died"))
    attempts, fit = failing(
        *[lost] * 5, checkpoints=("00000-0000010", "00000-0000010", "00000-0000020", "00001-0000000")
    )
    fit()
    assert len(attempts) == 6
    told = capsys.readouterr().err
    assert "the training was interrupted (the actor died): going on from 00000-0000010" in told
    attempts, fit = failing(*[lost] * 5)
    with pytest.raises(ClusterError, match=r"interrupted 3 times without a new checkpoint .*\(the actor died\)"):
        fit()
    assert len(attempts) == 3


def test_workers_that_do_not_find_each_other_name_the_variable(
    failing: Callable[..., tuple[list[int], Callable[[], None]]],
) -> None:
    _, fit = failing(ControllerError(RuntimeError("Gloo connectFullMesh failed with ... remote=[127.0.0.1]")))
    with pytest.raises(ClusterError, match=r"could not connect to each other \(Gloo .*GLOO_SOCKET_IFNAME"):
        fit()


def test_a_busy_cluster_is_no_failure(
    failing: Callable[..., tuple[list[int], Callable[[], None]]], capsys: pytest.CaptureFixture[str]
) -> None:
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

    attempts, fit = failing(*[ControllerError(WorkerGroupStartupTimeoutError(2))] * 4)
    fit()
    assert len(attempts) == 5
    assert "the cluster is busy: waiting for workers" in capsys.readouterr().err


def test_a_database_of_this_machine_is_no_store_for_workers_elsewhere(
    failing: Callable[..., tuple[list[int], Callable[[], None]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts, fit = failing()
    monkeypatch.setattr(transport.Road, "find", classmethod(lambda cls: cls(Storage(tmp_path / "storage"))))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    with pytest.raises(ClusterError, match=r"could not log to sqlite.* set MLFLOW_TRACKING_URI to its address"):
        fit()
    assert not attempts


def test_the_interface_that_the_nodes_share_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_training.ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    ray_training.name_interface()
    assert [os.environ[name] for name in names] == ["lo", "lo"]
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    ray_training.name_interface()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "ib0"
    for name in names:
        monkeypatch.delenv(name)
    monkeypatch.setattr(ray_training.ray.util, "get_node_ip_address", lambda: "203.0.113.7")
    ray_training.name_interface()
    assert not {*names} & {*os.environ}


def test_a_damaged_shard_is_told_before_anything_starts(
    training: Training, workplace: Workplace, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "connected", lambda **_: pytest.fail("Ray was started"))
    shard = next(workplace.own(paths.shards(DATASET)).glob("*.arrow"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DataError, match=rf"other bytes than were written \(1 problem\):\n  - {shard.name}"):
        trained(stage.params("train", SYSTEM), training)
    experiment = tracking.connect().get_experiment_by_name("ris")
    (run,) = tracking.connect().search_runs([experiment.experiment_id])
    assert run.info.status == "FAILED"


def test_an_unwritable_storage_is_told_before_anything_starts(
    training: Training, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "connected", lambda **_: pytest.fail("Ray was started"))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RIS_STORAGE", str(tmp_path / "file"))
    with pytest.raises(ClusterError, match=r"the storage \S+ cannot be written"):
        trained(stage.params("train", SYSTEM), training)


CALLER = """
import subprocess, sys
# as DVC does: a shell between
sys.exit(subprocess.call(sys.argv[1], shell=True))
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_stage_ends_with_the_dvc_that_runs_it(number: int, tmp_path: Path) -> None:
    script = tmp_path / "dvc"
    script.write_text(CALLER)
    code = "from pathlib import Path; import time; from pipelines import lifeline; lifeline.hold();"
    code += f" Path('{tmp_path}/up').write_text(str(__import__('os').getpid())); time.sleep(100)"
    command = f'{sys.executable} -c "{code}"; true'
    caller = subprocess.Popen(
        [sys.executable, str(script), command],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        start_new_session=True,
    )
    wait_for(lambda: (tmp_path / "up").exists() and bool((tmp_path / "up").read_text()), caller)  # type: ignore[arg-type]
    stage_pid = int((tmp_path / "up").read_text())
    caller.send_signal(number)
    caller.wait()
    for _ in range(100):
        if not Path(f"/proc/{stage_pid}").exists():
            return
        ray_training.time.sleep(0.1)
    os.killpg(caller.pid, signal.SIGKILL)
    pytest.fail("the stage went on alone")
