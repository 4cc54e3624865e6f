"""Stage `evaluate`: scores at original resolution, a pool of Ray Data actors each holding the model.

python -m pipelines.evaluate --system cris --dataset shapes
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipelines import cluster, files, gallery, paths
from pipelines.stage import run

if TYPE_CHECKING:
    import pyarrow as pa

    from ris_core.config import EvaluateParams, Params
    from ris_core.evaluation.evaluator import Query
    from ris_core.evaluation.metrics import Protocol

CONTROLS = ("shuffled_in_image", "shuffled_across")  # sentences exchanged within an image, and over the whole split
LOCATED = "located"  # the coarse map of a system that has one, scored as if it were the mask
PIECE = 400  # expressions per task: seconds of work, so that actors stay evenly busy


def main(
    system: Annotated[str, typer.Option(help="cris, risclip, lts")],
    dataset: Annotated[str, typer.Option(help="a preprocessed dataset")],
) -> None:
    """Score a trained model: every expression once, named protocols, baselines, confidence intervals."""
    import pyarrow.parquet as pq

    from pipelines.stage import check_names, params
    from ris_core.data.dataset import ShardStore
    from ris_core.evaluation.metrics import PROTOCOLS
    from ris_core.models.systems import load_model, locates

    name = check_names(dataset, system)
    chosen = params()
    for split in (*(chosen.evaluate.splits or ()), chosen.evaluate.shuffled_split):
        if split is not None:
            name.check_split(split)
    store = ShardStore(paths.shards(dataset))
    splits = chosen.evaluate.splits or sorted_splits(store.manifest["splits"])
    protocols = [PROTOCOLS[each] for each in chosen.evaluate.protocols]
    model, _ = load_model(paths.model(system, dataset))
    wanted = jobs(protocols, splits, chosen.evaluate, locates(model))
    tables = score(chosen, paths.model(system, dataset), paths.shards(dataset), wanted)

    metrics: dict[str, Any] = {}
    with files.replaced_folder(paths.expressions(system, dataset)) as folder:
        for protocol in protocols:
            for split in splits:
                table = tables[f"{protocol.name}/{split}"]
                metrics.setdefault(protocol.name, {})[split] = summary(table, protocol, chosen.evaluate)
                pq.write_table(table, folder / f"{protocol.name}-{split}.parquet")
    for control in (*CONTROLS, LOCATED):
        if control not in tables or not tables[control].num_rows:  # no image has two referents in this split
            continue
        shuffled = summary(tables[control], protocols[0], chosen.evaluate)
        part = metrics[protocols[0].name][chosen.evaluate.shuffled_split]
        part[control] = {name: shuffled[name] for name in ("mIoU", "oIoU")}
    out = paths.evaluation(system, dataset)
    files.write_json(out / "protocols.json", {p.name: asdict(p) for p in protocols})
    first = f"{protocols[0].name}/{splits[0]}"
    with files.replaced_folder(out / "gallery") as folder:
        rows = gallery.choose(tables[first])
        threshold = protocols[0].threshold
        shown = gallery.draw(rows, paths.model(system, dataset), threshold, store, paths.raw(dataset), folder)
        files.write_json(folder / "gallery.json", rounded(shown))
    files.write_json(out / "metrics.json", metrics)  # last: where it lies, all of them do
    for protocol in protocols:
        for split in splits:
            typer.echo(headline(protocol.name, split, metrics[protocol.name][split]))


def sorted_splits(known: Iterable[str]) -> list[str]:
    """All splits but train, validation first."""
    return sorted((split for split in known if split != "train"), key=lambda split: (split != "val", split))


def jobs(protocols: list[Protocol], splits: list[str], params: EvaluateParams, coarse: bool) -> list[dict[str, Any]]:
    """What is to be scored: each protocol on each split, and the controls under the first protocol."""
    found = [
        {"job": f"{protocol.name}/{split}", "protocol": protocol.name, "split": split, "seed": params.seed}
        for protocol in protocols
        for split in splits
    ]
    if params.shuffled_split in splits:
        common = {"protocol": protocols[0].name, "split": params.shuffled_split, "seed": params.seed}
        found += [{"job": control, **common} for control in (*CONTROLS, *([LOCATED] if coarse else []))]
    return found


def score(params: Params, model: Path, shards: Path, wanted: list[dict[str, Any]]) -> dict[str, pa.Table]:
    """Per-expression tables (evaluator.TABLE_SCHEMA), one per job, rows in the order of the data.

    Raises WeightsError if there is no model or it is for images of another size, ClusterError if a GPU is wanted and
    the cluster has none.
    """
    from ris_core.data.dataset import ShardStore
    from ris_core.errors import WeightsError
    from ris_core.models.systems import load_model

    store = ShardStore(shards)
    _, info = load_model(model)  # a bad one is told before any actor starts
    if info["image_size"] != store.image_size:
        sizes = f"is for images of {info['image_size']} pixels, the shards hold {store.image_size}"
        raise WeightsError(f"{model} {sizes}: train again on these shards, or preprocess for this model")
    pieces = []
    for job in wanted:
        count = len(job_queries(store, job))
        pieces += [{**job, "first": first, "last": min(first + PIECE, count)} for first in range(0, count, PIECE)]
    with cluster.connected():
        import pyarrow.compute as pc

        use_gpu = cluster.has_gpu(params.cluster.use_gpu)
        cluster.check_resources(1, 1, int(use_gpu))
        arguments = (str(model.absolute()), str(shards.absolute()), params.evaluate.images_per_batch, use_gpu)
        data = cluster.data()
        rows = data.from_items(pieces, override_num_blocks=len(pieces)).map_batches(
            Scorer,
            fn_constructor_args=arguments,
            batch_size=1,
            batch_format="pyarrow",
            compute=data.ActorPoolStrategy(size=min(params.cluster.evaluate_actors, len(pieces))),
            num_cpus=1,
            num_gpus=1 if use_gpu else 0,
        )
        table = cluster.collect(rows).sort_by("position")
    names = [job["job"] for job in wanted]
    return {name: table.filter(pc.equal(table["job"], name)).drop_columns(["job", "position"]) for name in names}


def job_queries(store: Any, job: dict[str, Any]) -> list[Query]:
    """All expressions of a job, grouped by image; a control's sentences are exchanged among referents."""
    from ris_core.evaluation.evaluator import queries_of, shuffled, swapped
    from ris_core.evaluation.metrics import PROTOCOLS

    queries = queries_of(store, job["split"], PROTOCOLS[job["protocol"]])
    control = {"shuffled_in_image": swapped, "shuffled_across": shuffled}.get(job["job"])
    return control(queries, job["seed"]) if control else queries


