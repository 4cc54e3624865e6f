"""What the tests of the service share: one that runs in this process or behind a real port, and requests to it."""

from __future__ import annotations

import base64
import io
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import numpy as np
import uvicorn
from fastapi import FastAPI
from fastapi.testclient import TestClient
from PIL import Image

from pipelines.service.engine import Engine
from ris_core.predictor import Prediction

TEXTS = ["the red star", "the big circle", "left", "the blue ring next to the star"]
SEGMENT = "/v1/segment"


def picture(seed: int, height: int = 48, width: int = 64, form: str = "PNG") -> bytes:
    """A picture of large random tiles."""
    pixels = np.random.default_rng(seed).integers(0, 255, (height // 8, width // 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST).save(buffer, form)
    return buffer.getvalue()


PICTURES = [picture(seed, 40 + 8 * seed, 64 + 16 * (seed % 3)) for seed in range(5)]


def asked(content: bytes, *texts: str, **fields: Any) -> dict[str, Any]:
    """A request about encoded bytes, as JSON."""
    return {"image": base64.b64encode(content).decode(), "expressions": list(texts), **fields}


def wait_ready(client: httpx.Client, seconds: float = 60) -> None:
    """Return when the service says that it is ready."""
    deadline = time.monotonic() + seconds
    while client.get("/ready").status_code != 200:
        assert time.monotonic() < deadline, "it did not become ready"
        time.sleep(0.02)


@contextmanager
def inside(app: FastAPI) -> Iterator[TestClient]:
    """A client of the service in this process, once it is ready."""
    with TestClient(app, raise_server_exceptions=False) as client:
        wait_ready(client)
        yield client


@contextmanager
def listening(app: FastAPI, wait: bool = True) -> Iterator[httpx.Client]:
    """A client of the service behind a real port of this machine, once it is ready."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, http="h11", ws="none", log_level="critical", access_log=False))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=60) as client:
            if wait:
                wait_ready(client)
            yield client
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


class Gate:
    """Holds a model at its next call until it is opened, and tells what calls it had."""

    def __init__(self, engine: Engine):
        assert engine.encodings is not None
        self.predictor = engine.encodings.predictor
        self.calls: list[list[str]] = []
        self.reached, self.opened = threading.Event(), threading.Event()
        self._answer = self.predictor.answer

    def _held(self, encoded: Any, texts: Any, threshold: Any = None) -> list[Prediction]:
        self.calls.append(list(texts))
        self.reached.set()
        assert self.opened.wait(30)
        return self._answer(encoded, texts, threshold)

    def __enter__(self) -> Gate:
        self.predictor.answer = self._held  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        self.opened.set()
        del self.predictor.answer


def raw(client: httpx.Client, content: bytes, patience: float = 20) -> bytes:
    """Send bytes as they are, and read until the service closes or `patience` seconds of silence are over."""
    with socket.create_connection((client.base_url.host, client.base_url.port or 80)) as connection:
        connection.settimeout(patience)
        connection.sendall(content)
        found = b""
        while part := connection.recv(65536):
            found += part
            head, _, body = found.partition(b"\r\n\r\n")
            _, said, length = head.lower().partition(b"content-length: ")
            if said and len(body) >= int(length.split(b"\r\n")[0]):
                break
        return found


def told(response: httpx.Response) -> str:
    """The code of a refusal."""
    assert set(response.json()) == {"error"}, response.text
    return str(response.json()["error"]["code"])


def post_json(body: str | bytes) -> dict[str, Any]:
    """Arguments of a post with a body that is no dictionary of ours."""
    return {"content": body, "headers": {"content-type": "application/json"}}


def dumped(content: dict[str, Any]) -> bytes:
    return json.dumps(content).encode()
