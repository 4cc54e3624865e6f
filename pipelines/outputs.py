"""What a command on a cluster leaves, on its way back: collected where it ran, put in place where it was asked for.

Whole folders that DVC knows as outputs are replaced, so that nothing of an older one stays in them; other files one by one.
Everything is fetched and checked beside its place first; only then names change, `dvc.lock` last. Who is stopped before that
has what was there, and the same call fetches it again.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pipelines import transport
from pipelines.repro import dvc
from pipelines.transport import Parcel
from ris_core.errors import ClusterError, ConfigError, list_problems
from ris_core.files import PARTIAL, file_sha256, put_folder
from ris_core.options import Plain
from ris_core.storage import Storage

LOCK = "dvc.lock"
IGNORED = ("data", "models", "mlflow/registered")  # by git, and made or read by stages
PLACES = ("results", *IGNORED, LOCK)  # where commands leave what they make
SET_ASIDE = Path("runs/set-aside")

Stamp = tuple[int, int, int]  # of a file: who has changed it has changed this


@dataclass(frozen=True)
class Outputs:
    """What a command made, by names relative to the repository."""

    code: int  # with which it ended
    parcel: Parcel  # all files of `folders`, and `files`
    folders: list[str] = field(default_factory=list)  # outputs of DVC's that it wrote
    files: list[str] = field(default_factory=list)  # that it wrote outside of those
    removed: list[str] = field(default_factory=list)  # files and folders

    def plain(self) -> Plain:
        """Give it as JSON has it."""
        return asdict(self)

    @staticmethod
    def of(content: Plain) -> Outputs:
        """Make it of what `plain` gave. Raises ClusterError for names outside of the places of results."""
        outputs = Outputs(**{**content, "parcel": Parcel.of(content["parcel"])})
        named = {*outputs.parcel.files, *outputs.folders, *outputs.files, *outputs.removed}
        foreign = [
            each for each in sorted(named) if ".." in Path(each).parts or not (each == LOCK or _unit(each, PLACES))
        ]
        if foreign:
            raise ClusterError(list_problems("outputs name files that are no results", foreign))
        return outputs


def name(job: str) -> str:
    """Tell under which name a job's outputs stand in the storage."""
    return f"jobs/{job}/outputs.json"


def read(storage: Storage, job: str) -> Outputs | None:
    """Give what a job left; None if it left nothing yet."""
    try:
        return Outputs.of(json.loads(storage.read(name(job))))
    except FileNotFoundError:
        return None


def found(root: Path, places: Iterable[str] = PLACES) -> list[str]:
    """List the finished files in some places below a root, through links, sorted."""
    return sorted(_walked(root, places))


def _walked(root: Path, places: Iterable[str]) -> Iterator[str]:
    for place in places:
        if (root / place).is_file():
            yield place
        for folder, inner, names in os.walk(root / place, followlinks=True):
            inner[:] = [each for each in inner if finished(each)]
            yield from ((Path(folder) / each).relative_to(root).as_posix() for each in names if finished(each))


def finished(name: str) -> bool:
    """Tell whether a name is of something whole, and not of what is being written or about to go."""
    return PARTIAL not in name and not name.endswith(".old")


def stamps(root: Path, names: Iterable[str]) -> dict[str, Stamp]:
    """Tell when files were last changed; those that are gone are left out."""
    seen: dict[str, Stamp] = {}
    for each in names:
        try:
            now = (root / each).stat()
        except FileNotFoundError:
            continue
        seen[each] = (now.st_ino, now.st_mtime_ns, now.st_size)
    return seen


class Ledger:
    """What lay in a folder before a command: the content of every file, by which to find what it changed."""

    def __init__(self, root: Path, known: Mapping[str, tuple[str, int]]):
        """`known` are digest and size of some of the files there now."""
        names = found(root)
        self.root = root
        self.stamps = stamps(root, names)
        self.digests = {each: known[each][0] if each in known else file_sha256(root / each) for each in names}

    def collected(self, code: int, storage: Storage, folders: Iterable[str]) -> Outputs:
        """Put what was changed into the storage. `folders` are the outputs of DVC's.

        What a failed command removed is not passed on: DVC empties the place of an output before it is made.
        """
        names = found(self.root)
        now = stamps(self.root, names)
        changed = {
            each
            for each in now
            if now[each] != self.stamps.get(each) and file_sha256(self.root / each) != self.digests.get(each)
        }
        gone = self.digests.keys() - now.keys()
        units = [folder for folder in folders if not (self.root / folder).is_file()]
        written = sorted({unit for each in (changed if code else changed | gone) if (unit := _unit(each, units))})
        kept = [unit for unit in written if (self.root / unit).is_dir()]
        files = sorted(each for each in changed if _unit(each, kept) is None)
        removed = sorted({_unit(each, units) or each for each in gone} - set(kept))
        parcel = transport.packed(self.root, [*files, *(each for each in now if _unit(each, kept))], storage)
        return Outputs(code, parcel, kept, files, [] if code else removed)


