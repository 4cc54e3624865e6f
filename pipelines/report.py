"""Stage `report`: one page, `results/report/index.html`, with scores, learning curves and a gallery.

python -m pipelines.report
"""

from __future__ import annotations

import base64
import csv
import io
import json
from pathlib import Path
from typing import Any

import typer

from pipelines import files, paths
from pipelines.stage import run

CURVES = (("train/loss", "training loss"), ("val/mIoU", "validation mIoU"), ("val/oIoU", "validation oIoU"))


def main() -> None:
    """Write the report page from what train and evaluate left under results/."""
    import jinja2

    from ris_core.errors import DataError

    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    runs = [read_run(metrics.parent) for metrics in sorted(Path("results/evaluate").glob("*/metrics.json"))]
    if not runs:
        raise DataError("results/evaluate has no scores yet: run the evaluate stage first")
    clips = {file.stem: json.loads(file.read_text()) for file in sorted(Path("results/clip").glob("*.json"))}
    page = templates.get_template("report.html").render(
        runs=runs,
        clips={name: scores for name, scores in clips.items() if scores},  # real weights come without scores
        clip_measures=CLIP_MEASURES,
        comparison=comparison(runs),
        curves=curves(runs),
        precision_at=PRECISION,
    )
    files.write_text(paths.REPORT / "index.html", page)
    typer.echo(paths.REPORT / "index.html")


CLIP_MEASURES = ("retrieval@1", "phrase_to_object", "patch_accuracy", "patch_object")
PRECISION = ("Pr@0.5", "Pr@0.6", "Pr@0.7", "Pr@0.8", "Pr@0.9")


def read_run(folder: Path) -> dict[str, Any]:
    """Everything the page shows of one system on one dataset."""
    gallery = json.loads((folder / "gallery" / "gallery.json").read_text())
    for item in gallery:
        item["picture"] = data_uri((folder / "gallery" / item["file"]).read_bytes(), "image/jpeg")
    histories = {}
    for stage, name in (("initialise", f"{folder.name}, stage 1"), ("train", folder.name)):
        file = Path("results") / stage / folder.name / "history.csv"
        if stage == "train" or file.exists():  # few systems train something before
            with file.open() as opened:
                histories[name] = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(opened)]
    return {
        "name": folder.name,
        "metrics": json.loads((folder / "metrics.json").read_text()),
        "protocols": json.loads((folder / "protocols.json").read_text()),
        "histories": histories,
        "gallery": gallery,
    }


def comparison(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each protocol, dataset and split one table with a row per system."""
    tables: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for each in runs:
        system, dataset = each["name"].split("-", 1)
        for protocol, splits in each["metrics"].items():
            for split, scores in splits.items():
                tables.setdefault((protocol, dataset, split), []).append({"system": system, **scores})
    return [{"protocol": p, "dataset": d, "split": s, "rows": rows} for (p, d, s), rows in tables.items()]


def curves(runs: list[dict[str, Any]]) -> str:
    """Learning curves of all runs side by side, as an SVG picture in a data URI."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "ris"  # the same bytes for the same curves
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(CURVES), figsize=(12, 3.2), layout="constrained")
    for axis, (column, title) in zip(axes, CURVES, strict=True):
        for name, history in (item for each in runs for item in each["histories"].items()):
            axis.plot([row["epoch"] for row in history], [row[column] for row in history], "o-", ms=3, label=name)
        axis.set(title=title, xlabel="epoch")
        axis.grid(alpha=0.3)
    axes[0].legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    plt.close(figure)
    return data_uri(buffer.getvalue(), "image/svg+xml")


def data_uri(content: bytes, kind: str) -> str:
    """A file as text inside the page, so that the page can be mailed as it is."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


if __name__ == "__main__":
    run(main)
