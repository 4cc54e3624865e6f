"""Names that change whenever the result would: of runs, for resuming; of code and data, for lineage."""

from __future__ import annotations

import os
import subprocess

from pipelines import inputs, paths
from ris_core.options import digest

COMMIT = "RIS_GIT_COMMIT"
# What a run writes itself, and DVC removes before; whatever made a result is elsewhere.
MADE = ("--", ":/", ":(top,exclude)results", ":(top,exclude)dvc.lock")


def run_name(stage: str, system: str, dataset: str, *decisive: object) -> str:
    """Give `<stage>-<system>-<dataset>-<fingerprint>`: same values and code resume the same run, changed ones start afresh."""
    code = inputs.digest_of(inputs.code_of(stage, system))
    return paths.plain(f"{stage}-{system}-{dataset}-{digest([*decisive, code])}")


def served_code(system: str) -> str:
    """Give the digest of the code that a registered model of this system answers with."""
    return inputs.digest_of(inputs.code("pipelines.serving_model", (system,)))


def git_commit() -> str:
    """Give the checked-out commit, `-dirty` appended if tracked files differ from it.

    Outside of a repository it is what RIS_GIT_COMMIT says, as in a job on a cluster, or 'unknown'.
    """
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain", "-uno", *MADE], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get(COMMIT) or "unknown"
    return f"{commit}-dirty" if changed.stdout.strip() else commit
