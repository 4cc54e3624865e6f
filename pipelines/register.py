"""Stage `register`: the evaluated model becomes a version in the MLflow registry, and champion if it surely answers better.

python -m pipelines.register --system cris --dataset shapes
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.parquet as pq
import typer

from pipelines import gate, lineage, packaging, paths, tracking, versions
from pipelines.model_card import scored, shortened
from pipelines.paired import MEASURES
from pipelines.params import Params
from pipelines.stage import check_names, params, run
from ris_core import files
from ris_core.errors import ConfigError, DataError
from ris_core.evaluation.metrics import PROTOCOLS
from ris_core.models.registry import ModelInfo, load_model
from ris_core.options import Plain

SAME = (*gate.OF_MODEL, "code_digest", "score")  # tags of versions that are one
DECISION = "decision"  # tag of a version that has been through the gate


def main(
    system: Annotated[str, typer.Option(help="a system of ris_core/models")],
    dataset: Annotated[str, typer.Option(help="a dataset the system was trained and evaluated on")],
) -> None:
    """Log the model with its scores and lineage to MLflow and move the alias if it surely beats the champion."""
    check_names(dataset, system)
    chosen = params("register")
    split, metric = chosen.register.split, chosen.register.metric
    model = paths.model(system, dataset)
    info = load_model(model)[1].info  # a damaged one is not registered
    evaluation = paths.evaluation(system, dataset)
    protocol, parts = read_scores(evaluation / "metrics.json", split)
    table = read_answers(paths.expressions(system, dataset) / f"{protocol}-{split}.parquet")
    for name, part in parts.items():
        answers = table if name == split else None
        gate.check_scores(answers, PROTOCOLS[protocol], part, f"{evaluation / 'metrics.json'}, {name}")
    name = paths.plain(f"ris-{system}-{dataset}")
    tags = {**lineage.tags(system, model, info), "protocol": protocol, "split": split, "metric": metric}
    tags["score"] = f"{parts[split][metric]:.5f}"
    tags |= {f"{each}/{measure}": scored(part, measure) for each, part in parts.items() for measure in MEASURES}
    candidate = gate.Candidate(name, system, dataset, PROTOCOLS[protocol], split, model, table, tags)
    client = tracking.connect()
    versions.ensure(client, name)
    with versions.alone(client, name):
        version, told = register(candidate, chosen, client, info, parts)
    files.write_json(
        paths.registration(system, dataset),
        {"model": name, "protocol": protocol, "score": parts[split][metric], "version": version, "decision": told},
    )
    typer.echo(f"models:/{name}/{version}  {split} {metric} {parts[split][metric]:.3f}: {told}")


def register(
    candidate: gate.Candidate, chosen: Params, client: versions.MlflowClient, info: ModelInfo, parts: Plain
) -> tuple[str, str]:
    """Add a version, unless there is the same already, and give it the alias that it deserves; its number and what was decided.

    One that has been through the gate keeps what it has: whoever moved an alias since then had a reason.
    """
    same = next(
        (
            known
            for known in versions.known(client, candidate.name)
            if all(known.tags.get(key) == candidate.tags[key] for key in SAME)
        ),
        None,
    )
    if same is not None and DECISION in same.tags:
        return str(same.version), standing(client, same)
    with tempfile.TemporaryDirectory() as place:
        evaluation = Path(place) / versions.EVALUATION
        evaluation.mkdir()
        verdict = gate.judge(candidate, client, chosen, evaluation)
        if same is not None:  # whoever registered it died before it was decided
            version = str(same.version)
        else:
            version = log_version(candidate, chosen, client, info, parts, verdict, Path(place))
    decided = verdict.why if verdict.alias is None else f"{verdict.alias}: {verdict.why}"
    if verdict.alias is not None:
        versions.move(client, candidate.name, verdict.alias, version, "gate", verdict.why)
    client.set_model_version_tag(candidate.name, version, DECISION, decided)
    return version, decided


def standing(client: versions.MlflowClient, version: versions.ModelVersion) -> str:
    """Tell what a version that was registered before is."""
    aliases = client.get_model_version(version.name, version.version).aliases
    return f"already {', '.join(aliases)}" if aliases else f"registered before ({version.tags[DECISION]})"


def log_version(
    candidate: gate.Candidate,
    chosen: Params,
    client: versions.MlflowClient,
    info: ModelInfo,
    parts: Plain,
    verdict: gate.Verdict,
    place: Path,
) -> str:
    """Log model, answers, scores, parameters and card as a pyfunc model of the run that trained it, and register that."""
    run_id = tracking.find_run(chosen.register.experiment, info.run)
    if run_id is None:
        told = f"the run that trained {candidate.folder} is not in {tracking.uri()}: a new run holds the model"
        print(told, file=sys.stderr)
        title = f"{candidate.name}-{candidate.tags['weights_sha256'][:12]}"
        run_id = tracking.open_run(chosen.register.experiment, title, {}, candidate.tags)
    card = lineage.keep(candidate, info, parts, verdict, place / versions.EVALUATION)
    with tracking.running(run_id, system_metrics=False):
        version = packaging.log(run_id, candidate.name, candidate.folder, candidate.tags, place)
        gallery = paths.evaluation(candidate.system, candidate.dataset) / "gallery"
        if gallery.exists():
            client.log_artifacts(run_id, str(gallery), "gallery")
        numbers = {
            f"test/{split}/{key}": value
            for split, part in parts.items()
            for key, value in part.items()
            if isinstance(value, float)
        }
        tracking.log_metrics(run_id, numbers, 0)
    client.update_model_version(candidate.name, version, description=shortened(card))
    return version


def read_scores(path: Path, split: str) -> tuple[str, dict[str, Any]]:
    """Read the first protocol's name and scores by split. Raises DataError without any, ConfigError without those of `split`."""
    if not path.exists():
        raise DataError(f"{path} does not exist: run the evaluate stage for this system and dataset first")
    protocol, parts = next(iter(json.loads(path.read_text()).items()))
    if split not in parts:
        raise ConfigError(f"register.split is '{split}', but only {', '.join(parts)} were evaluated ({path})")
    return protocol, parts


def read_answers(path: Path) -> pa.Table:
    """Read the answers to a split's expressions. Raises DataError if they are missing or damaged."""
    try:
        return pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        reason = (
            "does not exist"
            if isinstance(error, FileNotFoundError)
            else f"cannot be read ({str(error).splitlines()[0]})"
        )
        raise DataError(f"{path} {reason}: run the stage evaluate for this system and dataset") from error


if __name__ == "__main__":
    run(main)
