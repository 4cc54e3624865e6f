"""`ris tabulate`: what several evaluations found, as one table: models down, datasets across."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipelines import outcome
from pipelines.paired import MEASURES
from pipelines.scores import sorted_splits
from ris_core.errors import ConfigError, list_problems
from ris_core.evaluation.metrics import PROTOCOLS


def main(
    folders: Annotated[
        list[Path],
        typer.Argument(help="what `ris evaluate --model` and `ris score` wrote, and folders of results/evaluate"),
    ],
    protocol: Annotated[str, typer.Option(help="the protocol of the scores")] = "ours",
    metric: Annotated[str, typer.Option(help="mIoU or oIoU")] = "mIoU",
) -> None:
    """Print the scores of several evaluations as one table: models and what they were trained on, against datasets."""
    problems = []
    if protocol not in PROTOCOLS:
        problems.append(f"--protocol {protocol}: choose of {', '.join(PROTOCOLS)}")
    if metric not in MEASURES:
        problems.append(f"--metric {metric}: choose of {', '.join(MEASURES)}")
    if problems:
        raise ConfigError(list_problems("no table can be made", problems))
    found = [outcome.read(folder) for folder in folders]
    problems = [
        f"{folder} has scores of {', '.join(each.metrics)}"
        for folder, each in zip(folders, found, strict=True)
        if protocol not in each.metrics
    ]
    if problems:
        raise ConfigError(list_problems(f"not all have scores of protocol {protocol}", problems))
    for line in table(found, protocol, metric):
        typer.echo(line)


def rows_of(found: list[outcome.Outcome]) -> dict[tuple[str, str], list[outcome.Outcome]]:
    """Sort evaluations by model: its name, with the beginning of its weights' digest where several share it, and its dataset."""
    known: dict[tuple[str, str | None], set[str]] = {}
    for each in found:
        known.setdefault((each.name, each.trained_on), set()).update([each.weights] if each.weights else [])
    rows: dict[tuple[str, str], list[outcome.Outcome]] = {}
    for each in found:
        several = len(known[each.name, each.trained_on]) > 1
        name = f"{each.name} {(each.weights or '?')[:8]}" if several else each.name
        rows.setdefault((name, each.trained_on or "?"), []).append(each)
    return rows


def table(found: list[outcome.Outcome], protocol: str, metric: str) -> list[str]:
    """Give the lines of a Markdown table: a row for a model, a column for a split, scores with their intervals.

    A star marks what a model was trained on. Of two evaluations of the same, the later one counts.
    """
    cells: dict[tuple[str, str], dict[tuple[str, str], str]] = {}
    for model, evaluations in rows_of(found).items():
        row = cells.setdefault(model, {})
        for each in evaluations:
            for split, part in each.metrics[protocol].items():
                low, high = part[f"{metric}_95"]
                star = "*" if each.trained_on == each.dataset else ""
                row[each.dataset, split] = f"{part[metric]:.3f}{star} [{low:.3f}, {high:.3f}]"
    datasets = dict.fromkeys(each.dataset for each in found)
    columns = [
        (dataset, split)
        for dataset in datasets
        for split in sorted_splits({split for row in cells.values() for name, split in row if name == dataset})
    ]
    rows = [[f"{metric}, protocol {protocol}", "trained on", *(" ".join(column) for column in columns)]]
    rows += [[*model, *(row.get(column, "") for column in columns)] for model, row in cells.items()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    return [lines[0], "| " + " | ".join("-" * width for width in widths) + " |", *lines[1:]]


if __name__ == "__main__":
    from pipelines.stage import run

    run(main)
