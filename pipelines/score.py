"""`ris score`: somebody's finished masks, a file of predictions, under every protocol, as an evaluation here scores its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import pyarrow as pa
import typer

from pipelines import outcome, paths
from pipelines.paired import ANSWER, EXPRESSION, headlines, joined, pairs
from pipelines.params import dataset_name, load_params
from pipelines.scores import SHUFFLED, counted, headline, rounded, short, summary
from ris_core import files
from ris_core.data.dataset import ShardStore
from ris_core.data.shards import MANIFEST
from ris_core.errors import ConfigError, DataError, list_problems
from ris_core.evaluation.finished import swapped_table, tables
from ris_core.evaluation.matching import Predictions, read
from ris_core.evaluation.metrics import PROTOCOLS, Protocol
from ris_core.evaluation.params import EvaluateParams
from ris_core.evaluation.predictions import Header
from ris_core.options import Plain

COMPARISON = "comparison.json"
IN_IMAGE = SHUFFLED[0]


def main(
    predictions: Annotated[Path, typer.Argument(help="a file of predictions; docs/comparing.md tells its form")],
    dataset: Annotated[str, typer.Option(help="a preprocessed dataset")],
    split: Annotated[str, typer.Option(help="whose expressions it answers")],
    against: Annotated[Path | None, typer.Option(help="another file of predictions to compare with")] = None,
    missing: Annotated[str, typer.Option(help="expressions without a prediction: an error, or zero")] = "error",
    out: Annotated[Path | None, typer.Option(help="a new folder for scores and the table of expressions")] = None,
    name: Annotated[str | None, typer.Option(help="what tables call the system; by default the file's name")] = None,
) -> None:
    """Score somebody's predicted masks under every protocol; with --against, test two of them against each other."""
    dataset_name(dataset).check_split(split)
    given = [file for file in (predictions, against) if file is not None]
    check(given, missing, out)
    params = load_params(paths.PARAMS).evaluate
    store = ShardStore(paths.shards(dataset))
    store.refs_of(split)
    store.verify()
    found = [
        Scored.of(file, each, store, split, params) for file, each in read_all(given, store, dataset, split, missing)
    ]
    for each in found:
        for line in each.lines(split):
            typer.echo(line)
    tested = compared(found, dataset, split, params) if against is not None else {}
    for protocol, part in tested.items():
        for line in headlines(part["splits"]):
            typer.echo(f"{protocol:12s} {line}")
    if out is not None:
        digest = files.file_sha256(store.folder / MANIFEST)
        about: Plain = {"name": name or predictions.stem, "dataset": dataset, "data_digest": digest}
        write(out, about, found[0], params, tested)


def check(given: list[Path], missing: str, out: Path | None) -> None:
    """Raise ConfigError, with all that is wrong, for options that cannot be followed."""
    problems = []
    if missing not in ("error", "zero"):
        problems.append(f"--missing {missing}: use error, or zero to count them as answered with an empty mask")
    problems += [f"{file}: no such file" for file in given if not file.is_file()]
    if len({file.resolve() for file in given}) < len(given):
        problems.append(f"--against {given[1]} is the file itself: give another")
    if out is not None and (problem := outcome.problem_of_place(out)):
        problems.append(problem)
    if problems:
        raise ConfigError(list_problems("nothing was scored", problems))


def read_all(
    given: list[Path], store: ShardStore, dataset: str, split: str, missing: str
) -> list[tuple[Path, Predictions]]:
    """Read files of predictions. Raises DataError with what is wrong with any of them."""
    found, wrong = [], []
    for file in given:
        try:
            found.append((file, read(file, store, dataset, split, missing_as_empty=missing == "zero")))
        except DataError as error:
            wrong.append(str(error))
    if wrong:
        raise DataError("\n".join(wrong))
    return found


