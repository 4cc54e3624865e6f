"""A stage ends when what runs it has ended: DVC that is killed, say, takes nobody with it."""

from __future__ import annotations

import os
import signal
import threading
import time

import psutil

CALLERS = ("dvc", "pipelines.repro", "pipelines.job")
LOOKS_EVERY = 1  # seconds


def hold() -> None:
    """End this process, as SIGTERM does, once a DVC that runs it, or whatever of ours runs that, is no more."""
    callers = _callers()
    if callers:
        threading.Thread(target=_watch, args=(callers,), name="lifeline", daemon=True).start()


def _callers() -> list[psutil.Process]:
    """Find ancestors up to the farthest that is DVC or ours."""
    above = psutil.Process().parents()
    ours = [place for place, process in enumerate(above) if any(name in _command(process) for name in CALLERS)]
    return above[: ours[-1] + 1] if ours else []


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def _watch(callers: list[psutil.Process]) -> None:
    while all(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in callers):
        time.sleep(LOOKS_EVERY)
    os.kill(os.getpid(), signal.SIGTERM)
