"""`ris <verb>`: every stage, and predicting with a trained model.

Heavy libraries are imported inside the commands, so that `ris --help` answers at once.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from pipelines import (
    compare,
    evaluate,
    initialise,
    paths,
    prepare,
    preprocess,
    pretrain_clip,
    propose,
    register,
    report,
    synthesize,
)
from pipelines import train as train_stage

commands = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Referring image segmentation, from data to mask.",
)
for verb, module in (
    ("synthesize", synthesize),
    ("prepare", prepare),
    ("preprocess", preprocess),
    ("propose", propose),
    ("pretrain-clip", pretrain_clip),
    ("initialise", initialise),
    ("train", train_stage),
    ("evaluate", evaluate),
    ("register", register),
    ("compare", compare),
    ("report", report),
):
    commands.command(verb)(module.main)


@commands.command()
def predict(
    image: Annotated[Path, typer.Argument(help="a JPEG or PNG")],
    expression: Annotated[str, typer.Argument(help="which object, in words")],
    out: Annotated[Path, typer.Option(help="where to write the picture with the mask drawn")] = Path("overlay.png"),
    model: Annotated[str, typer.Option(help="a model folder, or models:/name@alias of the registry")] = str(
        paths.model("cris", "shapes")
    ),
    threshold: Annotated[
        float, typer.Option(help="a pixel belongs to the mask if its probability is above this")
    ] = 0.5,
) -> None:
    """Mark the object an expression names: writes a picture, prints the score and the mask's size."""
    from pipelines.tracking import model_folder
    from ris_core.errors import ConfigError
    from ris_core.evaluation.figures import overlay
    from ris_core.predictor import RISPredictor, read_image

    if out.suffix.lower() not in (".png", ".jpg", ".jpeg") or not out.parent.is_dir():
        raise ConfigError(f"--out {out}: give a .png or .jpg file in a folder that exists")
    predictor = RISPredictor.from_folder(model_folder(model), threshold=threshold)
    pixels = read_image(image)
    predictor.set_image(pixels)
    (prediction,) = predictor.predict([expression])
    overlay(pixels, prediction.mask).save(out)
    share = prediction.mask.mean()
    typer.echo(f"{out}: score {prediction.score:.3f}, mask covers {share:.1%} of the image")
    if not prediction.mask.any():
        print("nothing in the image matched the expression: the mask is empty", file=sys.stderr)


def app() -> None:
    """Entry point of the console script: expected errors are shown as their message, with exit code 1."""
    from ris_core.errors import RISError

    try:
        commands()
    except RISError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    app()
