"""The folder that is fetched into: one copy of everything in `fetched/`, and beside it a folder for each dataset that links it.

    <to>/fetched/refcoco/{instances.json,refs(unc).p,...}    <to>/fetched/train2014/*.jpg    <to>/fetched/clip/RN50.pt
    <to>/refcoco_unc/refcoco/{instances.json,refs(unc).p}    <to>/refcoco_unc/images/mscoco/images/train2014/*.jpg

A dataset's folder has what its own referents need and nothing else: it stays as it is, and so does what DVC makes of it, when
another dataset is fetched. Links are hard ones, which cost nothing; symbolic ones where a file system has none.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pipelines.fetching import unpack
from pipelines.fetching.catalogue import PHOTOS
from ris_core import room
from ris_core.data.refer.reader import DatasetName
from ris_core.errors import DataError, list_problems
from ris_core.files import PARTIAL, replaced_folder, write_json

FETCHED = "fetched"


@dataclass(frozen=True)
class Stock:
    """What was fetched below a folder."""

    root: Path

    @property
    def folder(self) -> Path:
        return self.root / FETCHED

    @property
    def photos(self) -> Path:
        return self.folder / PHOTOS

    @property
    def clip(self) -> Path:
        return self.folder / "clip"

    def of(self, name: DatasetName) -> Path:
        """Locate a dataset, in the official layout."""
        return self.root / name.name

    @contextmanager
    def locked(self, tell: Callable[[str], None]) -> Iterator[None]:
        """Be the only one who fetches here, in the block; `tell` is told if that has to be waited for.

        What was left by one that was killed while it wrote is removed. The lock goes with its process.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / ".lock").open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                tell(f"another `ris fetch` is at work in {self.folder}: waiting for it to end")
                fcntl.flock(lock, fcntl.LOCK_EX)
            for folder in (self.folder, self.photos):
                for left in folder.glob(f".*{PARTIAL}-*"):
                    left.unlink()
            yield

    def lacks(self, name: DatasetName) -> list[str]:
        """List the files of annotations that a dataset's folder lacks."""
        return [file for file in (name.refs_file, name.instances_file) if not (self.of(name) / file).is_file()]

    def has_annotations(self, name: DatasetName) -> bool:
        """Tell whether the annotations are unpacked here, from which a dataset's folder can be made."""
        return all((self.folder / file).is_file() for file in (name.refs_file, name.instances_file))

    def unpack_annotations(self, archive: Path, name: DatasetName) -> None:
        """Unpack a dataset's archive. Raises DataError for one that cannot be used, or is of something else."""
        wanted = [Path(file).name for file in (name.refs_file, name.instances_file)]
        with replaced_folder(self.folder / name.folder) as folder:
            unpack.unpack(archive, folder, unpack.ANNOTATIONS, _is_annotation, lambda size: None)
            found = sorted(path.name for path in folder.iterdir())
            if lacking := [file for file in wanted if file not in found]:
                told = f"it has {', '.join(found) or 'no annotations'}"
                raise DataError(
                    list_problems(f"{archive} lacks files of {name.name}", lacking, f"{told}: get another.")
                )

    def link_annotations(self, name: DatasetName) -> None:
        """Give a dataset's folder the files of annotations that it lacks."""
        for file in self.lacks(name):
            link(self.folder / file, self.of(name) / file)

    def unpack_photos(self, archive: Path, sha256: str, each: Callable[[int], None]) -> None:
        """Unpack all photos; those that are there already stay. Raises DataError for an archive that cannot be used."""
        count = unpack.unpack(archive, self.photos, unpack.PHOTOS, _is_photo, each)
        if not count:
            raise DataError(f"{archive} has no photos: get another")
        write_json(self._receipt, {"sha256": sha256, "photos": count})

    def has_all_photos(self) -> bool:
        """Tell whether all photos were unpacked, and are still there."""
        try:
            count = json.loads(self._receipt.read_text())["photos"]
            return sum(map(_is_photo, os.listdir(self.photos))) >= int(count)
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def bytes_of_photos(self) -> int:
        """Tell how many bytes the photos take that are here."""
        return sum(path.stat().st_size for path in self.photos.glob("*.jpg"))

    def check_room(self, needed: int, what: str) -> None:
        """Raise ConfigError unless so many bytes are free for what will be done."""
        room.check(self.folder, needed, what, "make room, or fetch to another disk with --to")

    def free(self) -> int:
        """Tell how many bytes are free on the disk of the folder, which need not be there yet."""
        return room.free(self.folder)

    @property
    def _receipt(self) -> Path:
        return self.folder / f"{PHOTOS}.json"


def link(kept: Path, place: Path) -> None:
    """Put a file of the stock into a dataset's folder, which lacks it."""
    place.parent.mkdir(parents=True, exist_ok=True)
    place.unlink(missing_ok=True)  # a link to what is gone
    try:
        os.link(kept, place)
    except OSError:  # another disk, as where the dataset's folder is a link, or a file system without hard links
        place.symlink_to(kept.resolve())


def _is_annotation(name: str) -> bool:
    return name == "instances.json" or (name.startswith("refs(") and name.endswith(").p"))


def _is_photo(name: str) -> bool:
    return name.endswith(".jpg") and not name.startswith(".")
