"""One model and the thread that answers for it.

Requests wait in the order in which they came. The thread takes the first, and with it all others about the same image and
threshold: their expressions are answered in one call. Nobody waits for company: batches form while the thread is busy.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from threading import Condition, Thread
from typing import Any

import numpy as np

from pipelines.service.answers import plain
from pipelines.service.refusal import Refusal
from pipelines.service.schema import MaskForm, ModelInfo
from ris_core.encodings import Encodings
from ris_core.errors import DataError
from ris_core.models.registry import read_description, trains
from ris_core.predictor import EncodedImage, RISPredictor

AT_ONCE = 64  # expressions in a call
PIXELS_AT_ONCE = 20_000_000  # of all masks of a call together: maps of floats, of which a call holds several
LAST_CALL = 10.0  # seconds that a thread is waited for at the end


@dataclass(frozen=True)
class Served:
    """A model to serve. name: for clients; folder: where it lies; uri: of the registry, by its version."""

    name: str
    folder: Path
    uri: str | None = None


@dataclass(frozen=True)
class Answers:
    """height, width: of the image, upright. entries: `schema.Answer` for each text of a job."""

    height: int
    width: int
    entries: list[dict[str, Any]]


@dataclass(eq=False)
class Job:
    """A request as its model sees it. digest: of the image. texts: with their places in the request.

    deadline: of time.monotonic(). abandoned: set by whoever asked, when nobody waits any more.
    """

    image: bytes
    digest: bytes
    texts: Sequence[tuple[int, str]]
    threshold: float | None
    masks: MaskForm
    location: bool
    deadline: float
    abandoned: bool = False
    answers: Future[Answers] = field(default_factory=Future)
    entries: list[dict[str, Any]] = field(default_factory=list)

    @property
    def wanted(self) -> bool:
        """Tell whether somebody waits for it, in time."""
        return not self.abandoned and time.monotonic() < self.deadline

    def goes_with(self, other: Job) -> bool:
        """Tell whether one call can answer both."""
        return self.digest == other.digest and self.threshold == other.threshold


class Engine:
    """Loads a model and answers jobs about it, in a thread of its own, from `start` to `stop`.

    cache: bytes of encoded images that it remembers. batched: is told how many expressions each call had. loaded: is called
    once, in that thread, when the model answers, or `failure` says why it cannot be loaded.
    Raises WeightsError if the folder holds no model.
    """

    def __init__(
        self, served: Served, cache: int, batched: Callable[[int], object], loaded: Callable[[Engine], object]
    ):
        described = read_description(served.folder)
        self.name, self.folder, self.cache = served.name, served.folder, cache
        self.info = ModelInfo(
            name=served.name,
            system=described.system,
            uri=served.uri,
            weights_sha256=described.weights_sha256,
            uses_threshold=trains(described.system),
            dataset=described.info.dataset,
        )
        self.encodings: Encodings | None = None
        self.failure: Exception | None = None
        self._batched, self._loaded = batched, loaded
        self._waiting: deque[Job] = deque()
        self._changed = Condition()
        self._ending = False
        self._thread = Thread(target=self._run, name=f"ris-{served.name}", daemon=True)

    @property
    def ready(self) -> bool:
        """Tell whether it answers."""
        return self.encodings is not None and self._thread.is_alive() and not self._ending

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Refuse those that wait, and let the thread end what it is at."""
        with self._changed:
            self._ending = True
            left = list(self._waiting)
            self._waiting.clear()
            self._changed.notify()
        for job in left:
            _settle(job, Refusal("shutting_down", "the service is ending"))
        self._thread.join(LAST_CALL)

    def submit(self, job: Job) -> None:
        """Let a job wait for its turn. Raises Refusal while the model is being loaded, and at the end."""
        with self._changed:
            if not self.ready:
                code = "shutting_down" if self._ending else "not_ready"
                raise Refusal(code, f"the model {self.name} does not answer at the moment")
            self._waiting.append(job)
            self._changed.notify()

    def _run(self) -> None:
        try:
            predictor = RISPredictor.from_folder(self.folder)
            predictor.answer(predictor.encode(np.full((64, 64, 3), 127, np.uint8)), ["the first is slow"])
        except Exception as error:
            self.failure = error
        else:
            self.encodings = Encodings(predictor, self.cache)
        self._loaded(self)
        while self.encodings is not None and (batch := self._next()):
            self._answer(batch, self.encodings)

    def _next(self) -> list[Job]:
        """Wait for jobs; give the first and those that go with it, none at the end."""
        with self._changed:
            while True:
                for job in [each for each in self._waiting if not each.wanted]:
                    self._waiting.remove(job)
                if self._waiting or self._ending:
                    break
                self._changed.wait()
            if self._ending:
                return []
            batch = [self._waiting.popleft()]
            room = AT_ONCE - len(batch[0].texts)
            for job in list(self._waiting):
                if job.goes_with(batch[0]) and len(job.texts) <= room:
                    self._waiting.remove(job)
                    batch.append(job)
                    room -= len(job.texts)
            return batch

    def _answer(self, batch: Sequence[Job], encodings: Encodings) -> None:
        """Answer jobs that go together. What spoils one of them must not spoil the others."""
        try:
            encoded = encodings.encode(batch[0].image)
            self._fill(batch, encoded, encodings.predictor)
        except DataError as error:  # of the image, which is the same for all: expressions were looked at before
            for job in batch:
                _settle(job, Refusal("bad_image", str(error)))
        except Exception as error:
            if len(batch) == 1:
                _settle(batch[0], error)
                return
            for job in batch:
                job.entries.clear()
                self._answer([job], encodings)
        else:
            for job in batch:
                _settle(job, Answers(encoded.height, encoded.width, job.entries))

    def _fill(self, batch: Sequence[Job], encoded: EncodedImage, predictor: RISPredictor) -> None:
        wanted = [(job, index, text) for job in batch for index, text in job.texts]
        most = max(1, min(AT_ONCE, PIXELS_AT_ONCE // (encoded.height * encoded.width)))
        for start in range(0, len(wanted), most):
            some = [each for each in wanted[start : start + most] if each[0].wanted]
            if not some:
                continue
            found = predictor.answer(encoded, [text for _, _, text in some], batch[0].threshold)
            self._batched(len(some))
            for (job, index, _), prediction in zip(some, found, strict=True):
                job.entries.append(plain(index, prediction, job.masks, job.location))


def _settle(job: Job, outcome: Answers | Exception) -> None:
    """Tell the outcome to whoever waits for it, if anybody still does."""
    if not job.answers.set_running_or_notify_cancel():
        return
    if isinstance(outcome, Answers):
        job.answers.set_result(outcome)
    else:
        job.answers.set_exception(outcome)
