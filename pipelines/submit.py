"""`ris submit -- COMMAND...`: hand a command to a Ray cluster that shares nothing with this machine but `RIS_STORAGE`.

The same call again is the same job (`packing.job_name`): it goes on watching one that runs, takes what a finished one left,
and replaces one that failed. The other end is `pipelines.job`.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import aiohttp
import requests
import typer
from ray._private.ray_constants import RAY_RUNTIME_ENV_IGNORE_GITIGNORE
from ray.job_submission import JobStatus, JobSubmissionClient

from pipelines import outputs, packing, paths
from pipelines.params import load_params
from pipelines.stage import run
from ris_core.errors import ClusterError, ConfigError, RISError, list_problems
from ris_core.storage import Storage

ANSWERS_WITHIN = 5  # seconds
PATIENCE = 180  # seconds that the head may be away
QUIET = 60  # seconds without a line, after which to look whether the connection still is one
LOST = (OSError, RuntimeError, aiohttp.ClientError, requests.RequestException)
CHATTERING = (
    "ray._private.runtime_env.packaging",
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray.dashboard.utils",
)
INTERRUPTED = 130  # as shells have it


def main(
    command: Annotated[
        list[str], typer.Argument(help="after `--`: what to run, as you would here", show_default=False)
    ],
    env: Annotated[
        list[str] | None,
        typer.Option(help="one more variable to carry, by name; may be given again", show_default=False),
    ] = None,
) -> None:
    """Run a command on the cluster at RAY_ADDRESS, and bring back what it makes."""
    client, storage = ready(env or [])
    before = outputs.stamps(Path(), outputs.found(Path()))
    job = handed_over(client, storage, command, packing.environment(env or []))
    try:
        code = followed(client, job)
    except KeyboardInterrupt:
        again = shlex.join(["ris", "submit", *(part for name in env or [] for part in ("--env", name)), "--", *command])
        _say(f"\n{job} goes on without you. To watch it again, and for its results: {again}")
        _say(f"To stop it: ray job stop --address {client.get_address()} {job}")
        raise SystemExit(INTERRUPTED) from None
    brought(storage, job, before)
    raise SystemExit(code)


def ready(extra: Sequence[str]) -> tuple[JobSubmissionClient, Storage]:
    """Look whether everything is there that a job needs. Raises ClusterError with all that is not, before anything travels."""
    for logger in CHATTERING:
        logging.getLogger(logger).setLevel(logging.WARNING)  # INFO tells of packages and sockets
    os.environ[RAY_RUNTIME_ENV_IGNORE_GITIGNORE] = "1"  # git was asked: what it ignores is not in the package
    problems = [f"--env {name}: it is not set here" for name in extra if name not in os.environ]
    tracking = os.environ.get("MLFLOW_TRACKING_URI", "")
    if not tracking or tracking.startswith(("sqlite:", "file:")) or "://" not in tracking:
        problems.append(
            f"MLFLOW_TRACKING_URI is {tracking or 'not set'}: a store of files would stay in the job's folder and be lost; "
            "give the address of a tracking server (http://...) that the cluster reaches"
        )
    client, storage = None, None
    try:
        load_params(paths.PARAMS)
    except RISError as error:
        problems.append(str(error))
    try:
        if not os.environ.get("RIS_STORAGE"):
            raise ConfigError("RIS_STORAGE is not set: give a bucket (s3://...), or a folder that all nodes mount")
        storage = Storage(paths.storage())
        storage.check()
    except RISError as error:
        problems.append(str(error))
    try:
        client = connected(os.environ.get("RAY_ADDRESS", ""))
    except RISError as error:
        problems.append(str(error))
    if problems or client is None or storage is None:
        raise ClusterError(list_problems("nothing was submitted", problems))
    return client, storage


def connected(address: str) -> JobSubmissionClient:
    """Reach the cluster's job server. Raises ClusterError, within seconds, if nobody answers there."""
    if not address:
        raise ClusterError(
            "RAY_ADDRESS is not set: give the address of the cluster's head, http://HEAD:8265 or HEAD:6379"
        )
    try:
        place = urlsplit(address if "://" in address else f"//{address}")
        if place.hostname and address != "auto":  # Ray itself would try for many minutes
            port = place.port or {"http": 80, "https": 443}.get(place.scheme)
            socket.create_connection((place.hostname, port), timeout=ANSWERS_WITHIN).close()
        return JobSubmissionClient(address)
    except (*LOST, ValueError, TypeError) as error:
        raise ClusterError(
            f"no job server of Ray's answers at RAY_ADDRESS={address} ({_first_line(error)}): give the address of a running "
            "cluster's head, http://HEAD:8265 or HEAD:6379"
        ) from error


