"""`ris predict`: one picture, one expression, and the picture with the mask drawn."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from pipelines import paths, places
from ris_core.data.images import read_image
from ris_core.errors import ConfigError, short
from ris_core.evaluation.figures import overlay
from ris_core.files import replaced_file
from ris_core.models.answer import Reading
from ris_core.predictor import RISPredictor

ENDINGS = (".png", ".jpg", ".jpeg")
MODEL = str(paths.model("cris", "shapes"))  # by default

ModelPlace = Annotated[
    str, typer.Option(help="a model folder, or models:/name@alias or runs:/id/name of the tracking store")
]
Threshold = Annotated[float, typer.Option(help="a pixel belongs to the mask if its probability is above this")]


def main(
    image: Annotated[str, typer.Argument(help="a picture: JPEG, PNG, WebP, TIFF, ...")],
    expression: Annotated[str, typer.Argument(help="which object, in words")],
    out: Annotated[Path, typer.Option(help="where to write the picture with the mask drawn")] = Path("overlay.png"),
    model: ModelPlace = MODEL,
    threshold: Threshold = 0.5,
) -> None:
    """Mark the object an expression names: writes a picture, prints the score and the mask's size."""
    check_out(out, image)
    predictor = RISPredictor.from_folder(model_folder(model), reading=Reading(threshold=threshold))
    pixels = read_image(image)
    (prediction,) = predictor.answer(predictor.encode(pixels), [expression])
    with places.written(out), replaced_file(places.followed(out)) as temporary:
        overlay(pixels, prediction.mask).save(temporary)
    share = prediction.mask.mean()
    typer.echo(f"{out}: score {prediction.score:.3f}, mask covers {share:.1%} of the image")
    if prediction.cut:
        told = f"it has {predictor.model.count_tokens(expression)} tokens, the model reads {predictor.most_tokens}"
        print(f"the expression is cut, its end was not heard: {told}", file=sys.stderr)
    if not prediction.mask.any():
        print("nothing in the image matched the expression: the mask is empty", file=sys.stderr)


def check_out(out: Path, image: str) -> None:
    """Raise ConfigError unless a picture can be written to `out` without harm."""
    real = places.followed(out)
    if out.suffix.lower() not in ENDINGS or not os.path.isdir(out.parent):
        raise ConfigError(f"--out {out}: give a .png or .jpg file in a folder that exists")
    if os.path.exists(image) and os.path.exists(real) and os.path.samefile(image, real):
        raise ConfigError(f"--out {out} is the picture itself, which would be lost: give another name")
    if os.path.lexists(real) and not os.path.isfile(real):
        raise ConfigError(f"--out {out} is no file that can be written: give the name of a picture")
    if real.suffix.lower() not in ENDINGS or not real.parent.is_dir():
        raise ConfigError(
            f"--out {out} is a link to {short(str(real))}, which is no place for a picture: give another name"
        )
    if problem := places.problem_of_folder(real.parent):
        raise ConfigError(f"--out {out} {problem}")


def model_folder(model: str) -> Path:
    """Find a model's folder: a path as it is; `models:/...` and `runs:/...` are fetched from the tracking store."""
    if not model.startswith(("models:/", "runs:/")):
        return Path(model).expanduser()
    try:
        from pipelines.versions import fetch  # MLflow takes seconds, and a folder needs none of it
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{model} needs {error.name}, which is not installed here: pip install 'ris[serve]'"
        ) from None
    return fetch(model)


if __name__ == "__main__":
    from pipelines.stage import run

    run(main)
