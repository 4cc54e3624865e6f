"""Versions in the MLflow registry: which alias stands where, who moved it and why, and loading what it stands for.

Moves are written into the tags of the registered model, oldest first, so that whoever sees the model sees its history.
"""

from __future__ import annotations

import getpass
import json
import os
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import mlflow
from mlflow import MlflowClient, MlflowException
from mlflow.entities.model_registry import ModelVersion

from pipelines import tracking
from ris_core.errors import ClusterError, ConfigError
from ris_core.predictor import RISPredictor

CHALLENGER = "challenger"  # the alias of the newest version that did not become champion
MODEL, EVALUATION = "model", "evaluation"  # the folders of a version
LINEAGE = "lineage.json"  # in the latter
MOVE = "ris.move."  # and a number: tags of a registered model
REGISTERING = "ris.registering"  # tag of a registered model while a version is added
LEASE = 3600  # seconds after which whoever holds it is taken for dead
SETTLED = 2.0  # seconds, far more than a request takes
MAX_WHY = 1000  # characters
ABSENT = {
    "RESOURCE_DOES_NOT_EXIST",
    "INVALID_PARAMETER_VALUE",
}  # what stores of MLflow's answer about an alias or a version


@dataclass(frozen=True)
class Move:
    """An alias moved from a version to another one (None where it stood nowhere), by whom, when (UTC) and why.

    how: by the `gate`, a person's `promote`, or `rollback`.
    """

    alias: str
    before: str | None
    version: str
    how: str
    by: str
    at: str
    why: str


def known(client: MlflowClient, name: str) -> list[ModelVersion]:
    """List the versions of a model, oldest first; none of one that was never registered."""
    found = client.search_model_versions(f"name = '{name}'")
    return sorted(found, key=lambda version: int(version.version))


def holder(client: MlflowClient, name: str, alias: str) -> ModelVersion | None:
    """Give the version that an alias stands for, if it stands anywhere."""
    return _found(lambda: client.get_model_version_by_alias(name, alias))


def version_of(client: MlflowClient, name: str, number: str) -> ModelVersion | None:
    """Give a version by its number, if there is one that was not deleted."""
    return _found(lambda: client.get_model_version(name, number))


def _found(ask: Any) -> ModelVersion | None:
    try:
        return ask()
    except MlflowException as error:
        if error.error_code not in ABSENT:
            raise
        return None


def moves(client: MlflowClient, name: str) -> list[Move]:
    """List all moves of a model's aliases, oldest first. Raises ClusterError for one that is not registered."""
    try:
        tags = client.get_registered_model(name).tags
    except MlflowException as error:
        if error.error_code not in ABSENT:
            raise
        raise ClusterError(f"{tracking.uri()} has no model {name}") from None
    numbered = sorted((int(key.removeprefix(MOVE)), text) for key, text in tags.items() if key.startswith(MOVE))
    return [Move(**json.loads(text)) for _, text in numbered]


def move(client: MlflowClient, name: str, alias: str, version: str, how: str, why: str) -> Move:
    """Let an alias stand for a version, and write down that it was moved. One that became more is no challenger any more."""
    standing = holder(client, name, alias)
    made = Move(
        alias,
        None if standing is None else str(standing.version),
        version,
        how,
        user(),
        datetime.now(UTC).isoformat(timespec="seconds"),
        why[:MAX_WHY],
    )
    number = len(moves(client, name)) + 1
    client.set_registered_model_tag(name, f"{MOVE}{number:05d}", json.dumps(asdict(made)))
    client.set_registered_model_alias(name, alias, version)
    challenger = holder(client, name, CHALLENGER)
    if alias != CHALLENGER and challenger is not None and str(challenger.version) == version:
        client.delete_registered_model_alias(name, CHALLENGER)
    return made


def last_holder(client: MlflowClient, name: str, alias: str) -> str | None:
    """Give the number of the version that an alias was moved to last, whether or not it still stands there."""
    return next((each.version for each in reversed(moves(client, name)) if each.alias == alias), None)


def before(made: Sequence[Move], alias: str, standing: str | None) -> str | None:
    """Give the version that an alias goes back to from where it stands: each going back undoes one more move."""
    path: list[str] = []
    for each in (each for each in made if each.alias == alias):
        if each.how == "rollback":
            del path[-1:]
        elif each.before is not None and path[-1:] != [each.before]:  # moved by other hands meanwhile
            path.append(each.before)
        if path[-1:] != [each.version]:
            path.append(each.version)
    if path[-1:] == [standing]:
        del path[-1:]
    return path[-1] if path else None


