"""Where files are had: addresses by the names of files, of the user's file first, then as published, then of mirrors.yaml."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import quote

from omegaconf import OmegaConf

from pipelines.fetching.catalogue import PHOTOS
from pipelines.fetching.sources import problem_of, shown
from ris_core.errors import ConfigError, list_problems, short
from ris_core.yaml_file import read_yaml

ALL = "all"
PHOTO_FOLDER = f"{PHOTOS}/"
ARCHIVES = ("refcoco.zip", "refcoco+.zip", "refcocog.zip", f"{PHOTOS}.zip")


@dataclass(frozen=True)
class Mirrors:
    """Addresses by names, of the user's file and of ours."""

    own: Mapping[str, tuple[str, ...]]
    packaged: Mapping[str, tuple[str, ...]]

    @classmethod
    def read(cls, path: Path | None = None) -> Mirrors:
        """Read ours, and a file of the user's. Raises ConfigError with all that is wrong with it."""
        with resources.as_file(resources.files("pipelines.fetching").joinpath("mirrors.yaml")) as packaged:
            return cls(_read(path) if path else {}, _read(packaged))

    def of_file(self, name: str, published: str) -> list[str]:
        """List the addresses of a file in the order in which they are to be tried, each once."""
        everything = [joined(folder, name) for folder in self.own.get(ALL, ())]
        return _once([*self.own.get(name, ()), *everything, published, *self.packaged.get(name, ())])

    def of_photos(self) -> list[str]:
        """List the folders of single photos in the order in which they are to be tried, each once."""
        everything = [joined(folder, PHOTO_FOLDER) for folder in self.own.get(ALL, ())]
        return _once([*self.own.get(PHOTO_FOLDER, ()), *everything, *self.packaged[PHOTO_FOLDER]])


def joined(folder: str, name: str) -> str:
    """Give the address of a file below a folder's, whose options (`?endpoint_override=...`) stay at its end."""
    address, mark, options = folder.partition("?")
    return f"{address.rstrip('/')}/{quote(name)}{mark}{options}"


def _once(addresses: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(addresses))


def _read(path: Path) -> dict[str, tuple[str, ...]]:
    try:
        content: Any = OmegaConf.to_container(read_yaml(path))
    except FileNotFoundError:
        raise ConfigError(f"--mirrors {path}: no such file") from None
    found, problems = {}, []
    for name, given in content.items():
        addresses = given if isinstance(given, list) else [given]
        if not (name in (ALL, PHOTO_FOLDER, *ARCHIVES) or str(name).endswith(".pt")):
            names = ", ".join((*ARCHIVES, PHOTO_FOLDER, "RN50.pt and other weights of CLIP", ALL))
            problems.append(f"{short(name)} is no name of a file that is fetched: {names}")
        elif not addresses or not all(isinstance(address, str) for address in addresses):
            problems.append(f"{name}: expected an address or a list of them, found {short(given)}")
        else:
            wrong = {address: problem_of(address) for address in addresses}
            problems += [f"{name}: {_told(address)} {told}" for address, told in wrong.items() if told]
            found[str(name)] = tuple(addresses)
    if problems:
        raise ConfigError(list_problems(f"{path} cannot be used", problems))
    return found


def _told(address: str) -> str:
    try:
        return shown(address)
    except ValueError:
        return short(address)
