"""Stage `compare`: all systems on one dataset, in pairs over the same expressions, and side by side in pictures.

python -m pipelines.compare --dataset shapes
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import typer

from pipelines import cluster, paths
from pipelines.gallery import KINDS, scenes, side_by_side
from pipelines.paired import ANSWER, EXPRESSION, headlines, joined, overlaps, pairs
from pipelines.params import Params
from pipelines.scores import rounded, sorted_splits
from pipelines.stage import check_names, params, run
from ris_core import files
from ris_core.data.dataset import ShardStore
from ris_core.errors import DataError, list_problems
from ris_core.evaluation.metrics import Protocol, iou, suited
from ris_core.models.answer import Reading
from ris_core.options import Plain
from ris_core.predictor import RISPredictor

HARD_PER_KIND = 2


def main(dataset: Annotated[str, typer.Option(help="a dataset that all systems were evaluated on")]) -> None:
    """Test all systems against each other over the same expressions, and show what was hard for them."""
    check_names(dataset)
    chosen = params("compare")
    protocol = suited(chosen.evaluate.protocols, ShardStore(paths.shards(dataset)).is_generalised)[0]
    tables = {
        split: joined(of_systems, f"{dataset} {split}")
        for split, of_systems in read_tables(dataset, chosen.systems, protocol).items()
    }
    if len(chosen.systems) == 1:
        typer.echo(f"{chosen.systems[0]} is the only system: there are no pairs to compare")
    splits = {
        split: {"expressions": len(table), "pairs": pairs(table, chosen.systems, chosen.evaluate, protocol.empty_union)}
        for split, table in tables.items()
    }
    first = next(iter(tables))
    rows = hardest(tables[first], chosen.systems, protocol.empty_union)
    with files.replaced_folder(paths.comparison(dataset)) as folder:
        hard = draw(rows, chosen, dataset, protocol.reading, folder)
        found = {"protocol": protocol.name, "splits": splits, "hard": hard}
        files.write_json(folder / "comparison.json", rounded(found))
    for line in headlines(splits):
        typer.echo(line)


def read_tables(dataset: str, systems: list[str], protocol: Protocol) -> dict[str, dict[str, pa.Table]]:
    """Read for each split, validation first, the table of each system: columns EXPRESSION and ANSWER, rows that count.

    Raises DataError with all that are missing, of a system that was not evaluated or lacks a split that another has.
    """
    place = {system: paths.expressions(system, dataset) for system in systems}
    prefix = f"{protocol.name}-"
    found = {s: {file.stem.removeprefix(prefix) for file in place[s].glob(f"{prefix}*.parquet")} for s in systems}
    splits = sorted_splits(set().union(*found.values()))
    missing = [
        f"{system}: no {place[system]}/{prefix}{split}.parquet"
        for system in systems
        for split in (splits or ["*"])
        if split not in found[system]
    ]
    if missing:
        remedy = f"run the stage evaluate for them: python -m pipelines.evaluate --system ... --dataset {shlex.quote(dataset)}"
        raise DataError(list_problems(f"the systems cannot be compared on {dataset}", missing, remedy))
    columns = EXPRESSION + ANSWER
    counted = pc.field("found") if protocol.skip_unanswered else None
    tables: dict[str, dict[str, pa.Table]] = {}
    for split in splits:
        files_of = {system: place[system] / f"{prefix}{split}.parquet" for system in systems}
        tables[split] = {s: pq.read_table(file, columns=columns, filters=counted) for s, file in files_of.items()}
    return tables


def hardest(table: pa.Table, systems: list[str], empty_union: float = 0.0) -> list[Plain]:
    """Pick rows of a joined table to show: of each kind those with the lowest mean IoU that some system got right (0.5).

    What no system can do may be a fault of the expression; these can be done, and are not. Of different images where
    there are enough. Each row has `iou`, a number per system.
    """
    values = {system: iou(*overlaps(table, system), empty_union).tolist() for system in systems}
    rows = [
        {**row, "iou": {system: values[system][i] for system in systems}}
        for i, row in enumerate(table.select(EXPRESSION).to_pylist())
    ]
    possible = sorted(
        (row for row in rows if max(row["iou"].values()) >= 0.5),
        key=lambda row: (sum(row["iou"].values()), row["sent_id"]),
    )
    chosen: list[Plain] = []
    for kind in KINDS:
        waiting = [row for row in possible if row["kind"] == kind]
        for _ in range(min(HARD_PER_KIND, len(waiting))):
            shown = {row["image_id"] for row in chosen}
            taken = next((row for row in waiting if row["image_id"] not in shown), waiting[0])
            waiting.remove(taken)
            chosen.append(taken)
    return chosen


def draw(rows: list[Plain], chosen: Params, dataset: str, reading: Reading, out: Path) -> list[Plain]:
    """Write one JPEG per row into `out`, the systems' answers in a line; returns what the report says about each.

    Only one model is in memory at a time.
    """
    seen = scenes(rows, ShardStore(paths.shards(dataset)), paths.raw(dataset))

    def predictors() -> Iterator[tuple[str, RISPredictor]]:
        device, precision = cluster.device(chosen.cluster.use_gpu), chosen.evaluate.precision
        for system in chosen.systems:
            model = paths.model(system, dataset)
            yield system, RISPredictor.from_folder(model, device, reading=reading, precision=precision)

    shown = []
    for number, (row, picture) in enumerate(zip(rows, side_by_side(rows, seen, predictors()), strict=True)):
        name = f"hard-{number:02d}-{row['kind']}.jpg"
        picture.save(out / name, quality=85)
        shown.append({"file": name, **{key: row[key] for key in ("text", "kind", "iou")}})
    return shown


if __name__ == "__main__":
    run(main)
