"""What each part of RISCLIP brings: both stages trained without it, on the same data, steps and seeds.

python -m benchmarks.ablations [--dataset shapes] [--only whole no_ske] [--record]

Needs the shards and the ViT CLIP that `dvc repro` makes; sizes and budgets are those of the section `risclip` of
params.yaml (with its preset).
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.measure import Report, alone
from pipelines import paths

if TYPE_CHECKING:
    from open_clip.model import CLIP

    from ris_core.config import Params

VARIANTS = {
    "whole": "RISCLIP",
    "no_ske": "without SKE",
    "no_cfe": "without CFE and adapters",
    "random_clip": "on a random CLIP",
    "learned_positions": "on a CLIP with learned positions",
    "joint": "second stage trains the locator too",
}
CHANGES: dict[str, dict[str, Any]] = {
    "no_ske": {"ske_blocks": 0},
    "no_cfe": {"cfe_layers": 0},
    "joint": {"joint": True},
}


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="shapes")
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), help="default: all")
    parser.add_argument("--record", action="store_true", help="keep the result in benchmarks/records")
    args = parser.parse_args()
    report = Report("ablations", {"dataset": args.dataset})
    random_object: dict[str, float] = {}
    for name in args.only:
        found = alone(measure, name, args.dataset)
        random_object = {metric: found[f"random object {metric}"] for metric in ("mIoU", "oIoU")}
        for metric in ("mIoU", "oIoU"):
            ratio = found[metric] / random_object[metric]
            report.add(f"{VARIANTS[name]}: {metric}", found[metric], "", ratio, "a random object")
        report.add("  right object", found["right object"], "of all")
        report.add("  after the first stage: mIoU", found["first stage mIoU"], "")
        report.add("  before any training: mIoU", found["untrained mIoU"], "")
    report.finish(args.record)


def measure(variant: str, dataset: str) -> dict[str, float]:
    """Train one variant in this process and score it on the whole validation split under protocol `ours`."""
    import torch
    from torch import nn

    from ris_core.config import load_params
    from ris_core.data.dataset import ShardStore
    from ris_core.evaluation.evaluator import evaluate, queries_of
    from ris_core.evaluation.metrics import PROTOCOLS, scores
    from ris_core.models.risclip import RISCLIP
    from ris_core.training.loop import Trainer
    from ris_core.training.run import make_trainer
    from ris_core.training.runtime import LocalRuntime

    params = load_params(paths.PARAMS)
    store, section = ShardStore(paths.shards(dataset)), params.risclip
    config = replace(section.model, **CHANGES.get(variant, {}))
    torch.manual_seed(params.train.seed)
    clip = variant_clip(variant, params)
    protocol = PROTOCOLS["ours"]
    queries = queries_of(store, "val", protocol)

    def runtime(place: str, stage: str) -> LocalRuntime:
        return LocalRuntime(Path(place) / stage)

    def best(trainer: Trainer) -> dict[str, torch.Tensor]:
        assert trainer.best is not None
        return trainer.best

    def scored(model: nn.Module) -> tuple[dict[str, float], dict[str, float]]:
        table = evaluate(model, store, queries, protocol, word_len=section.train.word_len, split="val")
        column = {name: table[name].to_numpy() for name in table.column_names if name not in ("text", "kind", "split")}
        controls = {
            "right object": float(column["right_object"].mean()),
            "random object mIoU": float(column["random_iou"].mean()),
            "random object oIoU": float(column["random_intersection"].sum() / column["random_union"].sum()),
        }
        return scores(column["intersection"], column["union"]), controls

    with tempfile.TemporaryDirectory() as place:
        torch.manual_seed(params.train.seed)
        model = RISCLIP.build(clip, config)
        untrained, _ = scored(model)
        assert section.initialise is not None
        stages = [replace(stage, loader_workers=0) for stage in (section.initialise, section.train)]
        locator = RISCLIP.first_stage.build(clip, config)
        first = make_trainer(locator, stages[0], store, runtime(place, "first"))
        first.fit()
        model.adopt(best(first))
        located, _ = scored(model)
        second = make_trainer(model, stages[1], store, runtime(place, "second"))
        second.fit()
        model.load_state_dict(best(second))
        final, controls = scored(model)
    found = {"first stage mIoU": located["mIoU"], "untrained mIoU": untrained["mIoU"], **controls}
    return {**found, "mIoU": final["mIoU"], "oIoU": final["oIoU"]}


def variant_clip(variant: str, params: Params) -> CLIP:
    """The CLIP of a variant: the pipeline's own, the same with random weights, or one pre-trained with learned positions."""
    import torch

    from ris_core.models.clip import build_clip, input_size, load_saved_clip, read_clip_config
    from ris_core.training.pretrain import pretrain_clip, read_captions
    from ris_core.training.runtime import best_device

    folder = paths.clip(params.risclip.clip)
    if variant not in ("random_clip", "learned_positions"):
        return load_saved_clip(folder)
    architecture = read_clip_config(folder)["architecture"]
    if variant == "random_clip":
        return build_clip(architecture)
    architecture["vision_cfg"]["pos_embed_type"] = "learnable"
    clip, root = build_clip(architecture), paths.raw(params.captions)
    data = read_captions(root, root / params.captions / "captions.json", input_size(clip))
    print(pretrain_clip(clip, data, params.clip_vit, torch.device(best_device())))
    return clip.cpu()


if __name__ == "__main__":
    main()