class Scorer:
    """A Ray Data actor: the model and the shards are opened once, then pieces of jobs come in, one at a time."""

    def __init__(self, model: str, shards: str, images_per_batch: int, use_gpu: bool):
        from ris_core.data.dataset import ShardStore
        from ris_core.models.systems import load_model

        self.model, self.info = load_model(model, "cuda" if use_gpu else "cpu")
        self.store = ShardStore(shards)
        self.images_per_batch = images_per_batch
        self.queries = lru_cache(8)(lambda job: job_queries(self.store, dict(job)))

    def __call__(self, batch: pa.Table) -> pa.Table:
        import pyarrow as pa

        from ris_core.evaluation.evaluator import evaluate
        from ris_core.evaluation.metrics import PROTOCOLS

        (piece,) = batch.to_pylist()
        first, last = piece.pop("first"), piece.pop("last")
        queries = self.queries(tuple(sorted(piece.items())))[first:last]
        table = evaluate(
            self.model,
            self.store,
            queries,
            PROTOCOLS[piece["protocol"]],
            word_len=self.info["word_len"],
            split=piece["split"],
            images_per_batch=self.images_per_batch,
            answer="locate" if piece["job"] == LOCATED else "segment",
        )
        table = table.append_column("job", pa.array([piece["job"]] * len(table), pa.string()))
        return table.append_column("position", pa.array(range(first, last), pa.int64()))


def summary(table: pa.Table, protocol: Protocol, params: EvaluateParams) -> dict[str, Any]:
    """All scores of one split: ours with intervals, the random-object baseline, and slices by kind of expression."""
    import numpy as np

    from ris_core.evaluation.metrics import bootstrap_intervals, by_group, scores

    column = {name: table[name].to_numpy() for name in table.column_names if name not in ("text", "kind", "split")}
    intersection, union = column["intersection"], column["union"]
    intervals = bootstrap_intervals(intersection, union, column["image_id"], params.bootstrap_samples, params.seed)
    return rounded(
        {
            "expressions": len(table),
            "images": len(np.unique(column["image_id"])),
            **scores(intersection, union, protocol.strict),
            **{f"{name}_95": list(interval) for name, interval in intervals.items()},
            "right_object": float(column["right_object"].mean()),
            "random_object": {
                "mIoU": float(column["random_iou"].mean()),
                "oIoU": float(column["random_intersection"].sum() / column["random_union"].sum()),
            },
            "by_kind": {
                kind: {name: part[name] for name in ("count", "mIoU", "oIoU")}
                for kind, part in by_group(table["kind"].to_pylist(), intersection, union, protocol.strict).items()
            },
        }
    )


def rounded(value: Any) -> Any:
    """Floats to five digits, so that a committed metrics file does not change with the last bit of a sum."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return round(value, 5) if isinstance(value, float) else value


def headline(protocol: str, split: str, part: dict[str, Any]) -> str:
    """One line for the terminal."""
    low, high = part["mIoU_95"]
    line = f"{protocol:9s} {split:6s} mIoU {part['mIoU']:.3f} [{low:.3f}, {high:.3f}]  oIoU {part['oIoU']:.3f}  "
    line += f"Pr@0.5 {part['Pr@0.5']:.3f}  right object {part['right_object']:.3f}  "
    line += f"random object {part['random_object']['mIoU']:.3f} / {part['random_object']['oIoU']:.3f}"
    for control in (*CONTROLS, LOCATED):
        if control in part:
            line += f"  {control} {part[control]['mIoU']:.3f}"
    return line


if __name__ == "__main__":
    run(main)
