"""Stage `evaluate`: scores at original resolution, a pool of Ray Data actors each holding the model.

python -m pipelines.evaluate --system cris --dataset shapes
"""

from __future__ import annotations

from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipelines import cluster, files, gallery, paths
from pipelines.scores import BEST, LOCATED, ORACLE, SHUFFLED, headline, rounded, short, sorted_splits, summary
from pipelines.stage import run

if TYPE_CHECKING:
    import pyarrow as pa

    from ris_core.config import EvaluateParams, Params
    from ris_core.evaluation.answers import Answerer
    from ris_core.evaluation.metrics import Protocol
    from ris_core.evaluation.queries import Query

BEHAVIOUR_IMAGES = 40
PIECE = 400  # expressions per task: seconds of work, so that actors stay evenly busy


def main(
    system: Annotated[str, typer.Option(help="a system of ris_core/models")],
    dataset: Annotated[str, typer.Option(help="a preprocessed dataset")],
) -> None:
    """Score a trained model: every expression once, named protocols, baselines, confidence intervals."""
    import pyarrow.parquet as pq

    from pipelines.stage import check_names, params
    from ris_core.data.dataset import ShardStore
    from ris_core.evaluation.metrics import PROTOCOLS
    from ris_core.models.systems import load_model

    name = check_names(dataset, system)
    chosen = params()
    for split in (*(chosen.evaluate.splits or ()), chosen.evaluate.shuffled_split):
        if split is not None:
            name.check_split(split)
    store = ShardStore(paths.shards(dataset))
    splits = chosen.evaluate.splits or sorted_splits(store.manifest["splits"])
    protocols = [PROTOCOLS[each] for each in chosen.evaluate.protocols]
    model: Any
    model, info = load_model(paths.model(system, dataset))  # a bad one is told before any actor starts
    check_fit(info, store, system, dataset)
    wanted = jobs(protocols, splits, chosen.evaluate, model)
    tables = score(chosen, system, dataset, wanted)

    metrics: dict[str, Any] = {}
    with files.replaced_folder(paths.expressions(system, dataset)) as folder:
        for protocol in protocols:
            for split in splits:
                job = f"{protocol.name}/{split}"
                part = summary(tables[job], protocol, chosen.evaluate)
                if f"{job}/{BEST}" in tables:
                    part[BEST] = short(tables[f"{job}/{BEST}"], protocol)
                metrics.setdefault(protocol.name, {})[split] = part
                pq.write_table(tables[job], folder / f"{protocol.name}-{split}.parquet")
    for control in (*SHUFFLED, LOCATED, ORACLE):
        if control in tables and tables[control].num_rows:  # none where no image has two referents in this split
            metrics[protocols[0].name][chosen.evaluate.shuffled_split][control] = short(tables[control], protocols[0])
    out = paths.evaluation(system, dataset)
    files.write_json(out / "protocols.json", {p.name: asdict(p) for p in protocols})
    first = f"{protocols[0].name}/{splits[0]}"
    with files.replaced_folder(out / "gallery") as folder:
        rows = gallery.choose(tables[first])
        threshold = protocols[0].threshold
        shown = gallery.draw(rows, paths.model(system, dataset), threshold, store, paths.raw(dataset), folder)
        files.write_json(folder / "gallery.json", rounded(shown))
    behave(system, dataset, store, splits[0], protocols[0], chosen.evaluate.seed)
    if "proposals" in info:
        files.write_json(out / "setting.json", {"proposals": info["proposals"], **model.facts()})
    files.write_json(out / "metrics.json", metrics)  # last: where it lies, all of them do
    for protocol in protocols:
        for split in splits:
            typer.echo(headline(protocol.name, split, metrics[protocol.name][split]))


def check_fit(info: dict[str, Any], store: Any, system: str, dataset: str) -> None:
    """Raise WeightsError if a model is for images of another size, or for other proposals than were made."""
    from ris_core.data.proposal_store import ProposalStore
    from ris_core.errors import WeightsError

    model = paths.model(system, dataset)
    if info["image_size"] != store.image_size:
        sizes = f"is for images of {info['image_size']} pixels, the shards hold {store.image_size}"
        raise WeightsError(f"{model} {sizes}: train again on these shards, or preprocess for this model")
    if "proposals" in info:
        made = ProposalStore(paths.proposals(dataset)).manifest
        if made["options"] != info["proposals"] or made["data_digest"] != info["data_digest"]:
            raise WeightsError(
                f"{model} and {paths.proposals(dataset)} were made with other options, or of other data: run the stages "
                "propose, initialise and train again"
            )


def behave(system: str, dataset: str, store: Any, split: str, protocol: Protocol, seed: int) -> None:
    """Write what behavioural tests find, and what an answer costs; see ris_core/evaluation/{behaviour,cost}.py."""
    from ris_core.data.shards import load_image
    from ris_core.evaluation.behaviour import behaviour
    from ris_core.evaluation.cost import cost
    from ris_core.evaluation.queries import queries_of
    from ris_core.predictor import RISPredictor

    out = paths.evaluation(system, dataset)
    predictor = RISPredictor.from_folder(paths.model(system, dataset), threshold=protocol.threshold)
    found = behaviour(predictor, store, paths.raw(dataset), split, BEHAVIOUR_IMAGES, seed)
    files.write_json(out / "behaviour.json", rounded(found))
    image = int(store.images_of(split)[0])
    texts = [query.text for query in queries_of(store, split, protocol, [image])]
    rgb = load_image(paths.raw(dataset) / store.row(image)["file_name"])
    files.write_json(out / "cost.json", rounded(cost(predictor, rgb, texts)))