def handed_over(
    client: JobSubmissionClient, storage: Storage, command: Sequence[str], environment: dict[str, str]
) -> str:
    """Let the job of this command be on the cluster: the one that is there, if it is of use, else a new one. Its name."""
    with tempfile.TemporaryDirectory(prefix="ris-submit-") as place:
        package = packing.package(Path(place))
        parcel = packing.send(packing.data(command, load_params(paths.PARAMS)), storage)
        job = packing.job_name(package.digest, command, parcel.digest, environment)
        size = sum(size for _, size in parcel.files.values())
        _say(f"{job}: {shlex.join(command)}, with {len(parcel.files)} files of data ({size / 1e6:.1f} MB)")
        status = _status(client, job)
        if status == JobStatus.SUCCEEDED and outputs.read(storage, job) is not None:
            _say("it has succeeded before: taking what it left")
            return job
        if status is not None and not status.is_terminal():
            _say("it runs already: watching it from here on, its log from the beginning")
            return job
        if status is not None:
            _say(f"an earlier try {_told(status)}: trying again")
            client.delete_job(job)
        storage.delete(outputs.name(job))
        try:
            client.submit_job(
                # exec: Ray's signals reach us, not a shell around us
                entrypoint=f"exec python -m pipelines.job {parcel.digest} {job} -- {shlex.join(command)}",
                submission_id=job,
                runtime_env={"working_dir": place, "env_vars": environment},
            )
        except LOST as error:
            raise ClusterError(f"the cluster's head did not take the job ({_first_line(error)}): try again") from error
    _say("submitted; Ctrl-C leaves it running")
    return job


def _told(status: JobStatus) -> str:
    return {JobStatus.FAILED: "failed", JobStatus.STOPPED: "was stopped"}.get(status, "left nothing")


def _status(client: JobSubmissionClient, job: str) -> JobStatus | None:
    """Ask how a job is; None if there is none of that name."""
    try:
        return client.get_job_status(job)
    except RuntimeError as error:
        if _is_unknown(error):
            return None
        raise ClusterError(f"the job server does not tell about {job}: {_first_line(error)}") from error


def _is_unknown(error: Exception) -> bool:
    """Tell whether the job server has answered that there is no such job."""
    return getattr(error, "status", None) == 404 or "status code 404" in str(error)


def followed(client: JobSubmissionClient, job: str) -> int:
    """Print a job's log as it grows until the job has ended; its exit code. Raises ClusterError if the job is lost."""
    log, heard, silent = Log(client, job), time.monotonic(), False
    while True:
        try:
            asyncio.run(log.tail())
            info = client.get_job_info(job)
            if info.status.is_terminal():
                log.rest()
                break
            heard, silent = time.monotonic(), False
        except LOST as error:
            if _is_unknown(error):
                raise ClusterError(
                    f"the cluster knows nothing of {job} any more: its head was started anew. Run the same command again: it "
                    "goes on from its checkpoints"
                ) from error
            if time.monotonic() - heard > PATIENCE:
                raise ClusterError(
                    f"the cluster's head has not answered for {PATIENCE} s ({_first_line(error)}). When it does, run the same "
                    "command again: it goes on watching the job, or goes on from its checkpoints"
                ) from error
            if not silent:
                _say(f"the connection to the cluster is lost ({_first_line(error)}): trying to find {job} again")
            silent = True
        time.sleep(1)
    return _code(info)


class Log:
    """A job's log, of which every line is printed once, however often the connection has to be made again."""

    def __init__(self, client: JobSubmissionClient, job: str):
        self.client = client
        self.job = job
        self.printed = 0  # characters

    async def tail(self) -> None:
        """Print what comes, until the job ends, the connection does, or nothing came for a while."""
        at = 0
        chunks = self.client.tail_job_logs(self.job)
        while True:
            try:
                chunk = await asyncio.wait_for(anext(chunks), QUIET)  # a connection may die without a word
            except (StopAsyncIteration, TimeoutError):
                return
            self._show(chunk, at)
            at += len(chunk)

    def rest(self) -> None:
        """Print what the connection that has ended did not bring."""
        self._show(self.client.get_job_logs(self.job), 0)

    def _show(self, text: str, at: int) -> None:
        new = text[max(0, self.printed - at) :]
        print(new, end="", flush=True)
        self.printed += len(new)


def _code(info: Any) -> int:
    """Give the exit code of a job that has ended. Raises ClusterError if its command never ended by itself."""
    if info.status == JobStatus.STOPPED:
        _say("the job was stopped")
        return 143
    code = 0 if info.status == JobStatus.SUCCEEDED else info.driver_exit_code
    if code is None:
        raise ClusterError(
            f"the job failed before its command ended: {(info.message or 'Ray does not say why').strip()}. Run the same "
            "command again: it goes on from its checkpoints"
        )
    return int(code) if code >= 0 else 128 - int(code)


def brought(storage: Storage, job: str, before: dict[str, outputs.Stamp]) -> None:
    """Put what a job left in place here, for DVC too, and say what that was."""
    made = outputs.read(storage, job)
    if made is None:
        _say("the job left nothing to bring")
        return
    changed, aside = outputs.put(made, storage, before, job)
    _say(f"brought {len(changed)} outputs" if changed else "nothing here had to change")
    for path in aside:
        _say(f"{path.relative_to(outputs.SET_ASIDE / job)} had been changed here meanwhile: your version is {path}")
    if changed and Path(".dvc").is_dir():
        outputs.into_cache()


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    run(main)
