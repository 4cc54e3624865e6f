"""Stage `report`: one page, `results/report/index.html`, with scores, learning curves and a gallery.

python -m pipelines.report
"""

from __future__ import annotations

import base64
import csv
import io
import json
import os
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
import matplotlib
import typer

from pipelines import paths, report_tables
from pipelines.stage import run
from ris_core import files
from ris_core.errors import DataError, list_problems
from ris_core.options import Plain

CURVES = (("train/loss", "training loss"), ("val/mIoU", "validation mIoU"), ("val/oIoU", "validation oIoU"))
CLIP_MEASURES = ("retrieval@1", "phrase_to_object", "patch_accuracy", "patch_object")
PRECISION = ("Pr@0.5", "Pr@0.6", "Pr@0.7", "Pr@0.8", "Pr@0.9")
PUBLISHED = Path(__file__).parent / "published.json"  # the papers' own figures, by hand


def main() -> None:
    """Write the report page from what train, evaluate and compare left under results/."""
    timed = read_if_there(paths.WAITING) or {"date": "", "systems": {}}
    runs = [
        read_run(metrics.parent, timed["systems"])
        for metrics in sorted(Path("results/evaluate").glob("*/metrics.json"))
    ]
    if not runs:
        raise DataError("results/evaluate has no scores yet: run the evaluate stage first")
    datasets = [
        {
            "name": name,
            "runs": own,
            "overviews": report_tables.overviews(own),
            "devices": report_tables.devices(own),
            "kinds": report_tables.kinds(own),
            "sizes": report_tables.sizes(own),
            "behaviours": report_tables.behaviours(own),
            "comparison": read_comparison(paths.comparison(name)),
        }
        for name, own in report_tables.by_dataset(runs).items()
    ]
    check_pictures(datasets)
    clips = {file.stem: json.loads(file.read_text()) for file in sorted(Path("results/clip").glob("*.json"))}
    page = template().render(
        runs=runs,
        timed_on=timed["date"],
        datasets=datasets,
        published=json.loads(PUBLISHED.read_text()),
        clips={name: scores for name, scores in clips.items() if scores},  # real weights come without scores
        clip_measures=CLIP_MEASURES,
        curves=curves(runs),
        precision_at=PRECISION,
        main_precision=report_tables.MAIN_PRECISION,
        behaviour_meanings=report_tables.BEHAVIOUR,
    )
    files.write_text(paths.REPORT / "index.html", page)
    typer.echo(paths.REPORT / "index.html")


def template() -> jinja2.Template:
    """Give the page's template, with the ways to write a number as filters."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "score": report_tables.score,
        "p_value": report_tables.p_value,
        "significant": report_tables.significant,
        "millions": report_tables.millions,
        "picture": picture,
        "unanswered": report_tables.unanswered,
    }
    return environment.get_template("report.html")


def read_run(folder: Path, timed: Plain) -> Plain:
    """Read everything the page shows of one system on one dataset; None for what was not measured.

    `timed` are the waiting times of all, by the names of such folders.
    """
    system, dataset = folder.name.split("-", 1)
    gallery = json.loads((folder / "gallery" / "gallery.json").read_text())
    for item in gallery:
        item["picture"] = folder / "gallery" / item["file"]
    histories = {
        "stage 1": read_history(paths.initialisation(system, dataset)),  # few systems train something before
        "": read_history(paths.training(system, dataset)),
    }
    return {
        "name": folder.name,
        "system": system,
        "dataset": dataset,
        "metrics": json.loads((folder / "metrics.json").read_text()),
        "protocols": json.loads((folder / "protocols.json").read_text()),
        "cost": read_if_there(folder / "cost.json"),
        "waiting": timed.get(folder.name),
        "behaviour": read_if_there(folder / "behaviour.json"),
        "histories": {", ".join(filter(None, (folder.name, stage))): rows for stage, rows in histories.items() if rows},
        "gallery": gallery,
    }


def read_history(folder: Path) -> list[dict[str, float]]:
    """Read the epochs of a training; none where nothing was trained."""
    file = folder / "history.csv"
    if not file.exists():
        return []
    with file.open() as opened:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(opened)]


def read_comparison(folder: Path) -> Plain | None:
    """Read what stage `compare` found on one dataset, if it ran."""
    found: Plain | None = read_if_there(folder / "comparison.json")
    for item in found["hard"] if found else ():
        item["picture"] = folder / item["file"]
    return found


def read_if_there(file: Path) -> Any:
    return json.loads(file.read_text()) if file.exists() else None


def check_pictures(datasets: list[Plain]) -> None:
    """Raise DataError with all pictures that results name and that are not there."""
    named = [item for dataset in datasets for each in dataset["runs"] for item in each["gallery"]]
    named += [item for dataset in datasets if dataset["comparison"] for item in dataset["comparison"]["hard"]]
    missing = [str(item["picture"]) for item in named if not item["picture"].exists()]
    if missing:
        remedy = "run the stages evaluate and compare again"
        raise DataError(list_problems("pictures that results name are not there", missing, remedy))


def picture(file: Path) -> str:
    """Give the address of a picture from the page, which lies in the same repository."""
    return quote(Path(os.path.relpath(file, paths.REPORT)).as_posix(), safe="/+")


def curves(runs: list[Plain]) -> str | None:
    """Draw learning curves of all runs side by side, as an SVG picture in a data URI; None if nothing was trained."""
    histories = {name: history for each in runs for name, history in each["histories"].items()}
    if not histories:
        return None
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "ris"  # the same bytes for the same curves
    import matplotlib.pyplot as plt  # after the choice of what draws

    figure, axes = plt.subplots(1, len(CURVES), figsize=(12, 3.2), layout="constrained")
    for axis, (column, title) in zip(axes, CURVES, strict=True):
        for name, history in histories.items():
            axis.plot([row["epoch"] for row in history], [row[column] for row in history], "o-", ms=3, label=name)
        axis.set(title=title, xlabel="epoch")
        axis.grid(alpha=0.3)
    axes[0].legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    plt.close(figure)
    return f"data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue()).decode()}"


if __name__ == "__main__":
    run(main)
