"""Stage `initialise`: the model that a training starts from, fresh layers on a CLIP.

python -m pipelines.initialise --system risclip --dataset shapes

For a system of two stages this is its first: RISCLIP's locator is trained here, and `train` goes on with its decoder.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from pipelines import files, fingerprint, paths, tracking
from pipelines.stage import run


def main(
    system: Annotated[str, typer.Option(help="a system of ris_core/models")],
    dataset: Annotated[str, typer.Option(help="a preprocessed dataset")],
) -> None:
    """Write the model that training starts from; trains the first stage of a system that has one."""
    from pipelines.stage import check_names, params
    from pipelines.training import tracked_fit
    from ris_core.data.dataset import ShardStore
    from ris_core.models.clip import read_clip_config
    from ris_core.models.systems import export_model, trains
    from ris_core.training.run import initial_model

    check_names(dataset, system)
    chosen = params()
    section = getattr(chosen, system)
    store = ShardStore(paths.shards(dataset))
    clip = paths.clip(section.clip)
    clip_digest = read_clip_config(clip)["weights_sha256"]
    info = {
        "dataset": dataset,
        "image_size": store.image_size,
        "resample": store.resample,
        "clip_digest": clip_digest,
        "data_digest": fingerprint.file_digest(paths.shards(dataset) / "manifest.json"),
    }
    if not trains(system):
        info["proposals"] = asdict(chosen.proposals)
        del info["proposals"]["splits"]
    first, scores = None, {}
    with files.replaced_folder(paths.initialisation(system, dataset)) as results:
        if section.initialise is not None:
            inputs = (asdict(section.model), asdict(section.initialise), info["data_digest"], clip_digest)
            name = fingerprint.run_name("two-stage", system, dataset, *inputs)
            parent = tracking.open_parent(chosen.register.experiment, name)
            done, run_id = tracked_fit(chosen, system, dataset, "initialise", clip, clip_digest, parent)
            first, position = done.best, done.position
            info |= {"mlflow_parent": parent, "first_stage_run": run_id}
            scores = {"best_epoch": position.best_epoch, **position.history[position.best_epoch - 1]}
            files.write_csv(results / "history.csv", position.history)
        files.write_json(results / "metrics.json", scores)
        with files.replaced_folder(paths.start(system, dataset)) as folder:
            export_model(folder, system, initial_model(chosen, system, clip, first), section.model, clip, info)
    trained = f", first stage val mIoU {scores['val/mIoU']:.3f}" if scores else ""
    typer.echo(f"{paths.start(system, dataset)}: {system} on {clip}{trained}")


if __name__ == "__main__":
    run(main)
