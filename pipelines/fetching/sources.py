"""Files at http, https, file and s3 addresses, opened from any byte on, with what their source says of them.

What goes wrong is one of three: `Refused`, for which another address is the remedy; `Broken`, which may be better in a
moment; `Changed`, where what was fetched before does not go together with what is there now. Their texts are clauses that
go on after an address.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote, urlsplit, urlunsplit

import requests
from pyarrow.fs import FileSystem, FileType
from requests.adapters import HTTPAdapter

SCHEMES = ("https", "http", "file", "s3")
PIECE = 1 << 16  # what was read of a piece is lost when a connection breaks
CONNECT_SECONDS, SILENT_SECONDS = 20, 60
LONGEST_WAIT = 60.0  # seconds, whatever a server asks for
PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})  # statuses that may be better in a moment
SHOWN = 200  # characters of what a library says

_CONNECTION = re.compile(r"^(<.*>|HTTPS?Connection(Pool)?\(.*?\)): ")  # urllib3's object, before what it says
_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")


class Refused(Exception):
    """An address does not give the file, and will not in a moment."""


class Broken(Exception):
    """A transfer did not come to its end; `wait` is how many seconds the server asks to be left alone, if it does."""

    def __init__(self, told: str, wait: float | None = None):
        super().__init__(told)
        self.wait = wait


class Changed(Exception):
    """What is there now is not what the beginning was fetched of."""


@dataclass(frozen=True)
class Opened:
    """A file from byte `start` on: `total` bytes of the whole file and a `mark` of its version, as far as its source tells."""

    start: int
    total: int | None
    mark: str
    pieces: Iterator[bytes]


class Sources:
    """Connections to where files are, for any number of threads; `at_once` of them at a time to one server.

    Proxies are those of the environment (HTTP_PROXY, HTTPS_PROXY, NO_PROXY), as `requests` reads them.
    """

    def __init__(self, at_once: int = 1):
        self.session = requests.Session()
        for scheme in ("http://", "https://"):
            self.session.mount(scheme, HTTPAdapter(pool_connections=at_once, pool_maxsize=at_once, pool_block=True))

    def open(self, address: str, start: int = 0, mark: str = "") -> AbstractContextManager[Opened]:
        """Open a file. With a `mark`, what begins at `start` is of the version with this mark.

        Raises Refused, Broken or Changed, also while it is read. A server may give the file from its beginning instead.
        """
        scheme = urlsplit(address).scheme
        if scheme in ("http", "https"):
            return self._http(address, start, mark)
        return _local(address, start, mark) if scheme == "file" else _bucket(address, start, mark)

    def close(self) -> None:
        """Close what is open."""
        self.session.close()

    @contextmanager
    def _http(self, address: str, start: int, mark: str) -> Iterator[Opened]:
        headers = {"Accept-Encoding": "identity"}
        if start:
            headers["Range"] = f"bytes={start}-"
            if mark:
                headers["If-Range"] = mark
        with _explained():
            answer = self.session.get(address, headers=headers, stream=True, timeout=(CONNECT_SECONDS, SILENT_SECONDS))
        with answer:
            begin, total = _part(answer, start)
            encoding = answer.headers.get("Content-Encoding", "identity")
            if encoding != "identity":
                raise Refused(f"packs the file on its way ({encoding[:SHOWN]}), although asked not to")
            found = _mark(answer)
            if begin and mark and found and found != mark:
                raise Changed("has another version now")
            yield Opened(begin, total, found, _read(answer))


def shown(address: str) -> str:
    """Give an address as a message shows it: without passwords, and without its options, which may be signatures."""
    parts = urlsplit(address)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def problem_of(address: str) -> str | None:
    """Tell why files cannot be had at an address, in words that go on after it."""
    try:
        parts = urlsplit(address)
        parts.port  # noqa: B018  # raises ValueError where it is no number
    except ValueError as error:
        return f"is no address ({error})"
    if parts.scheme not in SCHEMES:
        return f"is no address that can be read: use {', '.join(f'{scheme}://' for scheme in SCHEMES)}"
    if parts.scheme == "file" and (parts.netloc not in ("", "localhost") or not parts.path.startswith("/")):
        return "is no file of this machine: write file:///, then the path from the root"
    if parts.scheme != "file" and not parts.netloc:
        return "names no server" if parts.scheme != "s3" else "names no bucket"
    return None


def _part(answer: requests.Response, start: int) -> tuple[int, int | None]:
    """Give the byte that an answer begins with, and the size of the whole file. Raises what its status means."""
    if answer.status_code == 200:
        return 0, _number(answer.headers.get("Content-Length"))
    if answer.status_code == 206:
        found = _RANGE.fullmatch(answer.headers.get("Content-Range", "").strip())
        if not start or found is None or int(found[1]) != start:
            raise Changed("gives another part of the file than it was asked for")
        return start, _number(found[2])
    if answer.status_code == 416 and start:
        raise Changed("has a shorter file now")
    told = f"answers {answer.status_code} {answer.reason or ''}".rstrip()
    if answer.status_code in PASSING:
        asked = _number(answer.headers.get("Retry-After"))
        raise Broken(told, None if asked is None else min(asked, LONGEST_WAIT))
    raise Refused(told)


def _read(answer: requests.Response) -> Iterator[bytes]:
    with _explained():
        yield from answer.iter_content(PIECE)


def _mark(answer: requests.Response) -> str:
    """Give what names the version of a file: a strong ETag, else its date; with a weak one no part can be asked for."""
    tag = answer.headers.get("ETag", "")
    return tag if tag.startswith('"') else answer.headers.get("Last-Modified", "")


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and re.fullmatch(r"[0-9]{1,18}", text.strip()) else None


@contextmanager
def _explained() -> Iterator[None]:
    """Sort what `requests` raises in the block."""
    try:
        yield
    except (requests.exceptions.SSLError, requests.exceptions.TooManyRedirects) as error:
        raise Refused(_reason(error)) from error
    except (
        requests.ConnectionError,
        requests.Timeout,
        requests.exceptions.ChunkedEncodingError,
        requests.exceptions.ContentDecodingError,
    ) as error:
        raise Broken(_reason(error)) from error
    except (requests.RequestException, ValueError) as error:  # an address or a proxy that is none
        raise Refused(_reason(error)) from error


def _reason(error: BaseException) -> str:
    """Give what is at the bottom of an error of `requests`, which wraps those of others."""
    while True:
        inner = getattr(error, "reason", None) or (error.args[0] if error.args else None)
        if not isinstance(inner, BaseException):
            break
        error = inner
    told = error.args[0] if error.args and isinstance(error.args[0], str) else str(error)
    told = _CONNECTION.sub("", told).strip() or type(error).__name__
    return f"does not answer as it should ({told[:SHOWN]})"


@contextmanager
def _local(address: str, start: int, mark: str) -> Iterator[Opened]:
    path = Path(unquote(urlsplit(address).path))
    with _readable():
        file = path.open("rb")
        status = path.stat()
    with file:
        yield _from(file, status.st_size, f"{status.st_mtime_ns}-{status.st_size}", start, mark)


@contextmanager
def _bucket(address: str, start: int, mark: str) -> Iterator[Opened]:
    parts = urlsplit(address)
    path = f"{parts.netloc.rpartition('@')[2]}{unquote(parts.path)}"
    with _readable():
        system = _system(urlunsplit((parts.scheme, parts.netloc, "/", parts.query, "")))
        info = system.get_file_info(path)
        if info.type != FileType.File:
            raise FileNotFoundError(path)
        file = system.open_input_file(path)
    with file:
        yield _from(file, info.size, f"{info.mtime_ns}-{info.size}", start, mark)


@lru_cache(maxsize=8)
def _system(place: str) -> FileSystem:
    return FileSystem.from_uri(place)[0]


def _from(file: BinaryIO, size: int, found: str, start: int, mark: str) -> Opened:
    """Give an open file from a byte on. Raises Changed where that would be of another version."""
    if start > size or (start and mark and mark != found):
        raise Changed("has another version now")
    with _readable():
        file.seek(start)
    return Opened(start, size, found, _pieces(file))


def _pieces(file: BinaryIO) -> Iterator[bytes]:
    with _readable():
        while piece := file.read(PIECE):
            yield piece


@contextmanager
def _readable() -> Iterator[None]:
    """Turn what a disk or a bucket says in the block into Refused: pyarrow has tried again by itself."""
    try:
        yield
    except FileNotFoundError as error:
        raise Refused("holds no such file") from error
    except OSError as error:
        told = error.strerror or next(iter(str(error).splitlines()), "") or type(error).__name__
        raise Refused(f"cannot be read ({told[:SHOWN]})") from error
    except ValueError as error:  # an address that pyarrow cannot read, too
        raise Refused(f"is no place of files ({str(error)[:SHOWN]})") from error
