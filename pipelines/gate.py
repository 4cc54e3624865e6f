"""The gate before an alias: a version becomes champion where it surely answers better, not where a number is higher.

Both answer the same expressions of the same data under the same protocol; their difference has an interval from a paired
bootstrap over images (`ris_core.evaluation.metrics.paired_bootstrap`), and all of it has to be above zero.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import evaluate, paired, paths, versions
from pipelines.gallery import scenes, side_by_side
from pipelines.params import Params
from pipelines.scores import counted, rounded
from ris_core import files
from ris_core.data.dataset import ShardStore
from ris_core.errors import ClusterError, DataError, RISError, list_problems
from ris_core.evaluation.metrics import Protocol, iou, scores
from ris_core.models.registry import load_model
from ris_core.options import Plain
from ris_core.predictor import RISPredictor

NEW, OLD = "this version", "the champion"
OF_MODEL = ("weights_sha256", "clip_digest", "config_digest", "data_digest")  # tags that tell one model from another
SHOWN = 4  # pictures of expressions that one answers better, and as many of the other
TOLERANCE = 1e-4  # of scores that are kept with five digits


@dataclass(frozen=True)
class Candidate:
    """A model that was evaluated, and its answers to a split's expressions (`evaluator.TABLE_SCHEMA`)."""

    name: str  # of the registered model
    system: str
    dataset: str
    protocol: Protocol
    split: str
    folder: Path
    table: pa.Table
    tags: dict[str, str]


@dataclass(frozen=True)
class Verdict:
    """Which alias a version gets, if any, and why. comparison: what was found against the champion, where there is one."""

    alias: str | None
    why: str
    comparison: Plain | None = None


def check_scores(table: pa.Table | None, protocol: Protocol, told: Plain, where: str) -> None:
    """Raise DataError unless all numbers of a split are finite, and the scores those of its table of expressions, if given."""
    problems = [f"{key} is {value}" for key, value in _numbers(told) if not math.isfinite(value)]
    if not problems and table is not None:
        rows = counted(table, protocol)
        intersection, union = (rows[name].to_numpy() for name in paired.ANSWER)
        found = scores(intersection, union, protocol.strict, protocol.empty_union)
        problems = [
            f"{key} is {told[key]}, and its expressions give {found[key]:.5f}"
            for key in paired.MEASURES
            if key not in told or abs(told[key] - found[key]) > TOLERANCE
        ]
    if problems:
        raise DataError(list_problems(f"{where} cannot be trusted", problems, "run the stage evaluate again"))


def _numbers(told: Plain, before: str = "") -> Iterator[tuple[str, float]]:
    for key, value in told.items():
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, dict):
                yield from _numbers(number, f"{before}{key}.")
            elif isinstance(number, int | float):
                yield f"{before}{key}", float(number)


def judge(candidate: Candidate, client: versions.MlflowClient, params: Params, out: Path) -> Verdict:
    """Compare a candidate with the champion; writes `comparison.json` and pictures into `out` where there is one.

    Without one it is the last that was, whoever took the alias away; the first version of all has nobody to beat.
    """
    gate = params.register
    score = float(candidate.tags["score"])
    if score < gate.minimum:
        return Verdict(None, f"not promoted: {score} is below the minimum {gate.minimum}")
    champion, last = _champion(client, candidate.name, gate.alias)
    if champion is None:
        if last is None:
            return Verdict(gate.alias, "the first version that reached the minimum")
        told = f"version {last}, which was {gate.alias}, was deleted"
        return Verdict(versions.CHALLENGER, f"{told}: choose with `ris registry promote`")
    number = str(champion.version)
    try:
        table, rescored, folder = _answers_of(champion, candidate, params)
        joined = paired.joined(
            {NEW: _rows(candidate.table, candidate), OLD: _rows(table, candidate)},
            f"{candidate.name} {candidate.split}",
        )
    except RISError as error:
        reason = str(error).splitlines()[0]
        print(f"version {number}, the {gate.alias}, cannot be compared with: {error}", file=sys.stderr)
        return Verdict(versions.CHALLENGER, f"version {number} cannot be compared with: {reason}")
    (pair,) = paired.pairs(joined, [NEW, OLD], params.evaluate, candidate.protocol.empty_union)
    found: Plain = {
        "champion": number,
        "protocol": candidate.protocol.name,
        "split": candidate.split,
        "expressions": len(joined),
        "images": len(np.unique(joined["image_id"].to_numpy())),
        "rescored": rescored,
        **{
            measure: {key: pair[measure][key] for key in ("difference", "interval", "p")} for measure in paired.MEASURES
        },
    }
    found["pictures"] = draw(disagreements(joined, candidate.protocol.empty_union), candidate, folder, params, out)
    files.write_json(out / "comparison.json", rounded(found))
    low, high = pair[gate.metric]["interval"]
    difference = f"{gate.metric} {pair[gate.metric]['difference']:+.4f} [{low:+.4f}, {high:+.4f}] to version {number}"
    if low > 0:
        return Verdict(gate.alias, difference, found)
    if _same_model(candidate, champion) and _same_answers(joined):
        return Verdict(gate.alias, f"version {number} with other code, every answer the same", found)
    return Verdict(versions.CHALLENGER, f"{difference}: not surely better", found)


