"""Stage `evaluate`: scores at original resolution, a pool of Ray Data actors each holding the model.

python -m pipelines.evaluate --system cris --dataset shapes

By hand it scores any model on any dataset, into a folder of its own:

python -m pipelines.evaluate --model models:/ris-cris-shapes@champion --dataset shapesg --out scores/cris-shapesg
"""

from __future__ import annotations

import sys
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import Annotated

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import typer

from pipelines import by_hand, cluster, gallery, paths
from pipelines.params import Params
from pipelines.predict import model_folder
from pipelines.scores import BEST, LOCATED, ORACLE, SHUFFLED, headline, rounded, sorted_splits, summaries
from pipelines.stage import check_names, params, run
from pipelines.transport import Place, Road
from ris_core import files
from ris_core.data.dataset import ShardStore
from ris_core.data.images import load_image
from ris_core.data.proposal_store import ProposalStore
from ris_core.device import best_device
from ris_core.errors import DataError, WeightsError
from ris_core.evaluation.answers import Answerer, BestProposals, MapAnswers, ProposalAnswers
from ris_core.evaluation.behaviour import behaviour
from ris_core.evaluation.cost import cost
from ris_core.evaluation.evaluator import Job, evaluate_all
from ris_core.evaluation.metrics import PROTOCOLS, Protocol, suited
from ris_core.evaluation.params import EvaluateParams
from ris_core.evaluation.queries import Query, batched, queries_of, shuffled, swapped
from ris_core.models.answer import Reading
from ris_core.models.contract import MapSystem, ProposalSystem, System
from ris_core.models.registry import ModelInfo, load_model, trains
from ris_core.options import Plain
from ris_core.predictor import RISPredictor

BEHAVIOUR_IMAGES = 40
PIECE = 400  # expressions of all jobs per task: seconds of work, so that actors stay evenly busy


def main(
    system: Annotated[str | None, typer.Option(help="a system of ris_core/models, trained on this dataset")] = None,
    dataset: Annotated[str | None, typer.Option(help="a preprocessed dataset")] = None,
    model: Annotated[
        str | None, typer.Option(help="in place of --system: a model folder, models:/name@alias or runs:/id/name")
    ] = None,
    split: Annotated[
        list[str] | None, typer.Option(help="with --model: a split; all but train, if none is given")
    ] = None,
    protocol: Annotated[
        list[str] | None, typer.Option(help="with --model: a protocol; those of params.yaml, if none")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="with --model: a new folder for all that is found")] = None,
    predictions: Annotated[
        bool, typer.Option(help="with --model: write the masks, too, as `ris score` reads them")
    ] = False,
) -> None:
    """Score a trained model: every expression once, named protocols, baselines, confidence intervals."""
    asked = by_hand.Asked(system, dataset, model, tuple(split or ()), tuple(protocol or ()), out, predictions)
    asked.check()
    if asked.system is not None and asked.dataset is not None:
        stage(asked.system, asked.dataset)
    else:
        elsewhere(asked)


def stage(system: str, dataset: str) -> None:
    """Score the model that was trained on a dataset, and write what DVC keeps of it."""
    name = check_names(dataset, system)
    chosen = params("evaluate")
    for split in (*(chosen.evaluate.splits or ()), chosen.evaluate.shuffled_split):
        if split is not None:
            name.check_split(split)
    store = ShardStore(paths.shards(dataset))
    store.verify()
    splits = chosen.evaluate.splits or sorted_splits(store.manifest["splits"])
    protocols = suited(chosen.evaluate.protocols, store.is_generalised)
    folder = paths.model(system, dataset)
    model, described = load_model(folder)  # a bad one is told before any actor starts
    check_fit(described.info, store, folder, dataset)
    wanted = jobs(protocols, splits, chosen.evaluate, model)
    tables = score(chosen, system, folder, dataset, wanted)

    metrics = summaries(tables, protocols, splits, chosen.evaluate)
    with files.replaced_folder(paths.expressions(system, dataset)) as answers:
        for protocol in protocols:
            for split in splits:
                pq.write_table(tables[f"{protocol.name}/{split}"], answers / f"{protocol.name}-{split}.parquet")
    out = paths.evaluation(system, dataset)
    files.write_json(out / "protocols.json", {p.name: asdict(p) for p in protocols})
    first = f"{protocols[0].name}/{splits[0]}"
    with files.replaced_folder(out / "gallery") as pictures:
        rows = gallery.choose(tables[first], protocols[0].empty_union)
        predictor = predictor_of(chosen, folder, protocols[0].reading)
        shown = gallery.draw(rows, predictor, store, paths.raw(dataset), pictures)
        files.write_json(pictures / "gallery.json", rounded(shown))
    behave(chosen, folder, dataset, store, splits[0], protocols[0], out)
    if isinstance(model, ProposalSystem):
        files.write_json(out / "setting.json", {"proposals": described.info.proposals, **model.facts()})
    files.write_json(out / "metrics.json", metrics)  # last: where it lies, all of them do
    tell(metrics)