def user() -> str:
    """Name who is at work: MLflow's user where there is one, else the system's, and the machine."""
    try:
        name = os.environ.get("MLFLOW_TRACKING_USERNAME") or getpass.getuser()
    except (KeyError, OSError):  # a container's user has no name
        name = f"uid {os.getuid()}"
    return f"{name}@{socket.gethostname()}"


def ensure(client: MlflowClient, name: str) -> None:
    """Make a registered model without versions, if it is not there."""
    if not client.search_registered_models(f"name = '{name}'"):
        try:
            client.create_registered_model(name)
        except MlflowException as error:  # another process did between the two calls
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise


@contextmanager
def alone(client: MlflowClient, name: str) -> Iterator[None]:
    """Keep all others from registering or moving versions of this model, which has to be there, inside the block.

    On an embedded store by a lock of the file system; a server has none, so there by a tag of the model: whoever finds the
    own name there after a while has it.
    """
    if tracking.uri().startswith(tracking.SQLITE):
        with tracking.alone(f"registering-{name}"):
            yield
        return
    mine, told = f"{user()} {os.getpid()} {os.urandom(4).hex()}", False
    while True:
        there, _, since = client.get_registered_model(name).tags.get(REGISTERING, "").rpartition(" | ")
        if not there or time.time() - float(since) > LEASE:
            client.set_registered_model_tag(name, REGISTERING, f"{mine} | {time.time():.0f}")
            time.sleep(SETTLED)
            if client.get_registered_model(name).tags.get(REGISTERING, "").startswith(mine):
                break
        elif not told:
            told = True
            print(f"{name} is being registered by {there}: waiting for it", file=sys.stderr)
        time.sleep(SETTLED)
    try:
        yield
    finally:
        client.delete_registered_model_tag(name, REGISTERING)


def fetch(model: str, part: str = MODEL) -> Path:
    """Give the local folder of what `models:/name/version`, `models:/name@alias` or `runs:/id/name` means; by default the model.

    Raises ClusterError if the store has none, with the place where it should lie.
    """
    client = tracking.connect()
    try:
        return Path(mlflow.artifacts.download_artifacts(f"{model.rstrip('/')}/artifacts/{part}"))
    except (MlflowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ClusterError(
            f"{model} cannot be loaded from {tracking.uri()}: {reason}{_where(client, model)}"
        ) from error


def _where(client: MlflowClient, model: str) -> str:
    """Tell where the files of a version should lie, for a message."""
    try:
        found = find(client, model)
        return f" (its files: {client.get_model_version_download_uri(found.name, found.version)})"
    except (ClusterError, ConfigError, MlflowException):
        return ""


def name_of(model: str) -> str:
    """Give the name in `models:/name@alias`, `name/version` or `name`."""
    return model.removeprefix("models:/").partition("@")[0].partition("/")[0]


def when(milliseconds: int) -> str:
    """Give a time of MLflow's in UTC, to the minute."""
    return datetime.fromtimestamp(milliseconds / 1000, UTC).strftime("%Y-%m-%d %H:%M")


def find(client: MlflowClient, model: str) -> ModelVersion:
    """Give the version that `models:/name/version` or `models:/name@alias` means, with or without `models:/`.

    Raises ConfigError for what is neither, ClusterError where the store has no such version.
    """
    plain = model.removeprefix("models:/").rstrip("/")
    name, sign, rest = plain.partition("@") if "@" in plain else plain.rpartition("/")
    if not (name and rest) or (sign == "/" and not rest.isdigit()):
        raise ConfigError(f"{model[:200]!r} names no version: use NAME/NUMBER or NAME@ALIAS")
    found = holder(client, name, rest) if sign == "@" else version_of(client, name, rest)
    if found is None:
        there = ", ".join(str(each.version) for each in known(client, name)) or "none"
        raise ClusterError(f"{tracking.uri()} has no {plain}; versions of {name}: {there}")
    return found


def from_registry(model: str, device: str | None = None, threshold: float | None = None) -> RISPredictor:
    """Load the predictor of a version, `models:/name@alias` or `models:/name/version`, with the library installed here.

    Its own code comes along where MLflow loads it: `mlflow.pyfunc.load_model`. Raises as `fetch` and
    `RISPredictor.from_folder` do.
    """
    return RISPredictor.from_folder(fetch(model), device, threshold)
