"""The only place that starts or joins Ray."""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import ray
import ray.data
from ray.dashboard.utils import get_address_for_submission_client

import ris_core
from pipelines import ENVIRONMENT
from ris_core.device import best_device
from ris_core.errors import ClusterError

WATCHDOG = "RAY_API_SERVER_ADDRESS"
JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # in a job of Ray's: its runtime environment
AT_ONCE = "RIS_AT_ONCE"  # how many stages share the cluster, where `pipelines.repro` runs several
# What workers get of the environment of whoever drives them, beside `ENVIRONMENT`: where things are, and how to reach them.
HANDED_ON = ("AWS_", "GLOO_", "HF_", "MLFLOW_", "NCCL_", "RIS_", "S3_", "TORCH_")
OF_A_NODE = ("RIS_CACHE",)  # each has its own disk
# A dozen idle processes take 6 % of two cores for what nobody reads of a private cluster.
UNREAD = {
    "RAY_enable_metrics_collection": "0",
    "RAY_event_stats": "0",
    "RAY_metrics_report_interval_ms": "60000",
    "RAY_task_events_report_interval_ms": "0",
}
CODE = Path(ris_core.__file__).parent.parent


@contextmanager
def connected(**init: Any) -> Iterator[None]:
    """Keep Ray up in the block: the cluster at `RAY_ADDRESS` if that is set, otherwise a private one on this machine.

    A private cluster never joins one that somebody left running, and needs no token: it listens on this machine only.
    `init` overrides arguments of `ray.init` for the private one. Raises ClusterError if there is no Ray to be had.
    """
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    # INFO tells of internals; the stages report their own progress.
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    if ray.is_initialized():  # a caller (the tests, a notebook) owns the connection
        yield
        return
    settings: dict[str, Any] = {"logging_level": "warning"}
    if address:
        _join(address, settings)
    else:
        # Ray Train's watchdog asks this address whether the run's controller lives. Left to find one, it may ask another
        # Ray of this machine, which knows nothing of the controller, and then ends the training.
        port = _free_port()
        for name, value in UNREAD.items():
            os.environ.setdefault(name, value)
        environment = {**handed_on(os.environ), WATCHDOG: f"http://127.0.0.1:{port}"}
        dashboard = {"include_dashboard": True, "dashboard_host": "127.0.0.1", "dashboard_port": port}
        try:
            ray.init(address="local", runtime_env={"env_vars": environment}, **dashboard, **settings, **init)
        except Exception as error:  # of many kinds, with what its processes said
            ray.shutdown()
            raise ClusterError(
                f"no Ray could be started on this machine ({_first_line(error)}): see that it has memory, a writable /tmp "
                "and is not busy beyond measure, then start again; or join a running one with RAY_ADDRESS"
            ) from error
    try:
        yield
    finally:
        ray.shutdown()


def handed_on(environment: Mapping[str, str]) -> dict[str, str]:
    """Pick the variables that a worker must have as its driver has them."""
    return {
        name: value
        for name, value in environment.items()
        if (name in ENVIRONMENT or name.startswith(HANDED_ON)) and not name.startswith(OF_A_NODE)
    }


@contextmanager
def shared() -> Iterator[dict[str, str]]:
    """Keep a Ray for several commands up in the block; given are the environment variables that make them join it.

    It is the cluster at `RAY_ADDRESS` if that is set, otherwise a private one, which ends with the block.
    """
    with connected():
        context = ray.get_runtime_context()
        address = os.environ.get("RAY_ADDRESS") or context.gcs_address
        yield {"RAY_ADDRESS": address, **context.runtime_env.get("env_vars", {})}


