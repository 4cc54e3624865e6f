"""A working directory for the tests of the stages: the small world of conftest laid out as the stages expect it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from pipelines import paths
from pipelines.params import Params, load_params
from ris_core.files import file_sha256
from ris_core.models.clip import load_saved_clip, read_clip_config
from ris_core.models.registry import ModelInfo, build_model, export_model, trains
from ris_core.options import Plain, deciding, digest

if TYPE_CHECKING:
    from tiny_world import Tiny

REPOSITORY = Path(__file__).parent.parent
SYSTEM, DATASET = "cris", "shapes"


@dataclass(frozen=True)
class Workplace:
    """A directory with parameters of its own and what earlier stages made. Files of the small world are linked."""

    root: Path
    tiny: Tiny
    trained: Path

    def link(self, *wanted: str) -> None:
        """Make results appear here: any of raw, records, shards, clip, clip_vit, start, model."""
        sources = {
            "raw": (paths.raw(DATASET), self.tiny.raw),
            "records": (paths.records(DATASET), self.tiny.records_file),
            "shards": (paths.shards(DATASET), self.tiny.shards),
            "clip": (paths.clip("rn"), self.tiny.clip),
            "clip_vit": (paths.clip("vit"), self.tiny.clip_vit),
            "start": (paths.start(SYSTEM, DATASET), self.trained),
            "model": (paths.model(SYSTEM, DATASET), self.trained),
        }
        for name in wanted:
            place, source = sources[name]
            (self.root / place).parent.mkdir(parents=True, exist_ok=True)
            (self.root / place).symlink_to(source, target_is_directory=source.is_dir())

    def own(self, place: Path) -> Path:
        """Turn a link into a copy that may be changed; its path."""
        link = self.root / place
        source = link.resolve()
        link.unlink()
        if source.is_dir():
            shutil.copytree(source, link)
        else:
            shutil.copy(source, link)
        return link

    def change(self, **sections: Any) -> Params:
        """Change parameters: sections are merged into what is there, other values replaced."""
        place = self.root / "params.yaml"
        content = yaml.safe_load(place.read_text())
        place.write_text(json.dumps(merged(content, sections)))  # JSON is YAML
        return load_params(place)

    def files(self) -> set[str]:
        """All files here but params.yaml, those behind links left out."""
        found = {Path(folder, name) for folder, _, names in os.walk(self.root) for name in names}
        real = {file.relative_to(self.root).as_posix() for file in found if not file.is_symlink()}
        return real - {"params.yaml"}

    def stage(self, verb: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a stage as DVC does, in a process of its own."""
        return python("-m", f"pipelines.{verb}", *arguments, cwd=self.root, **environment)


def merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Two nested dictionaries, the second laid over the first."""
    found = dict(below)
    for name, value in above.items():
        under = found.get(name)
        found[name] = merged(under, value) if isinstance(under, dict) and isinstance(value, dict) else value
    return found


def open_workplace(root: Path, tiny: Tiny, trained: Path) -> Workplace:
    """An empty directory with the small world's parameters."""
    root.mkdir()
    shutil.copy(tiny.params_file, root / "params.yaml")
    return Workplace(root, tiny, trained)


def export_untrained(tiny: Tiny, folder: Path, system: str = SYSTEM) -> None:
    """A model folder as stage `train` leaves it, with random weights; stage `initialise` leaves less `info`."""
    params = tiny.params()
    section = params.of(system)
    clip = {"rn": tiny.clip, "vit": tiny.clip_vit}[section.clip]
    torch.manual_seed(1)
    weights = build_model(system, section.model, load_saved_clip(clip)).state_dict()
    proposals: Plain | None = None if trains(system) else deciding(params.proposals.options())
    info = ModelInfo(
        image_size=params.preprocess.image_size,
        word_len=section.train.word_len if section.train else None,
        proposals=proposals,
        dataset=DATASET,
        data_digest=file_sha256(tiny.shards / "manifest.json"),
        clip_digest=read_clip_config(clip)["weights_sha256"],
        config_digest=digest([section.model, section.train, proposals]),
        run=f"train-{system}-{DATASET}-{0:012}",
    )
    folder.mkdir(parents=True)
    export_model(folder, system, weights, section.model, clip, info)


@contextmanager
def started(*arguments: str, cwd: Path, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """Like `python`, but only started, in a process group of its own, which is killed at the end of the block."""
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for(what: Callable[[], bool], process: subprocess.Popen[bytes], seconds: float = 180) -> None:
    """Return as soon as `what()` holds, while the process runs."""
    deadline = time.monotonic() + seconds
    while not what():
        assert process.poll() is None, f"the process ended by itself ({process.returncode})"
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def python(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh Python that finds this repository's code; its output captured as text."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its relative name."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def blocks_of(page: str, language: str) -> list[str]:
    """The blocks of a language in a page of this repository, in their order."""
    return re.findall(rf"^```{language}\n(.*?)^```", (REPOSITORY / page).read_text(), re.DOTALL | re.MULTILINE)