def jobs(protocols: list[Protocol], splits: list[str], params: EvaluateParams, model: Any) -> list[dict[str, Any]]:
    """What is to be scored: each protocol on each split, and the controls under the first protocol."""
    from ris_core.models.systems import locates

    on_proposals = not getattr(model, "trains", True)
    found = [
        {"job": job, "protocol": protocol.name, "split": split, "seed": params.seed}
        for protocol in protocols
        for split in splits
        for job in (f"{protocol.name}/{split}", *([f"{protocol.name}/{split}/{BEST}"] if on_proposals else []))
    ]
    if params.shuffled_split in splits:
        common = {"protocol": protocols[0].name, "split": params.shuffled_split, "seed": params.seed}
        names = (*SHUFFLED, *([LOCATED] if locates(model) else []), *([ORACLE] if on_proposals else []))
        found += [{"job": control, **common} for control in names]
    return found


def score(params: Params, system: str, dataset: str, wanted: list[dict[str, Any]]) -> dict[str, pa.Table]:
    """Per-expression tables (evaluator.TABLE_SCHEMA), one per job, rows in the order of the data.

    Raises ClusterError if a GPU is wanted and the cluster has none.
    """
    from ris_core.data.dataset import ShardStore

    store = ShardStore(paths.shards(dataset))
    pieces = []
    for job in wanted:
        count = len(job_queries(store, job))
        pieces += [{**job, "first": first, "last": min(first + PIECE, count)} for first in range(0, count, PIECE)]
    with cluster.connected():
        import pyarrow.compute as pc

        use_gpu = cluster.has_gpu(params.cluster.use_gpu)
        cluster.check_resources(1, 1, int(use_gpu))
        places = {
            name: str(place.absolute())
            for name, place in {
                "model": paths.model(system, dataset),
                "shards": paths.shards(dataset),
                "photos": paths.raw(dataset),
                "proposals": paths.proposals(dataset),
            }.items()
        }
        data = cluster.data()
        actors = max(1, params.cluster.evaluate_actors // cluster.at_once())
        rows = data.from_items(pieces, override_num_blocks=len(pieces)).map_batches(
            Scorer,
            fn_constructor_args=(places, params.evaluate.images_per_batch, use_gpu),
            batch_size=1,
            batch_format="pyarrow",
            compute=data.ActorPoolStrategy(size=min(actors, len(pieces))),
            num_cpus=1,
            num_gpus=1 if use_gpu else 0,
        )
        table = cluster.collect(rows).sort_by("position")
    names = [job["job"] for job in wanted]
    return {name: table.filter(pc.equal(table["job"], name)).drop_columns(["job", "position"]) for name in names}


def job_queries(store: Any, job: dict[str, Any]) -> list[Query]:
    """All expressions of a job, grouped by image; a control's sentences are exchanged among referents."""
    from ris_core.evaluation.metrics import PROTOCOLS
    from ris_core.evaluation.queries import queries_of, shuffled, swapped

    queries = queries_of(store, job["split"], PROTOCOLS[job["protocol"]])
    control = {"shuffled_in_image": swapped, "shuffled_across": shuffled}.get(job["job"])
    return control(queries, job["seed"]) if control else queries


class Scorer:
    """A Ray Data actor: the model and the shards are opened once, then pieces of jobs come in, one at a time."""

    def __init__(self, places: dict[str, str], images_per_batch: int, use_gpu: bool):
        from ris_core.data.dataset import ShardStore
        from ris_core.data.proposal_store import ProposalStore
        from ris_core.evaluation.answers import ProposalAnswers
        from ris_core.models.systems import load_model

        self.model, self.info = load_model(places["model"], "cuda" if use_gpu else "cpu")
        self.store = ShardStore(places["shards"])
        self.proposals = ProposalStore(places["proposals"]) if "proposals" in self.info else None
        photos, self.images_per_batch = Path(places["photos"]), images_per_batch
        self.choosing = {
            oracle: ProposalAnswers(self.model, photos, None if oracle else self.proposals) for oracle in (False, True)
        }
        self.queries = lru_cache(8)(lambda job: job_queries(self.store, dict(job)))

    def __call__(self, batch: pa.Table) -> pa.Table:
        import pyarrow as pa

        from ris_core.evaluation.evaluator import evaluate
        from ris_core.evaluation.metrics import PROTOCOLS

        (piece,) = batch.to_pylist()
        first, last = piece.pop("first"), piece.pop("last")
        table = evaluate(
            self.answerer(piece["job"]),
            self.store,
            self.queries(tuple(sorted(piece.items())))[first:last],
            PROTOCOLS[piece["protocol"]],
            split=piece["split"],
            images_per_batch=self.images_per_batch,
        )
        table = table.append_column("job", pa.array([piece["job"]] * len(table), pa.string()))
        return table.append_column("position", pa.array(range(first, last), pa.int64()))

    def answerer(self, job: str) -> Answerer:
        """Whose answers a job is about."""
        from ris_core.evaluation.answers import BestProposals, MapAnswers

        if self.proposals is None:
            return MapAnswers(self.model, self.info["word_len"], "locate" if job == LOCATED else "segment")
        if job.endswith(BEST):
            return BestProposals(self.proposals)
        return self.choosing[job == ORACLE]


if __name__ == "__main__":
    run(main)
