"""Metrics of a training on their way to MLflow, beside the training: a server that is away holds nothing up."""

from __future__ import annotations

import queue
import sys
import threading
import time
from collections.abc import Mapping

from ris_core.errors import RISError

AGAIN_AFTER = 5  # seconds
LAST_WORDS = 20  # seconds to send what is left when a worker ends


class Journal:
    """Takes metrics by step and sends them to a run from a thread of its own, as often as it takes.

    What it cannot send is not lost: a training's checkpoints hold all of it, and who drives the training logs from them what
    the run lacks.
    """

    def __init__(self, run_id: str):
        self.run_id = run_id
        self._new: queue.SimpleQueue[dict[str, float] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._send, name="journal", daemon=True)
        self._thread.start()

    def __call__(self, metrics: Mapping[str, float], step: int) -> None:
        self._new.put({"step": step, **metrics})

    def close(self) -> None:
        """Send what is left, if the server is there."""
        self._new.put(None)
        self._thread.join(LAST_WORDS)

    def _send(self) -> None:
        from pipelines import tracking  # takes seconds, while the training begins

        rows: list[dict[str, float]] = []
        there: tracking.Logged | None = None
        ended = told = False
        while rows or not ended:
            try:
                row = self._new.get(block=not rows, timeout=None)
                ended = ended or row is None
                rows += [row] if row is not None else []
                continue  # until there is no more to send together
            except queue.Empty:
                pass
            try:
                there = tracking.logged(self.run_id) if there is None else there
                tracking.log_points(self.run_id, rows, there)
                rows, told = [], False
            except (tracking.MlflowException, RISError, OSError) as error:
                if not told:
                    reason = str(error).splitlines()[0]
                    print(f"metrics wait for the MLflow store, training goes on ({reason})", file=sys.stderr)
                told, there = True, None  # what was sent may have arrived
                if ended:
                    return
                time.sleep(AGAIN_AFTER)
