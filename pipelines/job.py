"""A command of `ris submit` where it runs: python -m pipelines.job PARCEL JOB -- COMMAND...

Ray unpacks the repository once for all jobs that bring the same, and data lie in the node's cache. So each job has a folder of
its own, with a copy of the one and links to the other, in which the command runs as in the user's own repository.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated

import psutil
import typer

from pipelines import cluster, outputs, packing, paths, transport
from pipelines.outputs import Ledger
from pipelines.stage import run
from pipelines.transport import Parcel
from ris_core.errors import ClusterError
from ris_core.files import write_text
from ris_core.storage import Storage

FOLDER = ".jobs"  # in the node's cache: files of the cache can be linked there
STOPS = (signal.SIGINT, signal.SIGTERM)
PATIENCE = (15, 60)  # seconds to end after Ray's signal, and after ours
THREADS = "OMP_NUM_THREADS"
NOT_FOUND = 127  # as shells have it


def main(
    parcel: Annotated[str, typer.Argument(help="digest of the data, in the storage")],
    job: Annotated[str, typer.Argument(help="name of the job")],
    command: Annotated[list[str], typer.Argument(help="what to run")],
) -> None:
    """Run a command on the cluster, in a folder of its own, and give what it made to the storage."""
    if os.getpgrp() != os.getpid():
        os.setpgid(0, 0)  # what is in this group ends with it
    storage = Storage(paths.storage())
    with folder_of(job) as folder:
        ledger = lay_out(folder, given(parcel, storage))
        os.chdir(folder)
        if Path(".dvc").is_dir() and packing.reads(command) is None:
            outputs.into_cache()  # else DVC would make again what came with the job
        code = execute(command, folder)
        made = ledger.collected(code, storage, outputs.folders())
        storage.write(outputs.name(job), json.dumps(made.plain()).encode())
        os.chdir("/")
    raise typer.Exit(code)


def given(parcel: str, storage: Storage) -> Parcel:
    """Give the list of data that came with a job. Raises ClusterError where this node does not see it."""
    try:
        return packing.received(parcel, storage)
    except FileNotFoundError:
        raise ClusterError(
            f"{storage.place} has no parcel {parcel} on the node {os.uname().nodename}, which sees another folder under that "
            "name: set RIS_STORAGE to a folder that every node mounts at the same path, or to a bucket (s3://...)"
        ) from None


@contextmanager
def folder_of(job: str) -> Iterator[Path]:
    """Give a job's empty folder for the block, one process at a time; those of jobs that were killed are removed."""
    root = transport.cache_folder() / FOLDER
    root.mkdir(parents=True, exist_ok=True)
    for left in root.glob("*/"):
        with suppress(BlockingIOError), _locked(left, fcntl.LOCK_EX | fcntl.LOCK_NB):
            shutil.rmtree(left, ignore_errors=True)
    folder = root / job
    with _locked(folder, fcntl.LOCK_EX):  # waits for an earlier one of that name to end
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _locked(folder: Path, how: int) -> Iterator[None]:
    with folder.with_name(f"{folder.name}.lock").open("a") as lock:
        fcntl.flock(lock, how)
        yield


def lay_out(folder: Path, parcel: Parcel) -> Ledger:
    """Put the package, in which this process runs, and the data into a job's folder; what is there then."""
    shutil.copytree(".", folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    content = transport.unpacked(parcel)
    for name in parcel.files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(content / name, folder / name)
        except OSError:
            shutil.copyfile(content / name, folder / name)
    if (folder / ".dvc").is_dir():  # no git here, and nothing to copy or to leave behind
        settings = f"[core]\n    no_scm = true\n    site_cache_dir = {folder / '.dvc/site'}\n[cache]\n    type = hardlink,copy\n"
        write_text(folder / ".dvc/config.local", settings)
    return Ledger(folder, parcel.files)


class Stopped(BaseException):
    """The job is to end."""


def execute(command: list[str], folder: Path) -> int:
    """Run the command in the folder and give its exit code; SIGTERM and SIGINT end it and all that it started.

    From its end on they are ignored, as what it made must get to the storage.
    """
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
        "GIT_CEILING_DIRECTORIES": str(folder.parent),  # a repository around the cache is not this one
    }
    carried = json.loads(os.environ.get(cluster.JOB, "{}")).get("runtime_env", {}).get("env_vars", {})
    if THREADS not in carried and environment.get(THREADS) == "1":  # Ray's, for a job that takes no CPU: it is a driver
        del environment[THREADS]

    def stop(number: int, frame: object) -> None:
        raise Stopped(number)

    for number in STOPS:
        signal.signal(number, stop)
    try:
        try:
            code = subprocess.Popen(command, cwd=folder, env=environment).wait()
        finally:
            for number in STOPS:
                signal.signal(number, signal.SIG_IGN)
    except OSError as error:
        print(f"error: {command[0]} cannot be run: {error.strerror}", file=sys.stderr)
        return NOT_FOUND
    except Stopped as stopped:
        print("stopping, and bringing what was finished", file=sys.stderr)
        end()
        return 128 + int(stopped.args[0])
    return code if code >= 0 else 128 - code


def end() -> None:
    """Wait for everything that this process started to end, as Ray tells all of it to; who stays is told again, then killed."""
    for signalled, seconds in zip((signal.SIGTERM, signal.SIGKILL), PATIENCE, strict=True):
        _, alive = psutil.wait_procs(_started(), seconds)
        for process in alive:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signalled)
    psutil.wait_procs(_started(), 5)


def _started() -> list[psutil.Process]:
    """Find all processes of this one's group, and all that descend from it."""
    found = {process.pid: process for process in psutil.Process().children(recursive=True)}
    for process in psutil.process_iter():
        with suppress(ProcessLookupError):
            if process.pid != os.getpid() and os.getpgid(process.pid) == os.getpgrp():
                found[process.pid] = process
    return list(found.values())


if __name__ == "__main__":
    run(main)
