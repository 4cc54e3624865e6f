"""What an evaluation by hand leaves: a folder in the form of the stage's results, and what it is about.

about.json          the model or the file of predictions, the data, and what the scores depend on
metrics.json        as stage `evaluate` writes it: protocol -> split -> scores
protocols.json      what the protocols mean; of finished masks also what of each could not be applied to them
expressions/        a table per protocol and split, one row per expression
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import places
from pipelines.paired import MEASURES
from ris_core import files
from ris_core.errors import DataError
from ris_core.evaluation.metrics import Protocol
from ris_core.options import Plain

_INTERVALS = {f"{measure}_95" for measure in MEASURES}
ABOUT, METRICS, PROTOCOLS, EXPRESSIONS = "about.json", "metrics.json", "protocols.json", "expressions"


@dataclass(frozen=True)
class Outcome:
    """Scores of one model or file on one dataset, as they are read back.

    trained_on: the model's dataset, and weights: their SHA-256, where these are known.
    """

    name: str
    dataset: str
    trained_on: str | None
    weights: str | None
    metrics: Plain


def problem_of_place(out: Path) -> str | None:
    """Tell what keeps an outcome from being written, as a line about --out."""
    problem = places.problem_of_new(out)
    return problem and f"--out {out} {problem}"


def write(
    folder: Path,
    about: Plain,
    metrics: Plain,
    protocols: Mapping[Protocol, Plain],
    tables: Mapping[str, pa.Table],
) -> None:
    """Fill a folder. protocols: what is said of each beside what it is; tables: by the name of their file, without its ending."""
    (folder / EXPRESSIONS).mkdir()
    for name, table in tables.items():
        pq.write_table(table, folder / EXPRESSIONS / f"{name}.parquet")
    files.write_json(folder / PROTOCOLS, {p.name: {**asdict(p), **told} for p, told in protocols.items()})
    files.write_json(folder / METRICS, metrics)
    files.write_json(folder / ABOUT, about)


def read(folder: Path) -> Outcome:
    """Read what `write` wrote, or what stage `evaluate` left under results/evaluate, whose folder's name says what it is about.

    Raises DataError for a folder of anything else.
    """
    try:
        metrics = json.loads((folder / METRICS).read_text())
        if not all(
            isinstance(part, dict) and part.keys() >= _INTERVALS for each in metrics.values() for part in each.values()
        ):
            raise KeyError(f"{METRICS} has no scores with intervals, by protocol and split")
        about = json.loads((folder / ABOUT).read_text()) if (folder / ABOUT).exists() else _of_stage(folder)
        weights = about.get("model", {}).get("weights_sha256")
        return Outcome(about["name"], about["dataset"], about.get("trained_on"), weights, metrics)
    except (OSError, ValueError, KeyError, AttributeError) as error:  # the last where it holds no dicts
        told = error.strerror if isinstance(error, OSError) else error.args[0]
        raise DataError(
            f"{folder} holds no evaluation ({told}): give what `ris evaluate --model ... --out` or `ris score ... --out` wrote, "
            "or a folder of results/evaluate"
        ) from None


def _of_stage(folder: Path) -> Plain:
    system, _, dataset = folder.resolve().name.partition("-")
    if not dataset:
        raise KeyError(f"no {ABOUT} in it")
    return {"name": system, "dataset": dataset, "trained_on": dataset}
