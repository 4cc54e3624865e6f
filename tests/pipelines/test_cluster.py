"""Starting and joining Ray, and asking it for no more than it has."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pyarrow as pa
import pytest

from pipelines import cluster
from ris_core.errors import ClusterError

if TYPE_CHECKING:
    import ray.data


def test_a_cluster_that_is_not_there_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    for address in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}", "headnode"):
        monkeypatch.setenv("RAY_ADDRESS", address)
        started = time.monotonic()
        with pytest.raises(ClusterError, match=f"no Ray cluster answers at RAY_ADDRESS={address} "):
            cluster.connected().__enter__()
        assert time.monotonic() - started < 10


@pytest.mark.ray
def test_a_connection_that_is_there_is_used_and_kept(ray_session: None) -> None:
    import ray

    before = ray.get_runtime_context().get_job_id()
    with cluster.connected():
        assert ray.get_runtime_context().get_job_id() == before
    assert ray.is_initialized()


@pytest.mark.ray
def test_workers_get_what_every_process_must_have(ray_session: None) -> None:
    import ray

    @ray.remote(num_cpus=0)
    def look() -> tuple[dict[str, str | None], list[str]]:
        from ray.util.state import list_nodes  # asks where Ray Train's watchdog asks

        return {name: os.environ.get(name) for name in names}, [node.node_id for node in list_nodes(timeout=30)]

    names = list(cluster.ENVIRONMENT)
    environment, nodes = ray.get(look.remote())
    assert environment == {name: os.environ[name] for name in names}
    assert nodes == [ray.get_runtime_context().get_node_id()]  # of this Ray, whichever others run on this machine


@pytest.mark.ray
def test_commands_join_the_ray_they_share(ray_session: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    code = """
from pipelines import cluster
with cluster.connected():
    import ray
    task = ray.remote(num_cpus=0)(lambda: __import__("os").environ["MLFLOW_DISABLE_TELEMETRY"])
    print(ray.get_runtime_context().get_node_id(), ray.get(task.remote()))
"""
    with cluster.shared() as environment:
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == [ray.get_runtime_context().get_node_id(), "true"], done.stderr
    assert set(cluster.ENVIRONMENT) < set(environment)


def nodes(monkeypatch: pytest.MonkeyPatch, *sizes: tuple[int, int]) -> None:
    """A cluster with nodes of these CPUs and GPUs."""
    import ray

    found = [{"Alive": True, "Resources": {"CPU": float(cpus), "GPU": float(gpus)}} for cpus, gpus in sizes]
    dead = {"Alive": False, "Resources": {"CPU": 64.0}}
    monkeypatch.setattr(ray, "nodes", lambda: [*found, dead])
    total = {"CPU": float(sum(size[0] for size in sizes)), "GPU": float(sum(size[1] for size in sizes))}
    monkeypatch.setattr(ray, "cluster_resources", lambda: total)
    monkeypatch.setattr(ray, "available_resources", lambda: total)


def test_processes_share_the_cpus_of_the_nodes_that_can_hold_them(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes(monkeypatch, (4, 0))
    assert [cluster.cpus_each(workers, 0) for workers in (1, 2, 3, 8)] == [4, 2, 1, 1]
    monkeypatch.setenv(cluster.AT_ONCE, "2")  # beside another stage
    assert [cluster.cpus_each(workers, 0) for workers in (1, 2, 3)] == [2, 1, 1]
    monkeypatch.delenv(cluster.AT_ONCE)
    nodes(monkeypatch, (16, 4), (16, 0))
    assert [cluster.cpus_each(workers, 1) for workers in (1, 2, 4, 5)] == [16, 8, 4, 1]
    assert cluster.cpus_each(2, 0) == 16
    nodes(monkeypatch, (2, 0), (64, 8))  # a small head does not make the workers small
    assert cluster.cpus_each(8, 1) == 8


def test_no_more_processes_are_held_than_asked_for_or_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes(monkeypatch, (4, 0), (9, 2))
    assert [cluster.held(wanted, 1, 0) for wanted in (1, 2, 64)] == [1, 2, 13]
    assert [cluster.held(wanted, 2, 0) for wanted in (1, 64)] == [1, 6]
    assert [cluster.held(wanted, 1, 1) for wanted in (1, 2, 3)] == [1, 2, 2]
    assert cluster.held(3, 16, 0) == 1  # waits, or is told by `check_resources`
    nodes(monkeypatch, (1, 0))
    assert cluster.held(2, 1, 0) == 1


def test_processes_that_fit_in_sum_and_on_no_node(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes(monkeypatch, (4, 1), (4, 0))
    cluster.check_resources(1, 4, 1)
    with pytest.raises(
        ClusterError, match="1 x 6 CPU and 0 GPU wanted, each on one node; the nodes have 4 CPU and 1 GPU, 4 CPU"
    ):
        cluster.check_resources(1, 6, 0)


@pytest.mark.ray
def test_more_than_the_cluster_has(ray_session: None) -> None:
    cluster.check_resources(2, 2, 0)
    with pytest.raises(ClusterError, match=r"too small: 5 x 1 CPU wanted, the cluster has 4\. Ask for less"):
        cluster.check_resources(5, 1, 0)


def test_a_busy_cluster_is_waited_for_aloud(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import ray

    nodes(monkeypatch, (4, 0))
    cluster.check_resources(1, 4, 0)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": 3.0})
    cluster.check_resources(1, 4, 0)
    assert capsys.readouterr().err == "waiting for 4 CPU: 3 of 4 are free now\n"


@pytest.mark.ray
def test_gpus_are_used_where_there_are_some(ray_session: None, capsys: pytest.CaptureFixture[str]) -> None:
    import ray

    there = ray.cluster_resources().get("GPU", 0) > 0
    assert cluster.has_gpu("auto") is there
    assert ("no GPU in the cluster: running on CPUs" in capsys.readouterr().err) is not there
    assert cluster.has_gpu("yes")
    assert not cluster.has_gpu("no")


@pytest.mark.ray
def test_blocks_are_collected_into_one_table(ray_session: None) -> None:
    import ray.data

    rows: ray.data.Dataset = ray.data.from_items([{"number": number} for number in range(10)], override_num_blocks=4)
    table = cluster.collect(rows)
    assert isinstance(table, pa.Table)
    assert sorted(table["number"].to_pylist()) == list(range(10))
