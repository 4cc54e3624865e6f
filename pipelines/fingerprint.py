"""Names that change whenever the result would: of runs, for resuming; of code, for lineage."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ris_core

SOURCES = (
    "ris_core/data",
    "ris_core/models",
    "ris_core/training",
    "ris_core/evaluation",
)  # what decides a trained model


def code_version() -> str:
    """Digest of `SOURCES` (code and model configs); independent of where the repository lies."""
    root = Path(ris_core.__file__).parent.parent
    return _digest(root, [root / package for package in SOURCES])


def _digest(root: Path, places: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for place in places:
        sources = [path for path in place.rglob("*") if path.suffix in (".py", ".json")] if place.is_dir() else [place]
        for source in sorted(sources):
            digest.update(source.relative_to(root).as_posix().encode())
            digest.update(source.read_bytes())
    return digest.hexdigest()[:12]


def served_code() -> str:
    """Digest of the code that travels with a registered model: all of the library, and the model around it."""
    root = Path(ris_core.__file__).parent.parent
    return _digest(root, [root / "ris_core", root / "pipelines" / "serving_model.py"])


def file_digest(path: Path) -> str:
    """SHA-256 of a file, hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def run_name(stage: str, system: str, dataset: str, *inputs: Any) -> str:
    """`<stage>-<system>-<dataset>-<fingerprint>`: the same inputs resume the same run, changed inputs start afresh."""
    from ris_core.config import digest

    return f"{stage}-{system}-{dataset}-{digest([*inputs, code_version()])}".replace("+", "p")


def git_commit() -> str:
    """The checked-out commit, `-dirty` appended when tracked files differ from it; 'unknown' outside a repository."""
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run(["git", "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{commit}-dirty" if changed.stdout.strip() else commit