def elsewhere(asked: by_hand.Asked) -> None:
    """Score any model on any dataset, into a folder of its own."""
    assert asked.dataset is not None  # as `check` saw
    assert asked.model is not None
    name, chosen = check_names(asked.dataset), params("evaluate")
    store = ShardStore(paths.shards(asked.dataset))
    splits = by_hand.splits_of(asked, name, store) or sorted_splits(store.manifest["splits"])
    protocols = [PROTOCOLS[each] for each in asked.protocols] or suited(chosen.evaluate.protocols, store.is_generalised)
    folder = model_folder(asked.model)
    model, described = load_model(folder)
    by_hand.check_fit(model, described.info, asked.model, store, asked.dataset, splits)
    store.verify()
    wanted = jobs(protocols, splits, chosen.evaluate, model)
    tables = score(chosen, described.system, folder, asked.dataset, wanted, keep_masks=asked.predictions)
    metrics = summaries(tables, protocols, splits, chosen.evaluate)
    scored = {job: tables[job] for job in (f"{p.name}/{split}" for p in protocols for split in splits)}
    by_hand.write(asked, model, described, store, protocols, metrics, scored, chosen.evaluate)
    tell(metrics)


def tell(metrics: Plain) -> None:
    """Print a line for each protocol and split."""
    for protocol, parts in metrics.items():
        for split, part in parts.items():
            typer.echo(headline(protocol, split, part))


def check_fit(info: ModelInfo, store: ShardStore, model: Path, dataset: str) -> None:
    """Raise WeightsError if the model of a folder is for images of another size, or for other proposals than were made."""
    if info.image_size != store.image_size:
        sizes = f"is for images of {info.image_size} pixels, the shards hold {store.image_size}"
        raise WeightsError(f"{model} {sizes}: train again on these shards, or preprocess for this model")
    if info.proposals is None and info.word_len is None:
        raise WeightsError(f"{model} is what a training starts from: run the stage train")
    if info.proposals is not None:
        made = ProposalStore(paths.proposals(dataset)).manifest
        if made["options"] != info.proposals or made["data_digest"] != info.data_digest:
            raise WeightsError(
                f"{model} and {paths.proposals(dataset)} were made with other options, or of other data: run the stages "
                "propose, initialise and train again"
            )


def predictor_of(params: Params, folder: Path, reading: Reading) -> RISPredictor:
    """Load a model to answer in this process as it was scored."""
    device, precision = cluster.device(params.cluster.use_gpu), params.evaluate.precision
    return RISPredictor.from_folder(folder, device, reading=reading, precision=precision)


def behave(
    params: Params, folder: Path, dataset: str, store: ShardStore, split: str, protocol: Protocol, out: Path
) -> None:
    """Write what behavioural tests find, and what an answer costs; see ris_core/evaluation/{behaviour,cost}.py."""
    predictor = predictor_of(params, folder, replace(protocol.reading, resolution="original"))
    found = behaviour(predictor, store, paths.raw(dataset), split, BEHAVIOUR_IMAGES, params.evaluate.seed)
    files.write_json(out / "behaviour.json", rounded(found))
    image = int(store.images_of(split)[0])
    texts = [query.text for query in queries_of(store, split, protocol, [image])]
    rgb = load_image(paths.raw(dataset) / store.row(image)["file_name"])
    files.write_json(out / "cost.json", rounded(cost(predictor, rgb, texts)))


def jobs(protocols: list[Protocol], splits: list[str], params: EvaluateParams, model: System) -> list[Plain]:
    """List what is to be scored: each protocol on each split, and the controls under the first protocol."""
    on_proposals = isinstance(model, ProposalSystem)
    locates = isinstance(model, MapSystem) and model.locates
    found = [
        {"job": job, "protocol": protocol.name, "split": split, "seed": params.seed}
        for protocol in protocols
        for split in splits
        for job in (f"{protocol.name}/{split}", *([f"{protocol.name}/{split}/{BEST}"] if on_proposals else []))
    ]
    if params.shuffled_split in splits:
        common = {"protocol": protocols[0].name, "split": params.shuffled_split, "seed": params.seed}
        names = (*SHUFFLED, *([LOCATED] if locates else []), *([ORACLE] if on_proposals else []))
        found += [{"job": control, **common} for control in names]
    return found


