"""What goes to a cluster with a command: the repository as git knows it, the data that it reads, and the environment."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from pipelines import cluster, fingerprint, outputs, paths
from pipelines.params import Params
from pipelines.transport import Parcel, Place, packed
from ris_core.errors import ConfigError
from ris_core.files import file_sha256
from ris_core.options import digest
from ris_core.storage import Storage

LEFT = (".ci", "benchmarks", "docker", "docs", "tests")  # no command on a cluster needs them
SEEDS = ("CUBLAS_WORKSPACE_CONFIG", "OMP_NUM_THREADS", "PYTHONHASHSEED")  # with which results repeat to the bit
# Of this machine alone: its files, and what each node decides for itself.
STAYING = (
    "AWS_CA_BUNDLE",
    "AWS_CONFIG_FILE",
    "AWS_PROFILE",
    "AWS_SHARED_CREDENTIALS_FILE",
    "RIS_CACHE",
    "RIS_CACHE_GB",
    cluster.AT_ONCE,
)
STOP_SECONDS = 600  # for a stopped job to bring what it has finished; Ray itself would kill it after 3


@dataclass(frozen=True)
class Package:
    """The repository's files in a folder of their own, where nothing changes them while Ray packs."""

    folder: Path
    digest: str


def package(target: Path) -> Package:
    """Copy what git knows (tracked, or new and not ignored) into an empty folder. Raises ConfigError outside of a repository."""
    content = hashlib.sha256()
    for name in known_to_git():
        copy = target / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(name, copy)
        content.update(f"{name}\0{copy.stat().st_mode & 0o100:o}\0{file_sha256(copy)}\0".encode())
    return Package(target, content.hexdigest()[:24])


def known_to_git() -> list[str]:
    """List the files here that travel as code, sorted. Raises ConfigError outside of a repository."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], capture_output=True, text=True, check=False
    )
    if listed.returncode:
        raise ConfigError(
            f"{Path().absolute()} is no git repository ({listed.stderr.strip()}), and what git knows is what travels to the "
            "cluster: run from a clone"
        )
    names = sorted(set(listed.stdout.split("\0")) - {""})
    return [name for name in names if name.split("/")[0] not in LEFT and Path(name).is_file()]


def reads(command: Sequence[str]) -> list[str] | None:
    """List what a command reads of the folders that git ignores, where it is exactly one stage of `dvc.lock`; else None."""
    try:
        stages = yaml.load(Path(outputs.LOCK).read_text(), yaml.CSafeLoader)["stages"].values()
    except (OSError, yaml.YAMLError, AttributeError, KeyError, TypeError):
        return None
    for stage in stages:
        if isinstance(stage["cmd"], str) and shlex.split(stage["cmd"]) == list(command):
            listed = [dep["path"] for dep in stage.get("deps", [])]
            return [
                path for path in listed if any(path == root or path.startswith(f"{root}/") for root in outputs.IGNORED)
            ]
    return None


def data(command: Sequence[str], params: Params) -> list[str]:
    """List the files that git ignores and a command may need: what its stage reads, or all that there are."""
    places = reads(command)
    if places is None:
        places = list(outputs.IGNORED)
    elif "pipelines.prepare" in command:  # which also looks at images of datasets that DVC does not know of
        places += [paths.raw(dataset).as_posix() for dataset in params.prepare.exclude_images_of]
    return outputs.found(Path(), dict.fromkeys(places))


def send(names: Iterable[str], storage: Storage) -> Parcel:
    """Put files into the storage, and which they are, for `received`."""
    parcel = packed(Path(), names, storage, "data")
    storage.write(_list(parcel.digest), json.dumps(Place(parcel=parcel).plain()).encode())
    return parcel


def received(parcel: str, storage: Storage) -> Parcel:
    """Give the list that `send` wrote. Raises FileNotFoundError if there is none."""
    found = Place.of(json.loads(storage.read(_list(parcel)))).parcel
    assert found is not None
    return found


def _list(parcel: str) -> str:
    return f"parcels/{parcel}.json"


def environment(extra: Sequence[str]) -> dict[str, str]:
    """Give the variables that a command has there as here, `extra` ones among them, which must be set."""
    carried = cluster.handed_on(os.environ)
    carried |= {name: os.environ[name] for name in (*SEEDS, *extra) if name in os.environ}
    for name in set(STAYING) - set(extra):
        carried.pop(name, None)
    ours = {
        "RIS_STORAGE": paths.storage(),
        fingerprint.COMMIT: fingerprint.git_commit(),
        "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS),
    }
    return {**carried, **ours}


def job_name(code: str, command: Sequence[str], parcel: str, carried: Mapping[str, str]) -> str:
    """Give the name of the job that this is, whoever asks for it again: equal code, data, command and environment.

    Credentials count by their names alone, as they are renewed, and the commit not at all, as its content is in `code`.
    """
    values = {
        name: None if _is_secret(name) else digest(value)
        for name, value in carried.items()
        if name != fingerprint.COMMIT
    }
    return f"ris-{digest([code, list(command), parcel, values])}"


def _is_secret(name: str) -> bool:
    return any(word in name.upper() for word in ("KEY", "PASSWORD", "SECRET", "TOKEN"))
