"""`ris serve`: models behind HTTP, with a page to try them; see `pipelines.service`."""

from __future__ import annotations

import ipaddress
import logging
import os
import re
import signal
import socket
import sys
import warnings
from pathlib import Path
from typing import Annotated

import torch
import typer
import uvicorn

from pipelines import paths
from pipelines.predict import model_folder
from pipelines.service.app import create_app
from pipelines.service.engine import Engine, Served
from pipelines.service.limits import MIB, Limits
from ris_core.errors import ConfigError

TOKEN = "RIS_TOKEN"
DEFAULT = Limits()
BACKLOG = 512
ALIAS = re.compile(r"models:/[^/@]+@[^/@]+")
VERSION = re.compile(r"models:/([^/@]+)/[^/@]+")


def main(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME=]MODEL ...",
            help="model folders, or models:/name@alias of the registry; clients know one by NAME",
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="the address to listen at; 0.0.0.0 is all of this machine's")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one")] = 8000,
    max_body: Annotated[int, typer.Option(help="MiB of a request")] = DEFAULT.max_body // MIB,
    max_pixels: Annotated[float, typer.Option(help="million pixels of an image")] = DEFAULT.max_pixels / 1e6,
    max_expressions: Annotated[int, typer.Option(help="expressions of a request")] = DEFAULT.max_expressions,
    timeout: Annotated[float, typer.Option(help="seconds that a request may take")] = DEFAULT.timeout,
    queue: Annotated[int, typer.Option(help="requests at once; beyond it they are refused (429)")] = DEFAULT.queue,
    cache: Annotated[int, typer.Option(help="MiB of encoded images to remember")] = DEFAULT.cache // MIB,
) -> None:
    """Serve models over HTTP, with a page to try them; a token of clients is read from RIS_TOKEN.

    Models stay as they were loaded, whatever becomes of their folder or alias: start again to serve another version.
    """
    limits = Limits(max_body * MIB, max_expressions, int(max_pixels * 1e6), timeout, queue, cache * MIB)
    token = _token()
    served = [find(model) for model in models or [str(paths.model("cris", "shapes"))]]
    failures: list[Exception] = []

    def loaded(engine: Engine) -> None:
        if engine.failure is None:
            print(f"{engine.name} is ready ({engine.info.uri or 'from a folder'})", file=sys.stderr)
        else:
            failures.append(engine.failure)
            server.should_exit = True

    _quiet()
    leave_a_core()
    app = create_app(served, limits, token, loaded)
    config = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        loop="asyncio",
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=int(timeout) + 1,
    )
    server = uvicorn.Server(config)
    with _listening(host, port) as listener:
        _tell(listener, token)
        _run(server, listener)
    if failures:
        raise failures[0]


def _token() -> str | None:
    token = os.environ.get(TOKEN)
    if token is not None and not (token and token.isascii() and token.isprintable() and " " not in token):
        raise ConfigError(f"{TOKEN} is set, but is no token: use letters, digits and signs without spaces, or unset it")
    return token


def find(model: str) -> Served:
    """Find what `NAME=MODEL`, or MODEL alone, means. Raises ConfigError or ClusterError if there is no such model.

    An alias is read once: what is served is the version that has it now.
    """
    name, given, place = model.partition("=")
    if not given:
        name, place = "", model
    if given and not re.fullmatch(r"[\w.+-]{1,60}", name):
        raise ConfigError(f"{name!r} cannot name a model: use letters, digits and . + - _")
    uri = _pinned(place)
    folder = model_folder(uri)
    if uri.startswith(("models:/", "runs:/")):
        of_registry = VERSION.fullmatch(uri)
        return Served(name or (of_registry[1] if of_registry else Path(uri).name), folder, uri)
    return Served(name or folder.resolve().name, folder)


def _pinned(model: str) -> str:
    """Give the version that an alias of the registry means now; all else as it is."""
    if not ALIAS.fullmatch(model):
        return model
    try:
        from pipelines import tracking, versions  # MLflow takes seconds, and a folder needs none of it
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{model} needs {error.name}, which is not installed here: pip install 'ris[serve]'"
        ) from None
    found = versions.find(tracking.connect(), model)
    return f"models:/{found.name}/{found.version}"


def _listening(host: str, port: int) -> socket.socket:
    """Take an address, before models are loaded. Raises ConfigError if it cannot be had."""
    try:
        listener = socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=BACKLOG
        )
    except OSError as error:
        raise ConfigError(
            f"--host {host} --port {port} cannot be listened at: {error.strerror or error}; is another `ris serve` there? "
            "Give another --port (0 takes a free one)"
        ) from None
    # What it accepts inherits this. Else an answer's body waits 40 ms for its head to be acknowledged.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def _tell(listener: socket.socket, token: str | None) -> None:
    """Say where the page is, and loudly if everybody can reach it."""
    address, port = listener.getsockname()[:2]
    where = f"[{address}]" if ":" in address else address
    print(f"listening at http://{where}:{port}/ (a page to try it; /v1/segment for programs)", file=sys.stderr)
    if token is None and not ipaddress.ip_address(address).is_loopback:
        print(
            f"WARNING: everybody who reaches {where}:{port} may use this service, and nothing asks who it is. Set {TOKEN} to a "
            "secret that clients send, or listen at 127.0.0.1",
            file=sys.stderr,
        )


def leave_a_core() -> None:
    """Compute with one thread fewer than there are cores, unless OMP_NUM_THREADS says how many.

    Threads of one computation spin while they wait for each other. Where requests are read, or others work, on the core
    that one of them needs, all wait: 15 ms of one thread have become 2,600 ms of two on a busy machine.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) - 1))


def _quiet() -> None:
    """Keep from the log what libraries think of bytes that anybody may send: the sender is told."""
    logging.getLogger("python_multipart").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="PIL")


def _run(server: uvicorn.Server, listener: socket.socket) -> None:
    """Serve until SIGTERM or Ctrl-C, which end it with exit code 0 once what has begun is answered; a second Ctrl-C at once."""
    # uvicorn raises a signal once more when it has ended; for us that is the end that was asked for.
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        server.run(sockets=[listener])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    from pipelines.stage import run

    run(main)