def _join(address: str, settings: dict[str, Any]) -> None:
    """Connect to a running cluster: `host:port`, `ray://host:port`, or `auto`. Raises ClusterError if there is none.

    Workers get this process' code and what they need of its environment, unless the job of Ray's that it runs in brings
    them already: what a job names, nobody may name again.
    """
    if address.startswith("http"):
        raise ClusterError(
            f"RAY_ADDRESS={address} takes jobs: `ris submit -- COMMAND` hands it one. To drive the cluster from here give the "
            "address that its head was started with, host:6379"
        )
    print(f"joining the Ray cluster at {address}", file=sys.stderr)
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        if host:  # Ray itself would try for many minutes
            socket.create_connection((host, int(port)), timeout=5).close()
        job = json.loads(os.environ.get(JOB, "{}")).get("runtime_env", {})
        environment = {**handed_on(os.environ), WATCHDOG: get_address_for_submission_client(address)}
        brought = job.get("env_vars", {})
        runtime: dict[str, Any] = {
            "env_vars": {name: value for name, value in environment.items() if name not in brought}
        }
        if "working_dir" not in job and "py_modules" not in job:
            runtime["py_modules"] = [str(CODE / package) for package in ("ris_core", "pipelines")]
        ray.init(address=address, runtime_env=runtime, **settings)
    except (OSError, ValueError) as error:
        raise ClusterError(
            f"no Ray cluster answers at RAY_ADDRESS={address} ({_first_line(error)}). Start it, or unset "
            "RAY_ADDRESS to use a private one on this machine"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def at_once() -> int:
    """Tell how many stages share the cluster now."""
    return int(os.environ.get(AT_ONCE, "1"))


def total_cpus() -> int:
    """Count the CPUs of the whole cluster. Raises ClusterError if it has none."""
    found = int(ray.cluster_resources().get("CPU", 0))
    if not found:
        raise ClusterError("the cluster has no CPUs now: start a node that has some")
    return found


def cpus_each(workers: int, gpus: int) -> int:
    """Give the most CPUs that `workers` processes of `gpus` GPUs each can all have, beside as many of other stages that run now.

    1 where not even that fits.
    """
    wanted = workers * at_once()
    most = max((int(cpus) for cpus, _ in _nodes()), default=1)
    return next((cpus for cpus in range(most, 1, -1) if room(cpus, gpus) >= wanted), 1)


def held(wanted: int, cpus: int, gpus: int) -> int:
    """Tell how many of `wanted` processes of that size the cluster can hold at once, at least 1."""
    return max(1, min(wanted, room(cpus, gpus) // at_once()))


def device(wish: str) -> str:
    """Tell where this process computes what it does itself (`cluster.use_gpu`)."""
    return "cpu" if wish == "no" else best_device()


def _nodes() -> list[tuple[float, float]]:
    """Give CPUs and GPUs of each node."""
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [(resources.get("CPU", 0), resources.get("GPU", 0)) for resources in alive]


def room(cpus: int, gpus: int) -> int:
    """Tell how many processes of that size the cluster's nodes could hold."""
    return sum(int(min(node[0] // cpus, node[1] // gpus) if gpus else node[0] // cpus) for node in _nodes())


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def check_resources(workers: int, cpus: int, gpus: int) -> None:
    """Raise ClusterError if the connected cluster could never hold these processes (Ray itself would wait for ever).

    `cpus` and `gpus` are for each of the `workers`.
    """
    wanted = {"CPU": workers * cpus, "GPU": workers * gpus}
    total, free = ray.cluster_resources(), ray.available_resources()
    lacking = [
        f"{workers} x {count // workers} {name} wanted, the cluster has {total.get(name, 0):g}"
        for name, count in wanted.items()
        if count > total.get(name, 0)
    ]
    if not lacking and room(cpus, gpus) < workers:
        nodes = ", ".join(f"{has[0]:g} CPU and {has[1]:g} GPU" for has in _nodes())
        lacking = [f"{workers} x {cpus} CPU and {gpus} GPU wanted, each on one node; the nodes have {nodes}"]
    if lacking:
        raise ClusterError(
            f"the cluster is too small: {'; '.join(lacking)}. "
            "Ask for less in the section `cluster` of params.yaml, or add nodes"
        )
    for name, count in wanted.items():
        if count > free.get(name, 0):
            print(f"waiting for {count} {name}: {free.get(name, 0):g} of {total[name]:g} are free now", file=sys.stderr)


def data() -> ModuleType:
    """Give the module `ray.data`, without its INFO lines, and with progress bars only where somebody watches.

    Nothing is reserved for operators that wait: a dataset here has a single one that does work, and of two CPUs one stood idle.
    """
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # it tells that there are no bars
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = sys.stderr.isatty()
    context.op_resource_reservation_enabled = False
    return ray.data


def has_gpu(wish: str) -> bool:
    """Tell whether to use GPUs (`cluster.use_gpu`); `auto` takes them if the cluster has some, and says so if it has none."""
    if wish != "auto":
        return wish == "yes"
    found = ray.cluster_resources().get("GPU", 0) > 0
    if not found:
        print("no GPU in the cluster: running on CPUs", file=sys.stderr)
    return found


def collect(rows: ray.data.Dataset) -> pa.Table:
    """Collect all blocks of a Ray dataset as one Arrow table on the driver."""
    return pa.concat_tables(ray.get(rows.to_arrow_refs()))