def _unit(name: str, folders: Iterable[str]) -> str | None:
    return next((folder for folder in folders if name.startswith(f"{folder}/")), None)


def put(outputs: Outputs, storage: Storage, before: Mapping[str, Stamp], job: str) -> tuple[list[str], list[Path]]:
    """Put what a command left in place here. Given are what was replaced or removed, and where that lies now which was not
    any more what it was `before`: somebody had changed it here meanwhile.

    Raises ClusterError, with everything as it was, if something cannot be fetched.
    """
    fetched = _fetched(outputs, storage)
    removed = [each for each in outputs.removed if os.path.lexists(each)]
    aside: list[Path] = []
    for each in [*sorted(fetched, key=lambda each: each == LOCK), *removed]:  # the lock, last, says that all is there
        if _changed(each, before):
            aside.append(SET_ASIDE / job / each)
            aside[-1].parent.mkdir(parents=True, exist_ok=True)
            _clear(aside[-1])
            shutil.move(each, aside[-1])
        if each not in fetched:
            _clear(Path(each))
        elif fetched[each].is_dir():
            put_folder(fetched[each], Path(each))
        else:
            os.replace(fetched[each], each)
    return [*fetched, *removed], aside


def _changed(name: str, before: Mapping[str, Stamp]) -> bool:
    """Tell whether a file or folder is here and not what it was."""
    now = stamps(Path(), found(Path(), [name]))
    was = {each: stamp for each, stamp in before.items() if each == name or _unit(each, [name])}
    return os.path.lexists(name) and now != was


def _fetched(outputs: Outputs, storage: Storage) -> dict[str, Path]:
    """Fetch files and folders that are not here as they should be; where each lies beside its place.

    The names beside are always the same, so that nothing is left of a call that was stopped once another went through.
    """
    wanted = {each: digest for each, (digest, _) in outputs.parcel.files.items()}
    here = {each: file_sha256(Path(each)) for each in found(Path(), [*outputs.folders, *outputs.files])}
    beside = {each: _beside(Path(each)) for each in outputs.files if here.get(each) != wanted[each]}
    targets = {place: each for each, place in beside.items()}
    for folder in outputs.folders:
        names = {each for each in {*wanted, *here} if _unit(each, [folder])}
        if Path(folder).is_dir() and all(here.get(each) == wanted.get(each) for each in names):
            continue
        place = beside[folder] = Path(f"{folder}{PARTIAL}")
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        targets |= {place / Path(each).relative_to(folder): each for each in names & wanted.keys()}
    source = {digest: Path(each) for each, digest in here.items()}

    def take(place: Path) -> None:
        digest, size = outputs.parcel.files[targets[place]]
        if digest in source:
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source[digest], place)
        else:
            transport.take(place, digest, storage)
        shown.update(size)

    sizes = [outputs.parcel.files[each][1] for each in targets.values()]
    with transport.bar("results", sum(sizes)) as shown, ThreadPoolExecutor(transport.AT_ONCE) as pool:
        list(pool.map(take, targets))
    return beside


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}{PARTIAL}-submit")


def _clear(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def folders() -> list[str]:
    """List what DVC knows as outputs of the stages of the repository in which this process is; none without a DVC."""
    try:
        return re.findall(r'^"([^"]+)";$', dvc("dag", "--outs", "--dot"), re.MULTILINE) if Path(".dvc").is_dir() else []
    except ConfigError:  # dvc.yaml cannot be used, which the command has told
        return []


def into_cache() -> list[str]:
    """Put outputs into DVC's cache that are what `dvc.lock` says and only not in it; the stages whose they are.

    Without that DVC would take the stages for changed. Raises ConfigError, with DVC's message, if that fails.
    """
    lacking = {
        stage: outs for stage, changes in json.loads(dvc("status", "--json")).items() if (outs := _lacking(changes))
    }
    if not lacking:
        return []
    here = json.loads(dvc("data", "status", "--json")).get(
        "uncommitted", {}
    )  # what is not in the cache may also be changed
    changed = {path.rstrip("/") for paths in here.values() for path in paths}
    stages = [stage for stage, outs in lacking.items() if not changed.intersection(outs)]
    if stages:
        dvc("commit", *stages)
    return stages


def _lacking(changes: list[object]) -> list[str]:
    """List the outputs of a stage that only the cache lacks; none if anything else about it has changed."""
    outs: dict[str, str] = {}
    for change in changes:
        if not isinstance(change, dict) or set(change) != {"changed outs"}:
            return []
        outs |= change["changed outs"]
    return list(outs) if set(outs.values()) == {"not in cache"} else []
