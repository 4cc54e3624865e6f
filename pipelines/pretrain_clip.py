"""Stage `pretrain_clip`: a CLIP that systems start from, trained here or loaded from real weights.

python -m pipelines.pretrain_clip --clip rn
"""

from __future__ import annotations

import sys
from typing import Annotated

import torch
import typer

from pipelines import cluster, paths
from pipelines.stage import params, run
from ris_core import files
from ris_core.models.clip import input_size, load_clip, save_clip
from ris_core.training.pretrain import pretrain_clip, read_captions


def main(clip: Annotated[str, typer.Option(help="rn or vit: the sections clip_rn and clip_vit")]) -> None:
    """Train a small CLIP on captioned scenes, or load and check the weights that its section names."""
    everything = params("pretrain_clip", clip)
    chosen = everything.clip(clip)
    torch.manual_seed(chosen.seed)
    model = load_clip(chosen.architecture, chosen.weights, chosen.image_size)
    if chosen.weights:
        print(f"using the weights {chosen.weights} for {chosen.architecture}: nothing to train", file=sys.stderr)
        scores = {}
    else:
        root = paths.raw(everything.captions)
        data = read_captions(root, root / everything.captions / "captions.json", input_size(model))
        scores = pretrain_clip(model, data, chosen, torch.device(cluster.device(everything.cluster.use_gpu)))
    with files.replaced_folder(paths.clip(clip)) as folder:
        save_clip(model.cpu(), folder, chosen.architecture, {"weights": chosen.weights, **scores})
    files.write_json(paths.clip_scores(clip), {name: round(value, 4) for name, value in scores.items()})
    typer.echo("  ".join(f"{name} {value:.3f}" for name, value in scores.items()))


if __name__ == "__main__":
    run(main)
