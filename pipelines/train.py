"""Stage `train`: the library's training loop inside a Ray Train `TorchTrainer`, from the model that `initialise` left.

python -m pipelines.train --system cris --dataset shapes

Of a zero-shot system nothing is trained: its model goes on as it is, with a run in MLflow that tells its parameters.
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
    """Train one system on one dataset; writes the best model and the learning curves."""
    from pipelines.stage import check_names, params
    from pipelines.training import open_run, tracked_fit
    from ris_core.config import digest
    from ris_core.models.systems import CLIP_FOLDER, export_model, load_model, read_model_info
    from ris_core.training.run import check_start

    check_names(dataset, system)
    chosen = params()
    section = getattr(chosen, system)
    start = paths.start(system, dataset)
    check_start(start, system, section.model)
    info = read_model_info(start)["info"]
    weights_digest = fingerprint.file_digest(start / "model.safetensors")
    start_digest = digest([weights_digest, info["clip_digest"], info.get("proposals")])
    if section.train is None:
        _, run_id = open_run(chosen, system, dataset, "train", start_digest)
        tracking.connect().set_terminated(run_id)
        weights, history, scores = dict(load_model(start)[0].state_dict()), [], {}
    else:
        done, run_id = tracked_fit(chosen, system, dataset, "train", start, start_digest, info.get("mlflow_parent"))
        assert done.best is not None
        position, weights, history = done.position, done.best, done.position.history
        scores = {"best_epoch": position.best_epoch, **history[position.best_epoch - 1]}
        info |= {"word_len": section.train.word_len, "epoch": position.best_epoch, "val_mIoU": position.best_score}
    config = [asdict(section.model), section.train and asdict(section.train), info.get("proposals")]
    with files.replaced_folder(paths.model(system, dataset)) as folder:
        info |= {"config_digest": digest(config), "mlflow_run": run_id}
        export_model(folder, system, weights, section.model, start / CLIP_FOLDER, info)
    out = paths.training(system, dataset)
    files.write_csv(out / "history.csv", history, ["epoch", "val/mIoU"])
    files.write_json(out / "metrics.json", scores)
    told = f"best epoch {scores['best_epoch']}, val mIoU {scores['val/mIoU']:.3f}" if scores else "nothing to train"
    typer.echo(f"{paths.model(system, dataset)}: {told}")


if __name__ == "__main__":
    run(main)
