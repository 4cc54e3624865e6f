"""How files reach workers on nodes that share no folder with their driver, and come back: through the storage, by content.

On one machine, and where every node sees the driver's folder, workers read and write in place and nothing is copied.
Elsewhere the driver puts every file into `RIS_STORAGE` under the SHA-256 of its content, if it is not there yet; a worker
gets a `Parcel`, the names and checksums of a folder's files, and unpacks it into a cache of its node, once for all workers
there. What it makes comes back the same way. Whatever travels is checked on arrival.
"""

from __future__ import annotations

import fcntl
import getpass
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, NoReturn

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from tqdm import tqdm

from pipelines import paths
from ris_core.errors import ClusterError, DataError, list_problems
from ris_core.files import PARTIAL, file_sha256, replaced_file
from ris_core.options import Plain
from ris_core.storage import Storage

OBJECTS = "objects"
AT_ONCE = 16  # files on their way
CACHE_GB = 100.0
PROBE_SECONDS = 120

_held: dict[Path, IO[str]] = {}  # locks of the trees that this process reads, until it ends


@dataclass(frozen=True)
class Parcel:
    """A file or folder in the storage: SHA-256 and size of every file by its relative name; "" is a file's own."""

    storage: str
    files: dict[str, tuple[str, int]]

    def __post_init__(self) -> None:
        outside = [name for name in self.files if name.startswith("/") or ".." in Path(name).parts]
        if outside:
            raise ClusterError(list_problems("a parcel names files outside of its folder", outside))

    @property
    def digest(self) -> str:
        """Give the name of the content."""
        return hashlib.sha256(json.dumps(self.files, sort_keys=True).encode()).hexdigest()[:24]

    @staticmethod
    def of(content: Plain) -> Parcel:
        """Make it of what `dataclasses.asdict` gave."""
        return Parcel(content["storage"], {name: (digest, size) for name, (digest, size) in content["files"].items()})


@dataclass(frozen=True)
class Place:
    """Where a worker finds a file or folder of its driver's: at a path that it sees, or in a parcel."""

    path: str = ""
    parcel: Parcel | None = None

    def local(self) -> Path:
        """Give a local path of it, unpacked first if need be; to be read only. Raises ClusterError if it cannot be had."""
        return Path(self.path) if self.parcel is None else unpacked(self.parcel)

    def plain(self) -> Plain:
        """Give it as JSON has it."""
        return asdict(self)

    @staticmethod
    def of(content: Plain) -> Place:
        """Make it of what `plain` gave."""
        return Place(content["path"], Parcel.of(content["parcel"]) if content["parcel"] else None)


class Road:
    """How files get from this driver to the workers of the connected cluster, found out once; see `find`."""

    def __init__(self, storage: Storage | None):
        self.storage = storage  # None where all nodes see this machine's files

    @classmethod
    def find(cls) -> Road:
        """Look from every node of the connected cluster. Raises ClusterError, before any work starts, where one cannot reach
        the storage, naming it.
        """
        here = ray.get_runtime_context().get_node_id()
        others = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] != here]
        if not others:
            return cls(None)
        storage = Storage(paths.storage())
        storage.check()
        mark = f"{time.time_ns()}-{os.getpid()}"
        seen = Path(f".{mark}{PARTIAL}").absolute()
        seen.touch()
        storage.write(f".reached-{mark}", b"here")
        try:
            found = _looked(others, storage.place, f".reached-{mark}", str(seen))
        finally:
            seen.unlink()
            storage.delete(f".reached-{mark}")
        problems = [
            f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']}): {told['storage']}"
            for node, told in zip(others, found, strict=True)
            if told["storage"]
        ]
        if problems:
            remedy = "Set RIS_STORAGE to a folder that every node mounts at the same path, or to a bucket (s3://...)."
            raise ClusterError(list_problems(f"nodes that do not reach the storage {storage.place}", problems, remedy))
        return cls(None if all(told["folder"] for told in found) else storage)

    def offer(self, path: Path, names: Iterable[str] | None = None) -> Place:
        """Let workers have a file or folder; of a folder these files, or all. Raises DataError for files that are not there."""
        storage = self.storage
        if storage is None:
            return Place(str(path.absolute()))
        chosen = (_files(path) if names is None else names) if path.is_dir() else [""]
        return Place(parcel=packed(path, chosen, storage))


