"""Stage `pretrain_clip`: the CLIP that the systems start from, trained here or loaded from real weights.

python -m pipelines.pretrain_clip
"""

from __future__ import annotations

import sys
from pathlib import Path

import typer

from pipelines import files, paths
from pipelines.stage import run


def main() -> None:
    """Train the small CLIP on captioned scenes, or load and check the weights that `clip.weights` names."""
    import torch

    from pipelines.stage import params
    from ris_core.models.clip import load_clip, save_clip
    from ris_core.training.pretrain import pretrain_clip, read_captions
    from ris_core.training.runtime import best_device

    chosen = params().clip
    torch.manual_seed(chosen.seed)
    clip = load_clip(chosen.architecture, chosen.weights)
    if chosen.weights:
        print(f"using the weights {chosen.weights} for {chosen.architecture}: nothing to train", file=sys.stderr)
        scores = {}
    else:
        root = paths.raw(chosen.dataset)
        captions = root / Path(chosen.dataset) / "captions.json"
        data = read_captions(root, captions, clip.visual.image_size)
        scores = pretrain_clip(clip, data, chosen, torch.device(best_device()))
    with files.replaced_folder(paths.CLIP) as folder:
        save_clip(clip.cpu(), folder, chosen.architecture, {"weights": chosen.weights, **scores})
    files.write_json(Path("results/clip/metrics.json"), {name: round(value, 4) for name, value in scores.items()})
    typer.echo("  ".join(f"{name} {value:.3f}" for name, value in scores.items()))


if __name__ == "__main__":
    run(main)