class Scored:
    """A file's scores under the protocols that its masks can be scored under, and why not under the others."""

    def __init__(
        self, file: Path, given: Predictions, scored: Mapping[str, pa.Table], metrics: Plain, refused: Mapping[str, str]
    ):
        self.file, self.given, self.tables, self.metrics, self.refused = file, given, scored, metrics, refused

    @classmethod
    def of(cls, file: Path, given: Predictions, store: ShardStore, split: str, params: EvaluateParams) -> Scored:
        """Score a file that was read."""
        header = given.header
        refused = {name: why for name, each in PROTOCOLS.items() if (why := unscored(each, given))}
        # on generalised data one made for it decides, see `suited`
        ordered = sorted(PROTOCOLS.values(), key=lambda each: not (store.is_generalised and each.is_generalised))
        protocols = [protocol for protocol in ordered if protocol.name not in refused]
        found = tables(given.given, store, split, protocols, header.side, f"scoring {file.name}")
        metrics = {p.name: {split: summary(found[p.name], p, params)} for p in protocols}
        if protocols:
            control = swapped_table(given.given, store, split, protocols[0], params.seed, header.side)
            if control.num_rows:  # none where no image has two referents in this split
                metrics[protocols[0].name][split][IN_IMAGE] = short(control, protocols[0])
        return cls(file, given, found, metrics, refused)

    def lines(self, split: str) -> list[str]:
        """Give what is printed of it."""
        given = self.given
        told = [f"{self.file}: {len(given.given)} expressions of {split}"]
        if given.missing:
            told.append(f"  {given.missing} of them are missing and count as empty masks")
        for other, count in given.elsewhere.items():
            told.append(f"  {count} predictions are of split {other} and left out")
        for name, parts in self.metrics.items():
            told.append(headline(name, split, parts[split]))
            if parts_not_applied := not_applied(PROTOCOLS[name], given.header):
                told.append(f"{'':9s} not applied, as masks are finished: {'; '.join(parts_not_applied)}")
        told += [f"{name:9s} not scored: {why}" for name, why in self.refused.items()]
        for name in list(self.metrics)[:1]:
            told.append(f"by kind of expression, {name}:")
            for kind, part in self.metrics[name][split]["by_kind"].items():
                told.append(f"  {kind:9s} {part['count']:6d}  mIoU {part['mIoU']:.3f}  oIoU {part['oIoU']:.3f}")
        return told


def unscored(protocol: Protocol, given: Predictions) -> str | None:
    """Tell why masks cannot be scored under a protocol, if they cannot."""
    header = given.header
    if header.only_first and protocol.sentences != "first":
        return "the file has the first sentence of each referent only"
    if header.side is not None and protocol.resolution != header.side:
        return f"masks are {header.side}x{header.side}, and it compares at their images' sizes"
    if protocol.skip_unanswered and all(each.counts is None for each in given.given.values()):
        return "no expression had anything to choose from"
    return None


def not_applied(protocol: Protocol, header: Header) -> list[str]:
    """List what a protocol says of the way to a mask that cannot be, or is not known to be, so of finished ones.

    Sentences, ground truth, comparison of IoUs and resolution are applied to any.
    """
    told = header.protocol
    parts = [
        f"{name} {getattr(protocol, name)}" + (f" (they have {told[name]})" if name in told else "")
        for name in ("threshold", "upsampling", "text")
        if told.get(name) != getattr(protocol, name)
    ]
    if protocol.resolution != "original" and header.side is None:
        parts.append(f"resizing of the map to {protocol.resolution} before its threshold (the masks are resized)")
    return parts


def compared(found: list[Scored], dataset: str, split: str, params: EvaluateParams) -> Plain:
    """Test two files' answers to the same expressions, under each protocol that both have scores of."""
    result: Plain = {}
    for name in (name for name in found[0].tables if name in found[1].tables):
        protocol = PROTOCOLS[name]
        rows = {str(each.file): counted(each.tables[name], protocol).select(EXPRESSION + ANSWER) for each in found}
        table = joined(rows, f"{dataset} {split}, {name}")
        part = {"expressions": len(table), "pairs": pairs(table, list(rows), params, protocol.empty_union)}
        result[name] = {"protocol": name, "splits": {split: part}}
    return result


def write(out: Path, about: Plain, scored: Scored, params: EvaluateParams, tested: Plain) -> None:
    """Write an outcome, and what a comparison found."""
    whole: Plain = {
        **about,
        "predictions": {"file": str(scored.file), "sha256": files.file_sha256(scored.file)},
        "missing": scored.given.missing,
        "not_scored": dict(scored.refused),
        "evaluate": {key: getattr(params, key) for key in ("bootstrap_samples", "seed")},
    }
    protocols = {
        PROTOCOLS[name]: {"not_applied": not_applied(PROTOCOLS[name], scored.given.header)} for name in scored.metrics
    }
    named = {f"{name}-{split}": scored.tables[name] for name, parts in scored.metrics.items() for split in parts}
    with files.replaced_folder(out) as folder:
        outcome.write(folder, whole, scored.metrics, protocols, named)
        if tested:
            files.write_json(folder / COMPARISON, rounded(tested))


if __name__ == "__main__":
    from pipelines.stage import run

    run(main)
