"""Stage `train`: the library's training loop inside a Ray Train `TorchTrainer`, from the model that `initialise` left.

python -m pipelines.train --system cris --dataset shapes

Of a zero-shot system nothing is trained: its model goes on as it is, with a run in MLflow that tells its parameters.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from pipelines import paths
from pipelines.stage import check_names, params, run
from pipelines.training import Training, trained
from ris_core import files
from ris_core.errors import WeightsError
from ris_core.models.registry import CLIP_FOLDER, WEIGHTS, export_model, load_model, read_description
from ris_core.options import digest
from ris_core.training.run import check_start
from ris_core.weights import read_safetensors


def main(
    system: Annotated[str, typer.Option(help="a system of ris_core/models")],
    dataset: Annotated[str, typer.Option(help="a preprocessed dataset")],
) -> None:
    """Train one system on one dataset; writes the best model and the learning curves."""
    check_names(dataset, system)
    chosen = params("train", system)
    section = chosen.of(system)
    start = paths.start(system, dataset)
    check_start(start, system, section.model)
    described = read_description(start)
    info, weights_digest = described.info, files.file_sha256(start / WEIGHTS)
    if weights_digest != described.weights_sha256:
        raise WeightsError(
            f"{start / WEIGHTS} is not the file that was written (checksums differ): run the stage initialise again"
        )
    start_digest = digest([weights_digest, info.clip_digest, info.proposals])
    training = Training(
        system, dataset, "train", section, section.train, start, start_digest, first_stage_run=info.first_stage_run
    )
    if section.train is None:
        from pipelines import ray_training, tracking  # take seconds

        name, run_id = ray_training.open_run(chosen, training, info.proposals)
        tracking.connect().set_terminated(run_id)
        weights, history, scores = dict(load_model(start)[0].state_dict()), [], {}
    else:
        done, name = trained(chosen, training)
        assert done.best is not None
        position, history = done.position, done.position.history
        weights = read_safetensors(start / WEIGHTS) | done.best  # training leaves some as they were
        scores = {"best_epoch": position.best_epoch, **history[position.best_epoch - 1]}
        info = replace(info, word_len=section.train.word_len, epoch=position.best_epoch, val_mIoU=position.best_score)
    config = digest([section.model, section.train, info.proposals])
    with files.replaced_folder(paths.model(system, dataset)) as folder:
        info = replace(info, config_digest=config, run=name)
        export_model(folder, system, weights, section.model, start / CLIP_FOLDER, info)
    out = paths.training(system, dataset)
    files.write_csv(out / "history.csv", history, ["epoch", "val/mIoU"])
    files.write_json(out / "metrics.json", scores)
    told = f"best epoch {scores['best_epoch']}, val mIoU {scores['val/mIoU']:.3f}" if scores else "nothing to train"
    typer.echo(f"{paths.model(system, dataset)}: {told}")


if __name__ == "__main__":
    run(main)
