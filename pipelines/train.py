"""Stage `train`: the library's training loop inside a Ray Train `TorchTrainer`, from the model that `initialise` left.

python -m pipelines.train --system cris --dataset shapes
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from pipelines import files, fingerprint, paths
from pipelines.stage import run


def main(
    system: Annotated[str, typer.Option(help="cris, risclip, lts")],
    dataset: Annotated[str, typer.Option(help="a preprocessed dataset")],
) -> None:
    """Train one system on one dataset; writes the best model and the learning curves."""
    from pipelines.stage import check_names, params
    from pipelines.training import tracked_fit
    from ris_core.config import digest
    from ris_core.models.systems import CLIP_FOLDER, export_model, read_model_info
    from ris_core.training.run import check_start

    check_names(dataset, system)
    chosen = params()
    section = getattr(chosen, system)
    start = paths.start(system, dataset)
    check_start(start, system, section.model)
    info = read_model_info(start)["info"]
    weights_digest = fingerprint.file_digest(start / "model.safetensors")
    start_digest = digest([weights_digest, info["clip_digest"]])
    best, run_id = tracked_fit(chosen, system, dataset, "train", start, start_digest, info.get("mlflow_parent"))
    position = best.position
    with files.replaced_folder(paths.model(system, dataset)) as folder:
        info |= {
            "word_len": section.train.word_len,
            "epoch": position.best_epoch,
            "val_mIoU": position.best_score,
            "config_digest": digest([asdict(section.model), asdict(section.train)]),
            "mlflow_run": run_id,
        }
        assert best.best is not None
        export_model(folder, system, best.best, section.model, start / CLIP_FOLDER, info)
    out = paths.training(system, dataset)
    files.write_csv(out / "history.csv", position.history)
    files.write_json(
        out / "metrics.json", {"best_epoch": position.best_epoch, **position.history[position.best_epoch - 1]}
    )
    typer.echo(f"{paths.model(system, dataset)}: best epoch {position.best_epoch}, val mIoU {position.best_score:.3f}")


if __name__ == "__main__":
    run(main)
