"""Several nodes on one machine: a head and workers, each in a network and a mount namespace of its own where that is allowed.

There, nodes know each other by addresses only, and see neither each other's loopback nor the folders that are hidden from them.
Elsewhere (no root, or no namespaces) they are Ray nodes side by side on one host, which share all files: said plainly, since
then nothing has to travel.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import psutil

HEAD = 0
PORT, DASHBOARD = 6379, 8265
CPUS = 1  # on few cores more would only wait for each other
WITHIN = 120  # seconds, for a node to come up
HIDE = """
mount --make-rprivate / && for folder in $HIDDEN; do mount -t tmpfs -o size=1m tmpfs "$folder" || exit 1; done
exec "$@"
"""


class Nodes:
    """A head (which only coordinates) and `workers` nodes of `CPUS` CPUs each, started and killed one by one.

    `hidden` are folders that only the head sees, `place` is where nodes keep logs and caches. All of it ends with the block.
    """

    def __init__(self, workers: int, place: Path, hidden: Sequence[Path] = (), apart: bool | None = None):
        self.count, self.place, self.hidden = workers + 1, place, hidden
        self.apart = namespaces() if apart is None else apart
        self.key = f"ris{os.getpid() % 10000}"
        self.outside = os.open("/proc/self/ns/net", os.O_RDONLY)
        self.started = 0
        self.running: dict[int, subprocess.Popen[bytes]] = {}
        self.others: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Nodes:
        if self.apart:
            self._lay_cables()
            self._enter(Path(f"/var/run/netns/{self.key}n{HEAD}"))
        self.start(HEAD)
        for node in range(1, self.count):
            self.start(node)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for node in range(self.count):
            self.kill(node)
        for process in self.others:
            _kill_tree(process)
        if self.apart:
            self._enter(self.outside)
            for node in range(self.count):
                _ip("netns", "del", f"{self.key}n{node}", check=False)
            _ip("netns", "del", f"{self.key}s", check=False)

    def address(self, node: int) -> str:
        """Tell under which address the others know a node."""
        return f"10.77.0.{10 + node}" if self.apart else "127.0.0.1"

    def start(self, node: int) -> None:
        """Bring a node up, and wait until the cluster counts it."""
        log = (self.place / f"node{node}.log").open("ab")
        common = ["--num-cpus", str(CPUS if node else 0), "--object-store-memory", "100000000", "--disable-usage-stats"]
        where = ["--node-ip-address", self.address(node)]
        if node:
            role = ["--address", f"{self.address(HEAD)}:{PORT}"]
        else:
            dashboard = ["--dashboard-host", self.address(HEAD), "--dashboard-port", str(DASHBOARD)]
            role = ["--head", "--port", str(PORT), *dashboard, "--temp-dir", str(self.place / "ray")]
        self.started += 1
        name = f"{node}-{self.started}"
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", *role, *where, *common, "--node-name", name]
        environment = {"RIS_CACHE": str(self.place / f"cache{node}")}
        self.running[node] = self.run(node, [*command, "--block"], environment, log)
        deadline = time.monotonic() + WITHIN
        while not self._is_up(name):
            if self.running[node].poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"node {node} did not start: see {log.name}")
            time.sleep(0.5)

    def run(
        self, node: int, command: Sequence[str], environment: Mapping[str, str], log: object = subprocess.DEVNULL
    ) -> subprocess.Popen[bytes]:
        """Start a command on a node; on the head it sees everything."""
        if self.apart:
            if node and self.hidden:
                command = ["unshare", "--mount", "sh", "-c", HIDE, "sh", *command]
                environment = {**environment, "HIDDEN": " ".join(map(str, self.hidden))}
            command = ["ip", "netns", "exec", f"{self.key}n{node}", *command] if node else command
        whole = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", **environment}
        process = subprocess.Popen(command, env=whole, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)  # type: ignore[call-overload]
        self.others.append(process)
        return process

    def kill(self, node: int) -> None:
        """Take a node away at once, with everything that runs on it through Ray."""
        process = self.running.pop(node, None)
        if process is not None:
            _kill_tree(process)

    def _is_up(self, name: str) -> bool:
        code = (
            "import ray, sys; from ray._raylet import GcsClient;"
            f"nodes = GcsClient(address='{self.address(HEAD)}:{PORT}').get_all_node_info();"
            f"sys.exit('{name}' not in [each.node_name for each in nodes.values()])"
        )
        asked = self.run(HEAD, [sys.executable, "-c", code], {})
        try:
            return asked.wait(30) == 0
        except subprocess.TimeoutExpired:
            _kill_tree(asked)
            return False

    def _enter(self, namespace: Path | int) -> None:
        """Go with this process, and what it starts, to a network namespace: it is then on the head, as a driver is."""
        opened = namespace if isinstance(namespace, int) else os.open(namespace, os.O_RDONLY)
        if ctypes.CDLL(None, use_errno=True).setns(opened, 0):
            raise OSError(ctypes.get_errno(), f"could not enter {namespace}")

    def _lay_cables(self) -> None:
        switch = f"{self.key}s"
        _ip("netns", "add", switch)
        _ip("-n", switch, "link", "set", "lo", "up")
        _ip("-n", switch, "link", "add", "br0", "type", "bridge")
        _ip("-n", switch, "link", "set", "br0", "up")
        for node in range(self.count):
            name, cable = f"{self.key}n{node}", f"{self.key}c{node}"
            _ip("netns", "add", name)
            _ip("-n", name, "link", "set", "lo", "up")
            _ip("link", "add", cable, "netns", switch, "type", "veth", "peer", "name", "eth0", "netns", name)
            _ip("-n", switch, "link", "set", cable, "master", "br0", "up")
            _ip("-n", name, "addr", "add", f"{self.address(node)}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "eth0", "up")


def namespaces() -> bool:
    """Tell whether this process may make network and mount namespaces."""
    if os.geteuid() != 0:
        return False
    name = f"ris{os.getpid() % 10000}try"
    tried = [
        subprocess.run(command, capture_output=True, check=False).returncode
        for command in (["ip", "netns", "add", name], ["ip", "netns", "exec", name, "unshare", "--mount", "true"])
    ]
    _ip("netns", "del", name, check=False)
    return not any(tried)


def _kill_tree(process: subprocess.Popen[bytes]) -> None:
    with suppress(psutil.NoSuchProcess):
        tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        for each in tree:
            with suppress(psutil.NoSuchProcess):
                each.send_signal(signal.SIGKILL)
    process.wait()


def _ip(*arguments: str, check: bool = True) -> None:
    subprocess.run(["ip", *arguments], check=check, capture_output=True)
