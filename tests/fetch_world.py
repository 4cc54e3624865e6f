"""A server on this machine that gives files as servers of the world do: cut, changed, late, refused, or something else."""

from __future__ import annotations

import hashlib
import io
import re
import time
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread

from refer_fixture import HTML

Quirk = Callable[["Handler", bytes], None]


@dataclass
class Served:
    """What was asked for and given."""

    path: str
    asked: str  # the header Range
    status: int = 0
    sent: int = 0


@dataclass
class Server:
    """Files by path (with a proxy's requests, by address), what goes wrong with the next requests, and what was served."""

    port: int = 0
    files: dict[str, bytes] = field(default_factory=dict)
    quirks: dict[str, list[Quirk]] = field(default_factory=lambda: defaultdict(list))
    always: dict[str, Quirk] = field(default_factory=dict)
    log: list[Served] = field(default_factory=list)
    lock: Lock = field(default_factory=Lock)

    def address(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    def sent(self, path: str) -> int:
        return sum(served.sent for served in self.log if served.path == path)

    def asked(self, path: str) -> list[str]:
        return [served.asked for served in self.log if served.path == path]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    world: Server

    def do_GET(self) -> None:
        world = self.world
        self.served = Served(self.path, self.headers.get("Range", ""))
        with world.lock:
            world.log.append(self.served)
            waiting = world.quirks[self.path]
            quirk = waiting.pop(0) if waiting else world.always.get(self.path, proper)
        if self.path not in world.files and quirk is proper:
            quirk = status(404)
        quirk(self, world.files.get(self.path, b""))

    def head(self, code: int, length: int | None, **headers: str) -> None:
        self.served.status = code
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if length is None:
            self.close_connection = True
        else:
            self.send_header("Content-Length", str(length))
        self.end_headers()

    def body(self, content: bytes) -> None:
        self.wfile.write(content)
        self.served.sent += len(content)

    def log_message(self, *arguments: object) -> None:
        pass


def tag(content: bytes) -> str:
    return f'"{hashlib.md5(content).hexdigest()}"'


def range_of(handler: Handler, content: bytes) -> int:
    """The byte that an answer begins with: 0 without a Range, or where If-Range names another version."""
    found = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range", ""))
    return int(found[1]) if found and handler.headers.get("If-Range", tag(content)) == tag(content) else 0


def proper(handler: Handler, content: bytes, most: int | None = None) -> None:
    """A good server; or one that breaks the connection after so many bytes."""
    start = range_of(handler, content)
    if start >= len(content) and start:
        handler.head(416, 0, Content_Range=f"bytes */{len(content)}")
        return
    whole = {"ETag": tag(content)}
    if start:
        whole["Content_Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
    handler.head(206 if start else 200, len(content) - start, **whole)
    handler.body(content[start:][:most])
    if most is not None:
        handler.close_connection = True


def cut(most: int) -> Quirk:
    return lambda handler, content: proper(handler, content, most)


def lying(more: int) -> Quirk:
    """Says that the file has some bytes more, or fewer, than it has."""

    def quirk(handler: Handler, content: bytes) -> None:
        handler.head(200, len(content) + more)
        handler.body(content[: len(content) + more])
        handler.close_connection = True

    return quirk


def without_ranges(most: int | None = None) -> Quirk:
    def quirk(handler: Handler, content: bytes) -> None:
        handler.head(200, len(content))
        handler.body(content[:most])
        if most is not None:
            handler.close_connection = True

    return quirk


def status(code: int, **headers: str) -> Quirk:
    def quirk(handler: Handler, content: bytes) -> None:
        handler.head(code, len(HTML), **headers)
        handler.body(HTML)

    return quirk


def page(handler: Handler, content: bytes) -> None:
    handler.head(200, len(HTML), Content_Type="text/html")
    handler.body(HTML)


def slow(pieces: int, seconds: float) -> Quirk:
    """Gives the file in pieces with a pause after each."""

    def quirk(handler: Handler, content: bytes) -> None:
        start = range_of(handler, content)
        headers = {"Content_Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if start else {}
        handler.head(206 if start else 200, len(content) - start, ETag=tag(content), **headers)
        for at in range(start, len(content), size := -(-len(content) // pieces)):
            try:
                handler.body(content[at : at + size])
                handler.wfile.flush()
            except OSError:  # whoever asked was killed
                return
            time.sleep(seconds)

    return quirk


@contextmanager
def serving() -> Iterator[Server]:
    """Serve in the block."""
    world = Server()
    handler = type("Handler", (Handler,), {"world": world})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        world.port = server.server_address[1]
        thread = Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield world
        server.shutdown()


def zipped(files: Mapping[str, bytes]) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, each in files.items():
            archive.writestr(name, each)
    return content.getvalue()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
