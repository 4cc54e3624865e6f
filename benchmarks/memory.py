"""Memory of the processes that a benchmark starts, looked at while they run."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

PERIOD = 0.1  # seconds between two looks


@dataclass(frozen=True)
class Status:
    """What /proc says of a process; memory in bytes."""

    name: str
    anonymous: int  # its own: the pages of files that it maps are the page cache's, and go when others need the room
    shared: int  # of Ray's raylet, the objects in its store


def status(pid: int) -> Status:
    """Look at a process. Raises OSError or KeyError if there is none any more."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    found = dict(line.split(":", 1) for line in lines if ":" in line)
    anonymous, shared = (1024 * int(found[name].split()[0]) for name in ("RssAnon", "RssShmem"))
    return Status(found["Name"].strip(), anonymous, shared)


@dataclass
class Peaks:
    """The most memory seen, in bytes: of a process that this one started, of a worker of Ray Data, of the object store."""

    driver: int = 0
    worker: int = 0
    store: int = 0
    workers: dict[int, float] = field(default_factory=dict)  # CPU seconds of each

    def look(self) -> None:
        """Look at all processes that come from this one."""
        own = psutil.Process()
        for process in own.children(recursive=True):
            with suppress(OSError, KeyError, psutil.Error):  # it has ended meanwhile
                found = status(process.pid)
                if process.ppid() == own.pid:
                    self.driver = max(self.driver, found.anonymous)
                if process.pid in self.workers or found.name.startswith("ray::Map"):
                    self.workers[process.pid] = sum(process.cpu_times()[:2])
                    self.worker = max(self.worker, found.anonymous)
                if found.name == "raylet":
                    self.store = max(self.store, found.shared)


@contextmanager
def watched() -> Iterator[Peaks]:
    """Look at memory again and again while the block runs."""
    seen, ended = Peaks(), threading.Event()

    def watch() -> None:
        while not ended.wait(PERIOD):
            seen.look()

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        ended.set()
        thread.join()