def _champion(client: versions.MlflowClient, name: str, alias: str) -> tuple[versions.ModelVersion | None, str | None]:
    """Give who has the alias or had it last, and the number of the latter, also where that version is deleted."""
    standing = versions.holder(client, name, alias)
    last = versions.last_holder(client, name, alias)
    if standing is None and last is not None:
        standing = versions.version_of(client, name, last)
    return standing, last


def _answers_of(
    champion: versions.ModelVersion, candidate: Candidate, params: Params
) -> tuple[pa.Table, str | None, Path]:
    """Give the champion's answers to the same expressions: those it was registered with, or new ones and why; and its model.

    Raises RISError, saying why, where it cannot be scored on this data.
    """
    place = f"models:/{champion.name}/{champion.version}"
    folder = versions.fetch(place)
    kept = f"{candidate.protocol.name}-{candidate.split}.parquet"
    differing = [key for key in ("protocol", "split", "data_digest") if champion.tags.get(key) != candidate.tags[key]]
    if not differing:
        try:
            table = pq.read_table(versions.fetch(place, versions.EVALUATION) / kept)
        except (ClusterError, OSError, pa.ArrowException):  # registered before answers were kept
            differing = ["answers that are kept"]
        else:
            if set(table["sent_id"].to_pylist()) == set(candidate.table["sent_id"].to_pylist()):
                return table, None, folder
            differing = ["expressions"]
    why = f"version {champion.version} was scored with another {', '.join(differing)}"
    if differing == ["answers that are kept"]:
        why = f"version {champion.version} came without its answers"
    print(f"{why}: it is scored again, on {candidate.dataset} {candidate.split}", file=sys.stderr)
    described = load_model(folder)[1]
    evaluate.check_fit(described.info, ShardStore(paths.shards(candidate.dataset)), folder, candidate.dataset)
    job: Plain = {
        "job": f"{candidate.protocol.name}/{candidate.split}",
        "protocol": candidate.protocol.name,
        "split": candidate.split,
        "seed": params.evaluate.seed,
    }
    return evaluate.score(params, candidate.system, folder, candidate.dataset, [job])[job["job"]], why, folder


def _rows(table: pa.Table, candidate: Candidate) -> pa.Table:
    return counted(table, candidate.protocol).select(paired.EXPRESSION + paired.ANSWER)


def _same_model(candidate: Candidate, champion: versions.ModelVersion) -> bool:
    return all(candidate.tags.get(key) and champion.tags.get(key) == candidate.tags[key] for key in OF_MODEL)


def _same_answers(joined: pa.Table) -> bool:
    return all(joined[f"{NEW}/{name}"].equals(joined[f"{OLD}/{name}"]) for name in paired.ANSWER)


def disagreements(joined: pa.Table, empty_union: float = 0.0) -> list[Plain]:
    """Pick rows of a joined table to show: where one IoU is above the other most, of different images, either way."""
    values = {name: iou(*paired.overlaps(joined, name), empty_union) for name in (NEW, OLD)}
    gain = values[NEW] - values[OLD]
    rows = joined.select(paired.EXPRESSION).to_pylist()
    chosen: list[Plain] = []
    for sign in (1, -1):
        shown: set[int] = set()
        for i in sorted(np.flatnonzero(sign * gain > 0).tolist(), key=lambda i: (-sign * gain[i], rows[i]["sent_id"])):
            if len(shown) < SHOWN and rows[i]["image_id"] not in shown:
                shown.add(rows[i]["image_id"])
                chosen.append({**rows[i], "iou": {name: float(values[name][i]) for name in (NEW, OLD)}})
    return chosen


def draw(rows: Sequence[Plain], candidate: Candidate, champion: Path, params: Params, out: Path) -> list[Plain]:
    """Write one JPEG per row, both answers in a line; returns what is said about each."""
    seen = scenes(rows, ShardStore(paths.shards(candidate.dataset)), paths.raw(candidate.dataset))

    def predictors() -> Iterator[tuple[str, RISPredictor]]:
        for name, folder in ((NEW, candidate.folder), (OLD, champion)):
            yield name, evaluate.predictor_of(params, folder, candidate.protocol.reading)

    shown: list[Plain] = []
    for number, (row, picture) in enumerate(zip(rows, side_by_side(rows, seen, predictors()), strict=True)):
        file = f"disagreement-{number:02d}.jpg"
        picture.save(out / file, quality=85)
        shown.append({"file": file, **{key: row[key] for key in ("text", "kind", "sent_id", "iou")}})
    return shown
