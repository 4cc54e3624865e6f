"""Servers in processes of their own, and clients that ask them all the time."""

from __future__ import annotations

import http.client
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from benchmarks.fuzz_service import JSON, Sent
from ris_core.errors import ClusterError

START = 120.0  # seconds a server may take to answer
PATIENCE = 120.0  # seconds a client waits for an answer
BACK_OFF = (429, 503)  # answers after which a client waits as long as Retry-After says


@dataclass(frozen=True)
class Server:
    """One that answers at 127.0.0.1. process: the first of its processes."""

    port: int
    process: psutil.Process

    @property
    def memory(self) -> float:
        """Resident MiB of all of its processes."""
        found = 0
        for each in [self.process, *self.process.children(recursive=True)]:
            with suppress(psutil.Error):
                found += each.memory_info().rss
        return found / 2**20


@contextmanager
def ris_serve(model: str, *options: str) -> Iterator[Server]:
    """`ris serve` of a model, once it is ready. Raises ClusterError if it ends instead."""
    command = [sys.executable, "-m", "pipelines.cli", "serve", model, "--port", "0", *options]
    with _ended(subprocess.Popen(command, stderr=subprocess.PIPE, text=True)) as process:
        assert process.stderr is not None
        lines = []
        port = None
        for line in process.stderr:
            lines.append(line)
            if found := re.search(r"listening at http://127\.0\.0\.1:(\d+)/", line):
                port = int(found[1])
                break
        if port is None:
            raise ClusterError(f"ris serve {model} ended: {''.join(lines).strip()}")
        threading.Thread(target=process.stderr.read, daemon=True).start()  # else it would wait for a reader
        _wait(process, port, "/ready")
        yield Server(port, psutil.Process(process.pid))


@contextmanager
def mlflow_serve(model: str, log: Path) -> Iterator[Server]:
    """`mlflow models serve` of a model in the registry, in this environment, once it answers; what it says goes to `log`."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    program = str(Path(sys.executable).parent / "mlflow")
    command = [program, "models", "serve", "-m", model, "--env-manager", "local", "--port", str(port)]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    with (
        log.open("w") as told,
        _ended(
            subprocess.Popen(
                command, stdout=told, stderr=told, text=True, start_new_session=True, env={**os.environ, "PATH": path}
            )
        ) as process,
    ):
        _wait(process, port, "/ping")
        yield Server(port, psutil.Process(process.pid))


@contextmanager
def _ended(process: subprocess.Popen[str]) -> Iterator[subprocess.Popen[str]]:
    """End a process, and what it has started, with the block."""
    try:
        yield process
    finally:
        with suppress(psutil.Error):
            for child in psutil.Process(process.pid).children(recursive=True):
                child.terminate()
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(20)
        process.kill()
        process.wait()


def _wait(process: subprocess.Popen[str], port: int, path: str) -> None:
    deadline = time.monotonic() + START
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ClusterError(f"the server ended by itself ({process.returncode})")
        with suppress(OSError, http.client.HTTPException):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", path)
            if connection.getresponse().status == 200:
                return
        time.sleep(0.2)
    raise ClusterError(f"the server does not answer after {START:g} seconds")


class Client:
    """One connection, which is opened again when the server has closed it."""

    def __init__(self, port: int):
        self._port = port
        self._connection = self._new()

    def _new(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self._port, timeout=PATIENCE)

    def send(self, sent: Sent) -> tuple[int, bytes]:
        """Give the status and body of an answer."""
        status, body, _ = self.ask(sent)
        if "Content-Length" in sent.headers:  # a lie: the server waits for the rest, and would take the next for it
            self.close()
        return status, body

    def ask(self, sent: Sent) -> tuple[int, bytes, float]:
        """Give the status and body of an answer, and the seconds it asks to wait (0 where it does not)."""
        headers = dict(sent.headers)
        if sent.content_type:
            headers["Content-Type"] = sent.content_type
        try:
            return self._ask(sent, headers)
        except (http.client.RemoteDisconnected, ConnectionError):  # an idle connection that was closed meanwhile
            self.close()
            return self._ask(sent, headers)

    def _ask(self, sent: Sent, headers: dict[str, str]) -> tuple[int, bytes, float]:
        self._connection.request(sent.method, sent.path, sent.body, headers)
        response = self._connection.getresponse()
        return response.status, response.read(), float(response.headers.get("Retry-After", 0))

    def close(self) -> None:
        self._connection.close()
        self._connection = self._new()


@dataclass
class Seen:
    """What clients have seen. seconds: of each answer of status 200. faults: what was wrong with answers."""

    counts: Counter[int] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    wall: float = 0.0

    @property
    def rate(self) -> float:
        """Answers a second."""
        return self.counts[200] / self.wall


def load(
    port: int,
    clients: int,
    seconds: float,
    next_of: Callable[[int, int], Sent],
    check: Callable[[Sent, bytes], str | None],
) -> Seen:
    """Let clients ask one request after the other: `next_of(client, n)`; `check` says what is wrong with an answer."""
    found, lock, end = Seen(), threading.Lock(), time.perf_counter() + seconds

    def client(number: int) -> None:
        connection, count = Client(port), 0
        while time.perf_counter() < end:
            sent = next_of(number, count)
            count += 1
            start = time.perf_counter()
            try:
                status, body, wait = connection.ask(sent)
            except Exception as error:  # it is counted, and the load goes on
                status, body, wait = 0, repr(error).encode(), 0.0
                connection.close()
            took = time.perf_counter() - start
            fault = check(sent, body) if status == 200 else None
            if status not in (200, *BACK_OFF):
                fault = f"status {status}: {body[:200]!r}"
            with lock:
                found.counts[status] += 1
                if status == 200:
                    found.seconds.append(took)
                if fault:
                    found.faults.append(f"{sent.name}: {fault}")
            if status in BACK_OFF:
                time.sleep(min(wait, max(0.0, end - time.perf_counter())))

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found.wall = time.perf_counter() - start
    return found


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which a share of all lies."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def requested(name: str, body: bytes, path: str) -> Sent:
    """A request of JSON."""
    return Sent(name, body, JSON, path=path)
