"""Stage `register`: the evaluated model becomes a version in the MLflow registry, and champion if it is the best.

python -m pipelines.register --system cris --dataset shapes
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from pipelines import fingerprint, paths, registry, tracking
from pipelines.stage import check_names, params, run
from ris_core import files
from ris_core.errors import ConfigError, DataError
from ris_core.models.registry import WEIGHTS, load_model, system_class


def main(
    system: Annotated[str, typer.Option(help="a system of ris_core/models")],
    dataset: Annotated[str, typer.Option(help="a dataset the system was trained and evaluated on")],
) -> None:
    """Log the model with its scores and lineage to MLflow and move the alias if it beats the champion."""
    check_names(dataset, system)
    chosen = params("register").register
    model = paths.model(system, dataset)
    info = load_model(model)[1].info  # a damaged one is not registered
    protocol, parts = read_scores(paths.evaluation(system, dataset) / "metrics.json", chosen.split)
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
        "code_digest": fingerprint.served_code(system),
        "data_digest": info.data_digest,
        "clip_digest": info.clip_digest,
        "config_digest": info.config_digest,
        "weights_sha256": files.file_sha256(model / WEIGHTS),
        "dvc_lock_sha256": files.file_sha256(Path("dvc.lock")) if Path("dvc.lock").exists() else "none",
    }
    gallery = paths.evaluation(system, dataset) / "gallery"
    run_id = tracking.find_run(chosen.experiment, info.run)
    if run_id is None:
        print(f"the run that trained {model} is not in {tracking.uri()}: a new run holds the model", file=sys.stderr)
        run_id = tracking.open_run(chosen.experiment, f"{name}-{tags['weights_sha256'][:12]}", {}, tags)
    with tracking.running(run_id, system_metrics=False):
        pictures = gallery if gallery.exists() else None
        version = registry.register_model(run_id, name, model, numbers, tags, pictures, system_class(system).notice)
    verdict = registry.promote(name, version, chosen.alias, tags, chosen.minimum)
    files.write_json(
        paths.registration(system, dataset), {"model": name, "protocol": protocol, "score": score, **verdict}
    )
    typer.echo(f"models:/{name}/{version}  {chosen.split} {chosen.metric} {score:.3f}: {verdict['decision']}")


def read_scores(path: Path, split: str) -> tuple[str, dict[str, Any]]:
    """Read the first protocol's name and scores by split. Raises DataError without any, ConfigError without those of `split`."""
    if not path.exists():
        raise DataError(f"{path} does not exist: run the evaluate stage for this system and dataset first")
    protocol, parts = next(iter(json.loads(path.read_text()).items()))
    if split not in parts:
        raise ConfigError(f"register.split is '{split}', but only {', '.join(parts)} were evaluated ({path})")
    return protocol, parts


if __name__ == "__main__":
    run(main)
