"""`ris evaluate --model`: any model on any dataset. What was asked, whether the two fit, and what is left of it.

The stage's own results stay as they are: all goes into a folder of its own.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from pipelines import outcome, paths
from ris_core import files
from ris_core.data.dataset import ShardStore
from ris_core.data.proposal_store import ProposalStore
from ris_core.data.refer.reader import DatasetName
from ris_core.data.shards import MANIFEST
from ris_core.errors import ConfigError, DataError, WeightsError, list_problems
from ris_core.evaluation.evaluator import COUNTS, TABLE_SCHEMA
from ris_core.evaluation.metrics import PROTOCOLS, Protocol
from ris_core.evaluation.params import EvaluateParams
from ris_core.evaluation.predictions import entry_of, write_predictions
from ris_core.models.contract import MapSystem, System
from ris_core.models.registry import Description, ModelInfo
from ris_core.options import Plain

PREDICTIONS = "predictions"


@dataclass(frozen=True)
class Asked:
    """The options of `ris evaluate`: those of the stage are `system` and `dataset`, the others are of an evaluation by hand."""

    system: str | None
    dataset: str | None
    model: str | None
    splits: tuple[str, ...]
    protocols: tuple[str, ...]
    out: Path | None
    predictions: bool

    def check(self) -> None:
        """Raise ConfigError, with all that is wrong, for options that do not go together or name nothing."""
        problems = []
        if self.dataset is None:
            problems.append("--dataset: name the preprocessed dataset to score on")
        if (self.system is None) == (self.model is None):
            problems.append(
                "give --system, for the model that the stage train made of this dataset, or --model and --out, for any other"
            )
        if self.model is None:
            given = {
                "--split": self.splits,
                "--protocol": self.protocols,
                "--out": self.out,
                "--predictions": self.predictions,
            }
            problems += [
                f"{name}: goes with --model; the stage is told by params.yaml" for name, value in given.items() if value
            ]
        elif self.out is None:
            problems.append("--out: name a new folder; what the stage made is left alone")
        elif problem := outcome.problem_of_place(self.out):
            problems.append(problem)
        known = ", ".join(PROTOCOLS)
        problems += [f"--protocol {name}: choose of {known}" for name in self.protocols if name not in PROTOCOLS]
        if problems:
            raise ConfigError(list_problems("nothing was scored", problems))


def check_fit(
    model: System, info: ModelInfo, place: str, store: ShardStore, dataset: str, splits: Sequence[str]
) -> None:
    """Raise WeightsError, with all that is in the way and what to run, unless a model can be asked about a dataset."""
    problems = []
    command = f"ris preprocess --dataset {shlex.quote(dataset)}"
    preprocess = f"and run `{command}` (the models trained on these shards then need the old ones)"
    for name, wanted, there in (
        ("image_size", info.image_size, store.image_size),
        ("resample", info.resample, store.resample),
    ):
        if wanted != there:
            told = f"its {name} is {wanted}, that of the shards of {dataset} {there}"
            problems.append(f"{told}: set preprocess.{name}: {wanted} in params.yaml {preprocess}")
    if isinstance(model, MapSystem) and info.word_len is None:
        problems.append(
            "it is what a training starts from, and has no length of sentences: give what the stage train wrote"
        )
    elif isinstance(model, MapSystem) and info.word_len is not None and info.word_len > model.context_length:
        problems.append(
            f"it is said to read {info.word_len} tokens of a sentence, and has room for {model.context_length}"
        )
    if info.proposals is not None:
        problems += _proposals_in_the_way(info.proposals, store, dataset, splits)
        photo = paths.raw(dataset) / store.row(int(store.images_of(splits[0])[0]))["file_name"]
        if not photo.is_file():
            problems.append(f"it sees the photos themselves, and there is no {photo}: link the dataset's folder there")
    if problems:
        raise WeightsError(list_problems(f"{place} cannot be scored on {dataset}", problems))


def _proposals_in_the_way(options: Plain, store: ShardStore, dataset: str, splits: Sequence[str]) -> Iterator[str]:
    command = f"ris propose --dataset {shlex.quote(dataset)}"
    run = f"run `{command}` with a system that chooses among proposals in `systems` of params.yaml"
    try:
        made = ProposalStore(paths.proposals(dataset)).manifest
    except DataError as error:
        yield f"it chooses among proposals, and {dataset} has none ({str(error).splitlines()[0]}): {run}"
        return
    differing = {key: (options.get(key), made["options"].get(key)) for key in {*options, *made["options"]}}
    told = [f"{key} {theirs} and not {own}" for key, (own, theirs) in sorted(differing.items()) if own != theirs]
    if told:
        yield f"the proposals of {dataset} were made with {', '.join(told)}: set these in section `proposals` and {run}"
    if made["data_digest"] != files.file_sha256(store.folder / MANIFEST):
        yield f"the proposals of {dataset} were made of other shards: {run}"
    if lacking := [split for split in splits if split not in made["splits"]]:
        yield f"{dataset} has no proposals of {', '.join(lacking)}: set proposals.splits and {run}"


def splits_of(asked: Asked, name: DatasetName, store: ShardStore) -> list[str]:
    """Give the splits that were asked for. Raises DataError for one that the dataset, or its shards, do not have."""
    for split in asked.splits:
        name.check_split(split)
        store.refs_of(split)
    return list(dict.fromkeys(asked.splits))


def write(
    asked: Asked,
    model: System,
    described: Description,
    store: ShardStore,
    protocols: Sequence[Protocol],
    metrics: Plain,
    tables: Mapping[str, pa.Table],
    params: EvaluateParams,
) -> None:
    """Write an outcome, and with --predictions the masks; tables are by `<protocol>/<split>`.

    Says on stderr which splits have expressions that the model does not read to their end.
    """
    assert asked.out is not None
    info = described.info
    who: Plain = {"place": asked.model, "system": described.system, "weights_sha256": described.weights_sha256}
    of_data: Plain = {"dataset": asked.dataset, "data_digest": files.file_sha256(store.folder / MANIFEST)}
    lost = {job: cut(model, info, table) for job, table in tables.items()}
    about: Plain = {
        "name": described.system,
        "trained_on": info.dataset,
        **of_data,
        "model": {**who, "run": info.run},
        "cut_expressions": lost,
        "evaluate": {key: getattr(params, key) for key in ("bootstrap_samples", "precision", "seed")},
    }
    with files.replaced_folder(asked.out) as folder:
        rows = {_file(job): table.select(TABLE_SCHEMA.names) for job, table in tables.items()}
        outcome.write(folder, about, metrics, {protocol: {} for protocol in protocols}, rows)
        for job, table in tables.items() if asked.predictions else ():
            name, _, split = job.partition("/")
            told = {"description": "masks of referring expressions", **of_data, "split": split, "model": who}
            entries = _entries(table, store, PROTOCOLS[name])
            write_predictions(folder / PREDICTIONS / f"{_file(job)}.json", told, PROTOCOLS[name], entries)
    for job, count in lost.items():
        if count:
            most = info.word_len or model.context_length
            told_of = f"{count} of {len(tables[job])} expressions have more than {most} tokens"
            print(f"{job}: {told_of}, and the model reads no further", file=sys.stderr)


def _file(job: str) -> str:
    return job.replace("/", "-")


def _entries(table: pa.Table, store: ShardStore, protocol: Protocol) -> Iterator[Plain]:
    """Give the entries of a file of predictions, of a table with the column COUNTS."""
    places = store.places()
    for row in table.to_pylist():
        image = store.row(places[row["image_id"]])
        ann_id = next(ref["ann_id"] for ref in image["refs"] if ref["ref_id"] == row["ref_id"])
        side = protocol.resolution
        size = (image["height"], image["width"]) if isinstance(side, str) else (side, side)
        yield entry_of(row, ann_id, size, row[COUNTS])


def cut(model: System, info: ModelInfo, table: pa.Table) -> int:
    """Count the expressions of a table whose end a model does not read."""
    most = info.word_len or model.context_length
    return sum(model.count_tokens(text) > most for text in table["text"].to_pylist())
