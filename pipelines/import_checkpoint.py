"""`ris import-checkpoint`: an official CRIS checkpoint becomes a model folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipelines import official, places
from ris_core.errors import ConfigError, list_problems
from ris_core.evaluation.metrics import PROTOCOLS
from ris_core.models.registry import ModelInfo

READING = PROTOCOLS["cris"]


def main(
    checkpoint: Annotated[Path, typer.Argument(help="what the authors' training wrote, best_model.pth say")],
    out: Annotated[Path, typer.Option(help="the model folder to make")],
    image_size: Annotated[int, typer.Option(help="side of the square it reads, in pixels: input_size")] = 416,
    word_len: Annotated[int, typer.Option(help="most tokens of a sentence: 17, or 22 if trained on RefCOCOg")] = 17,
    num_heads: Annotated[int, typer.Option(help="heads of the decoder: num_head")] = 8,
) -> None:
    """Make a model folder of an official CRIS checkpoint."""
    given = {"--image-size": (image_size, official.SIDE), "--word-len": (word_len, 3), "--num-heads": (num_heads, 1)}
    problems = [f"{name} {value}: use {least} or more" for name, (value, least) in given.items() if value < least]
    if problem := places.problem_of_new(out):
        problems.append(f"--out {out} {problem}")
    if problems:
        raise ConfigError(list_problems("nothing was imported", problems))
    state, known = official.read_checkpoint(checkpoint.expanduser())
    info = ModelInfo(image_size, word_len=word_len, **known)
    with places.written(out):
        model, described = official.make_folder(state, out, num_heads, info)
    millions = sum(each.numel() for each in model.parameters()) / 1e6
    sizes = f"images of {image_size} pixels, {word_len} tokens a sentence, {num_heads} heads"
    typer.echo(f"{out}: CRIS of {millions:.1f} million parameters, {sizes}; weights {described.weights_sha256[:12]}")
    typer.echo(
        f"its published scores are of protocol `{READING.name}`: threshold {READING.threshold}, cells of the map at the "
        f'{READING.upsampling}: RISPredictor.from_folder("{out}", reading=PROTOCOLS["{READING.name}"].reading), '
        f"PROTOCOLS being that of ris_core.evaluation.metrics. "
        f"`ris predict` and `ris predict-batch` read maps as protocol `ours` does, within pixels of it at --threshold "
        f"{READING.threshold}"
    )
    if not official.speaks(model):
        typer.echo(
            f"it knows {model.backbone.vocab_size} tokens, CLIP's tokenizer gives more: it cannot be asked in words",
            err=True,
        )


if __name__ == "__main__":
    from pipelines.stage import run

    run(main)