def score(
    params: Params, system: str, folder: Path, dataset: str, wanted: list[Plain], *, keep_masks: bool = False
) -> dict[str, pa.Table]:
    """Make per-expression tables (evaluator.TABLE_SCHEMA) of a model, one per job, rows in the order of the data.

    Jobs on the same split share what is computed of an image. With `keep_masks` tables have the answers' masks, too, as
    run lengths in the column COUNTS.
    Raises ClusterError if a GPU is wanted and the cluster has none.
    """
    store = ShardStore(paths.shards(dataset))
    for job in wanted:
        if job["job"] in SHUFFLED and not job_queries(store, job):
            why = f"{job['split']} has too few referents to exchange their sentences"
            print(f"the control {job['job']} is left out: {why}", file=sys.stderr)
    tasks = list(pieces(store, wanted))
    with cluster.connected():
        use_gpu = cluster.has_gpu(params.cluster.use_gpu)
        cluster.check_resources(1, 1, int(use_gpu))
        road = Road.find()
        places = {
            "model": road.offer(folder),
            "shards": road.offer(paths.shards(dataset)),
        }
        if not trains(system):
            places["proposals"] = road.offer(paths.proposals(dataset))
            photos = {
                store.row(image)["file_name"] for job in wanted for image in store.images_of(job["split"]).tolist()
            }
            places["photos"] = road.offer(paths.raw(dataset), photos)
        data = cluster.data()
        actors = cluster.held(params.cluster.evaluate_actors, 1, int(use_gpu))
        rows = data.from_items(tasks, override_num_blocks=len(tasks)).map_batches(
            Scorer,
            fn_constructor_args=(places, params.evaluate.expressions_per_batch, params.evaluate.precision, keep_masks),
            batch_size=1,
            batch_format="pyarrow",
            compute=data.ActorPoolStrategy(size=min(actors, len(tasks))),
            num_cpus=1,
            num_gpus=1 if use_gpu else 0,
        )
        table = cluster.collect(rows).sort_by("position")
    names = [job["job"] for job in wanted]
    return {name: table.filter(pc.equal(table["job"], name)).drop_columns(["job", "position"]) for name in names}


def job_queries(store: ShardStore, job: Plain) -> list[Query]:
    """Give all expressions of a job, grouped by image; a control's sentences are exchanged among referents."""
    queries = queries_of(store, job["split"], PROTOCOLS[job["protocol"]])
    control = {"shuffled_in_image": swapped, "shuffled_across": _shuffled}.get(job["job"])
    return control(queries, job["seed"]) if control else queries


def _shuffled(queries: list[Query], seed: int) -> list[Query]:
    """Give `shuffled`, or nothing where that cannot be done: then there is no such control."""
    try:
        return shuffled(queries, seed)
    except DataError:
        return []


def answerer_of(job: Plain) -> str:
    """Name who is asked: BEST, LOCATED or ORACLE, by the end of a job's name; "" for all others."""
    end = job["job"].rsplit("/")[-1]
    return end if end in (BEST, LOCATED, ORACLE) else ""


def pieces(store: ShardStore, wanted: list[Plain]) -> Iterator[Plain]:
    """Cut jobs into tasks, each of them all jobs of one answerer on some images of a split."""
    together: dict[tuple[str, str], list[Plain]] = {}
    for job in wanted:
        together.setdefault((job["split"], answerer_of(job)), []).append(job)
    for jobs in together.values():
        counts = Counter(query.image for job in jobs for query in job_queries(store, job))
        for images in batched(dict(sorted(counts.items())), PIECE):
            yield {"jobs": jobs, "first": images[0], "last": images[-1]}


class Scorer:
    """A Ray Data actor: the model and the shards are opened once, then pieces of jobs come in, one at a time."""

    def __init__(self, places: dict[str, Place], expressions_per_batch: int, precision: str, keep_masks: bool = False):
        here = {name: place.local() for name, place in places.items()}
        model, described = load_model(here["model"], best_device())  # Ray shows it the GPU that it has, if any
        self.store = ShardStore(here["shards"])
        self.expressions_per_batch, self.keep_masks = expressions_per_batch, keep_masks
        self.answerers: dict[str, Answerer]  # by `answerer_of`
        if isinstance(model, MapSystem):
            assert described.info.word_len is not None  # it is trained
            word_len = described.info.word_len
            self.answerers = {
                "": MapAnswers(model, word_len, "segment", precision, expressions_per_batch),
                LOCATED: MapAnswers(model, word_len, "locate", precision, expressions_per_batch),
            }
        else:
            assert isinstance(model, ProposalSystem)
            proposals, photos = ProposalStore(here["proposals"]), here["photos"]
            self.answerers = {
                "": ProposalAnswers(model, photos, proposals),
                BEST: BestProposals(proposals),
                ORACLE: ProposalAnswers(model, photos),
            }
        self.queries = lru_cache(None)(lambda job: job_queries(self.store, dict(job)))

    def __call__(self, batch: pa.Table) -> pa.Table:
        (piece,) = batch.to_pylist()
        starts, asked = {}, []
        for job in piece["jobs"]:
            queries = self.queries(tuple(sorted(job.items())))
            starts[job["job"]] = bisect_left(queries, piece["first"], key=lambda query: query.image)
            end = bisect_right(queries, piece["last"], key=lambda query: query.image)
            some = queries[starts[job["job"]] : end]
            asked.append(Job(job["job"], PROTOCOLS[job["protocol"]], job["split"], some))
        tables = evaluate_all(
            self.answerers[answerer_of(piece["jobs"][0])],
            self.store,
            asked,
            expressions_per_batch=self.expressions_per_batch,
            with_counts=self.keep_masks,
        )
        found = []
        for name, table in tables.items():
            positions = np.arange(len(table)) + starts[name]
            table = table.append_column("job", pa.array([name] * len(table), pa.string()))
            found.append(table.append_column("position", pa.array(positions, pa.int64())))
        return pa.concat_tables(found)


if __name__ == "__main__":
    run(main)
