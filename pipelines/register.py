"""Stage `register`: the evaluated model becomes a version in the MLflow registry, and champion if it is the best.

python -m pipelines.register --system cris --dataset shapes
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from pipelines import files, fingerprint, paths, tracking
from pipelines.stage import run


def main(
    system: Annotated[str, typer.Option(help="cris")],
    dataset: Annotated[str, typer.Option(help="a dataset the system was trained and evaluated on")],
) -> None:
    """Log the model with its scores and lineage to MLflow and move the alias if it beats the champion."""
    from pipelines.stage import params

    chosen = params().register
    model = paths.model(system, dataset)
    info = json.loads((model / "model.json").read_text())["info"]
    metrics = json.loads((paths.evaluation(system, dataset) / "metrics.json").read_text())
    protocol = next(iter(metrics))
    parts = metrics[protocol]
    score = parts[chosen.split][chosen.metric]
    name = f"ris-{system}-{dataset}".replace("+", "p")
    numbers = {
        f"{split}/{key}": value
        for split, part in parts.items()
        for key, value in part.items()
        if isinstance(value, float)
    }
    tags = {
        "protocol": protocol,
        "split": chosen.split,
        "metric": chosen.metric,
        "score": f"{score:.5f}",
        "git_commit": fingerprint.git_commit(),
        "data_digest": info["data_digest"],
        "clip_digest": info["clip_digest"],
        "weights_sha256": fingerprint.file_digest(model / "model.safetensors"),
        "dvc_lock_sha256": fingerprint.file_digest(Path("dvc.lock")) if Path("dvc.lock").exists() else "none",
    }
    gallery = paths.evaluation(system, dataset) / "gallery"
    version = tracking.register_model(
        info["mlflow_run"], name, model, numbers, tags, gallery if gallery.exists() else None
    )
    verdict = tracking.promote(name, version, chosen.alias, tags, chosen.minimum)
    files.write_json(
        paths.registration(system, dataset), {"model": name, "protocol": protocol, "score": score, **verdict}
    )
    typer.echo(f"models:/{name}/{version}  {chosen.split} {chosen.metric} {score:.3f}: {verdict['decision']}")


if __name__ == "__main__":
    run(main)
