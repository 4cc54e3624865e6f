"""The desk: lets requests in while there is room, hands them to their model, and waits as long as there is time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from fastapi import Request
from starlette.requests import ClientDisconnect

from pipelines.service.engine import Answers, Engine, Job, Served
from pipelines.service.limits import Limits
from pipelines.service.metrics import Metrics
from pipelines.service.reading import Asked, read
from pipelines.service.refusal import Refusal
from ris_core.errors import ConfigError, short


class Desk:
    """Some models, and the requests about them.

    Raises WeightsError for a folder that holds no model, ConfigError for two of one name. `loaded` is called with each
    engine, in its thread, when it is ready or its `failure` is known.
    """

    def __init__(self, models: Sequence[Served], limits: Limits, loaded: Callable[[Engine], object] = lambda _: None):
        names = [served.name for served in models]
        if twins := sorted({name for name in names if names.count(name) > 1}):
            raise ConfigError(f"two models are named {', '.join(twins)}: give them names, NAME=MODEL")
        self.limits = limits
        self.inside = 0
        self.metrics = Metrics(lambda: self.inside, self._caches)
        self.engines = {
            served.name: Engine(
                served, limits.cache // len(models), self.metrics.batches.labels(served.name).observe, loaded
            )
            for served in models
        }

    def _caches(self) -> dict[str, Any]:
        return {name: engine.encodings for name, engine in self.engines.items() if engine.encodings is not None}

    def start(self) -> None:
        for engine in self.engines.values():
            engine.start()

    def stop(self) -> None:
        for engine in self.engines.values():
            engine.stop()

    def check_ready(self) -> None:
        """Raise Refusal unless all models answer."""
        if missing := [name for name, engine in self.engines.items() if not engine.ready]:
            raise Refusal("not_ready", f"not ready: {', '.join(missing)}")

    async def segment(self, request: Request) -> dict[str, Any]:
        """Answer a request as `schema.Answered` has it. Raises Refusal otherwise."""
        deadline = time.monotonic() + self.limits.timeout
        with self._let_in():
            try:
                async with asyncio.timeout(self.limits.timeout):
                    asked = await read(request, self.limits)
            except TimeoutError:
                raise Refusal("too_slow", f"the body did not arrive within {self.limits.timeout:g} seconds") from None
            engine = self._engine(asked.options.model)
            job = Job(
                asked.image,
                asked.digest,
                asked.texts,
                asked.options.threshold,
                asked.options.masks,
                asked.options.location,
                deadline,
            )
            engine.submit(job)
            return _answered(engine, asked, await self._wait(job, request))

    @contextmanager
    def _let_in(self) -> Iterator[None]:
        """Hold a place. Before the body is read: else bodies that wait would fill the memory."""
        if self.inside >= self.limits.queue:
            raise Refusal("queue_full", f"{self.limits.queue} requests are being answered or wait for it")
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1

    def _engine(self, name: str | None) -> Engine:
        if name is None:
            return next(iter(self.engines.values()))
        if name not in self.engines:
            raise Refusal("unknown_model", f"no model {short(name)} is served; there are {', '.join(self.engines)}")
        return self.engines[name]

    async def _wait(self, job: Job, request: Request) -> Answers:
        """Wait for an answer as long as there is time, and somebody to give it to. Raises ClientDisconnect if not."""
        answers = asyncio.wrap_future(job.answers)
        gone = asyncio.ensure_future(_gone(request))
        try:
            left = job.deadline - time.monotonic()
            either: set[asyncio.Future[Any]] = {answers, gone}
            await asyncio.wait(either, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if answers.done():
                return answers.result()
            if gone.done():
                raise ClientDisconnect
            raise Refusal("overdue", f"there is no answer after {self.limits.timeout:g} seconds")
        finally:
            job.abandoned = True
            answers.cancel()
            gone.cancel()
            with suppress(asyncio.CancelledError):
                await gone


async def _gone(request: Request) -> None:
    """Return when the client has hung up."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _answered(engine: Engine, asked: Asked, answers: Answers) -> dict[str, Any]:
    entries = [*answers.entries, *({"index": index, "error": error} for index, error in asked.wrong.items())]
    return {
        "model": engine.info.model_dump(),
        "image": {"height": answers.height, "width": answers.width},
        "answers": sorted(entries, key=lambda entry: entry["index"]),
    }
