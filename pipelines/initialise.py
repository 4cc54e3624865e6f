"""Stage `initialise`: the model that a training starts from, fresh layers on a CLIP.

python -m pipelines.initialise --system risclip --dataset shapes

For a system of two stages this is its first: RISCLIP's locator is trained here, and `train` goes on with its decoder.
"""

from __future__ import annotations

from typing import Annotated

import typer

from pipelines import paths
from pipelines.stage import check_names, params, run
from pipelines.training import Training, trained
from ris_core import files
from ris_core.data.dataset import ShardStore
from ris_core.models.clip import read_clip_config
from ris_core.models.registry import ModelInfo, export_model, trains
from ris_core.options import Plain, deciding
from ris_core.training.checkpoint import completed
from ris_core.training.run import initial_model


def main(
    system: Annotated[str, typer.Option(help="a system of ris_core/models")],
    dataset: Annotated[str, typer.Option(help="a preprocessed dataset")],
) -> None:
    """Write the model that training starts from; trains the first stage of a system that has one."""
    check_names(dataset, system)
    chosen = params("initialise", system)
    section = chosen.of(system)
    store = ShardStore(paths.shards(dataset))
    clip = paths.clip(section.clip)
    clip_digest = read_clip_config(clip)["weights_sha256"]
    data_digest = files.file_sha256(paths.shards(dataset) / "manifest.json")
    first, first_run, scores = None, "", {}
    with files.replaced_folder(paths.initialisation(system, dataset)) as results:
        if section.initialise is not None:
            training = Training(system, dataset, "initialise", section, section.initialise, clip, clip_digest)
            done, first_run = trained(chosen, training)
            assert done.best is not None
            first, position = completed(done.best, training.model(clip)), done.position
            scores = {"best_epoch": position.best_epoch, **position.history[position.best_epoch - 1]}
            files.write_csv(results / "history.csv", position.history)
        files.write_json(results / "metrics.json", scores)
        proposals: Plain | None = None if trains(system) else deciding(chosen.proposals.options())
        info = ModelInfo(
            image_size=store.image_size,
            resample=store.resample,
            proposals=proposals,
            dataset=dataset,
            data_digest=data_digest,
            clip_digest=clip_digest,
            first_stage_run=first_run,
        )
        with files.replaced_folder(paths.start(system, dataset)) as folder:
            weights = initial_model(section, system, clip, first, chosen.train.seed)
            export_model(folder, system, weights, section.model, clip, info)
    told = f", first stage val mIoU {scores['val/mIoU']:.3f}" if scores else ""
    typer.echo(f"{paths.start(system, dataset)}: {system} on {clip}{told}")


if __name__ == "__main__":
    run(main)
