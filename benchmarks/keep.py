"""Keep what a run of the pipeline reached: scores, curves, pictures and the report page, under `benchmarks/records/`.

python -m benchmarks.keep long
"""

from __future__ import annotations

import argparse
import shutil
import time
from dataclasses import asdict
from pathlib import Path

from benchmarks.measure import RECORDS, machine
from pipelines.fingerprint import git_commit
from pipelines.params import load_params
from ris_core.errors import ConfigError
from ris_core.files import write_json

KEPT = (
    "results/clip/*.json",
    "results/initialise/*/*",
    "results/train/*/*",
    "results/evaluate/*/*.json",
    "results/evaluate/*/gallery/answers.jpg",
    "results/report/index.html",
)


def keep(name: str, root: Path = Path()) -> Path:
    """Copy the small results below `root` to a folder named by date and `name`, beside the parameters that made them."""
    found = [path for pattern in KEPT for path in sorted(root.glob(pattern))]
    if not found:
        raise ConfigError(f"there are no results in {root.resolve().name}/results to keep: run the pipeline first")
    folder = RECORDS / f"{time.strftime('%Y-%m-%d')}-{name}"
    shutil.rmtree(folder, ignore_errors=True)
    for path in found:
        target = folder / path.relative_to(root / "results")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    about = {"commit": git_commit(), "machine": machine(), "params": asdict(load_params(root / "params.yaml"))}
    write_json(folder / "about.json", about)
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="what the run is called, for example long")
    print(f"kept in {keep(parser.parse_args().name)}")