def packed(folder: Path, names: Iterable[str], storage: Storage, title: str = "") -> Parcel:
    """Put these files of a folder into the storage, those that it lacks; under a title, with a bar where somebody watches.

    Raises DataError for files that are not there.
    """
    chosen = sorted(set(names))
    lacking = [name for name in chosen if not (folder / name).is_file()]
    if lacking:
        raise DataError(list_problems(f"{folder} lacks files", lacking))
    with ThreadPoolExecutor(AT_ONCE) as pool:
        files = dict(zip(chosen, pool.map(lambda name: _described(folder / name), chosen), strict=True))
        sizes = storage.sizes(*(_object(digest) for digest, _ in files.values()))
        missing = {
            digest: (folder / name, size)
            for (name, (digest, size)), there in zip(files.items(), sizes, strict=True)
            if there != size
        }
        with bar(title, sum(size for _, size in missing.values())) as shown:

            def upload(digest: str) -> None:
                source, size = missing[digest]
                storage.upload(source, _object(digest))
                shown.update(size)

            list(pool.map(upload, missing))
    return Parcel(storage.place, files)


def bar(title: str, size: int) -> tqdm[NoReturn]:
    """Make a bar that counts bytes, seen where there is a title and somebody watches."""
    hidden = None if title and size else True  # None: unless standard error is a terminal
    return tqdm(desc=title, total=size, unit="B", unit_scale=True, disable=hidden)


def give(path: Path, storage: str) -> tuple[str, int]:
    """Put a file into the storage; its SHA-256 and size, for `take`."""
    digest, size = _described(path)
    place = Storage(storage)
    if place.sizes(_object(digest)) != [size]:
        place.upload(path, _object(digest))
    return digest, size


def take(path: Path, digest: str, storage: Storage) -> None:
    """Fetch a file by its SHA-256; it appears whole and right, or not at all. Raises ClusterError if that cannot be had."""
    with replaced_file(path) as temporary:
        try:
            storage.download(_object(digest), temporary)
        except FileNotFoundError as error:
            raise ClusterError(
                f"{storage.place} holds no {_object(digest)} any more ({path.name}): start again, it is put there anew"
            ) from error
        if file_sha256(temporary) != digest:
            storage.delete(_object(digest))
            raise ClusterError(
                f"{_object(digest)} ({path.name}) in {storage.place} was not what its name says and is removed: start again, "
                "it is put there anew"
            )


def unpacked(parcel: Parcel) -> Path:
    """Give the local path of a parcel's content in this node's cache, unpacked by the first process that asks.

    It stays for as long as this process lives. Raises ClusterError if it cannot be fetched, or is more than the cache holds.
    """
    cache = cache_folder()
    tree = cache / parcel.digest
    if tree in _held:
        return tree / "content"
    cache.mkdir(parents=True, exist_ok=True)
    with _locked(tree.with_suffix(".fetch"), fcntl.LOCK_EX):  # one process fetches, the others find it done
        use = tree.with_suffix(".use").open("a")
        fcntl.flock(use, fcntl.LOCK_SH)  # together with other readers; `_make_room` wants it alone
        damaged = [name for name in parcel.files if not _is_as_it_should(tree / "content" / name, *parcel.files[name])]
        if damaged and tree.exists():
            print(f"warning: {tree} is not what was unpacked ({damaged[0]}): fetching it again", file=sys.stderr)
        if damaged or not tree.exists():
            shutil.rmtree(tree, ignore_errors=True)
            _make_room(cache, sum(size for _, size in parcel.files.values()))
            _fetch(parcel, tree)
        os.utime(tree)
    _held[tree] = use
    return tree / "content"


def cache_folder() -> Path:
    """Locate this node's cache: `RIS_CACHE`, or a folder of this user's among the temporary ones."""
    default = Path(tempfile.gettempdir()) / f"ris-cache-{getpass.getuser()}"
    return Path(os.environ.get("RIS_CACHE") or default)


def _fetch(parcel: Parcel, tree: Path) -> None:
    storage = Storage(parcel.storage)
    partial_tree = tree.with_name(f"{tree.name}{PARTIAL}")
    shutil.rmtree(partial_tree, ignore_errors=True)
    content = partial_tree / "content"
    try:
        (partial_tree if "" in parcel.files else content).mkdir(parents=True)
        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(lambda item: take(content / item[0], item[1][0], storage), parcel.files.items()))
        partial_tree.rename(tree)
    except OSError as error:
        raise ClusterError(
            f"{tree.parent} cannot be written ({error}): make room, or set RIS_CACHE to another folder"
        ) from error
    finally:
        shutil.rmtree(partial_tree, ignore_errors=True)


def _make_room(cache: Path, wanted: int) -> None:
    """Remove what was used longest ago, and is used by nobody, until so many bytes more fit into the cache."""
    limit = float(os.environ.get("RIS_CACHE_GB") or CACHE_GB) * 1e9
    found = []
    for tree in cache.iterdir():
        if tree.is_dir() and not tree.name.startswith("."):  # those are of jobs
            with suppress(FileNotFoundError):  # another process finished it, or removed it, meanwhile
                found.append((tree.stat().st_mtime, _bytes_below(tree), tree))
    used = sum(size for _, size, _ in found)
    for _, size, tree in sorted(found):
        if used + wanted <= limit:
            return
        try:
            with _locked(tree.with_suffix(".use"), fcntl.LOCK_EX | fcntl.LOCK_NB):
                shutil.rmtree(tree, ignore_errors=True)
                used -= size
        except BlockingIOError:
            continue
    if used + wanted > limit:
        raise ClusterError(
            f"{wanted / 1e9:.2f} GB do not fit into {cache}, where {used / 1e9:.2f} of {limit / 1e9:g} GB are in use: raise "
            "RIS_CACHE_GB, or set RIS_CACHE to a larger disk"
        )


def _bytes_below(folder: Path) -> int:
    """Tell how many bytes the files below a folder take, without those that other processes remove meanwhile."""
    total = 0
    for name in _files(folder):
        with suppress(FileNotFoundError):
            total += (folder / name).stat().st_size
    return total


@contextmanager
def _locked(path: Path, how: int) -> Iterator[None]:
    with path.open("a") as lock:
        fcntl.flock(lock, how)
        yield


def _looked(nodes: list[Plain], storage: str, mark: str, seen: str) -> list[Plain]:
    """Look at storage and folder from every node."""
    task = ray.remote(num_cpus=0, max_retries=0)(_look)
    strategies = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in nodes]
    waiting = [task.options(scheduling_strategy=each).remote(storage, mark, seen) for each in strategies]
    try:
        found: list[Plain] = ray.get(waiting, timeout=PROBE_SECONDS)
    except ray.exceptions.RayError as error:
        told = str(error).strip().splitlines()
        raise ClusterError(
            f"not every node of the cluster can run our code: {told[-1] if told else error!r}"
        ) from error
    return found


def _look(storage: str, mark: str, seen: str) -> Plain:
    try:
        place = Storage(storage)
        place.read(mark)
        place.check()
        problem = ""
    except FileNotFoundError:
        problem = "sees another folder under that name"
    except ClusterError as error:
        problem = str(error)
    return {"storage": problem, "folder": Path(seen).exists()}


def _files(folder: Path) -> list[str]:
    """List files below a folder, through links, by their relative names."""
    found = (Path(place, name) for place, _, names in os.walk(folder, followlinks=True) for name in names)
    return [file.relative_to(folder).as_posix() for file in found]


def _described(path: Path) -> tuple[str, int]:
    return file_sha256(path), path.stat().st_size


def _is_as_it_should(path: Path, digest: str, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size and file_sha256(path) == digest


def _object(digest: str) -> str:
    return f"{OBJECTS}/{digest[:2]}/{digest}"
