"""What each part of a system brings: the system trained without it, on the same data, steps and seeds.

python -m benchmarks.ablations {risclip,lts} [--dataset shapes] [--only whole none] [--steps 20] [--epochs 1] [--record]

Needs the shards and the CLIPs that `dvc repro` makes; sizes and budgets are those of the system's section of
params.yaml (with its preset), unless `--steps` or `--epochs` cut them short for a quick look.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from benchmarks.measure import Report, alone
from benchmarks.models import OracleAnswers, OracleLTS
from pipelines import paths
from ris_core.config import Params, load_params
from ris_core.data.dataset import ShardStore
from ris_core.device import best_device
from ris_core.evaluation.answers import Answerer, MapAnswers
from ris_core.evaluation.cost import trained_parameters
from ris_core.evaluation.evaluator import evaluate
from ris_core.evaluation.metrics import PROTOCOLS, Protocol, scores
from ris_core.evaluation.queries import queries_of
from ris_core.models.clip import build_clip, input_size, load_saved_clip, read_clip_config
from ris_core.models.contract import MapSystem
from ris_core.models.registry import first_stage, system_class
from ris_core.storage import Storage
from ris_core.training.checkpoint import Checkpoints
from ris_core.training.params import SystemSection, TrainParams
from ris_core.training.pretrain import pretrain_clip, read_captions
from ris_core.training.run import make_trainer
from ris_core.training.runtime import LocalRuntime

if TYPE_CHECKING:
    from open_clip.model import CLIP

VARIANTS = {
    "risclip": {
        "whole": "RISCLIP",
        "no_ske": "without SKE",
        "no_cfe": "without CFE and adapters",
        "random_clip": "on a random CLIP",
        "learned_positions": "on a CLIP with learned positions",
        "decoder_alone": "second stage trains the decoder alone",
    },
    "lts": {
        "whole": "LTS",
        "none": "without a prior",
        "transformer": "located by the transformer",
        "gaussian": "prior taught a Gaussian",
        "stride_16": "prior at 1/16",
        "no_coordinates": "without coordinates",
        "clip_state": "hears CLIP's sentence state alone",
        "oracle": "told the true prior",
    },
}
CHANGES: dict[str, dict[str, dict[str, Any]]] = {  # of the system's options
    "risclip": {
        "no_ske": {"ske_blocks": 0},
        "no_cfe": {"cfe_layers": 0},
        "decoder_alone": {"joint": False},
    },
    "lts": {
        "none": {"prior": "none", "prior_weight": 0.0},
        "transformer": {"prior": "transformer"},
        "gaussian": {"prior_target": "gaussian"},
        "stride_16": {"prior_stride": 16},
        "no_coordinates": {"coordinates": "none"},
        "clip_state": {"text": "clip"},
        "oracle": {"prior": "none", "prior_weight": 0.0},  # what is told needs no locator
    },
}


@dataclass(frozen=True)
class Budget:
    """What `--steps` and `--epochs` put in the place of every training's own; None leaves it."""

    steps_per_epoch: int | None = None
    epochs: int | None = None

    def changes(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if value is not None}

    def of(self, params: TrainParams) -> TrainParams:
        """A training of params.yaml under this budget, its batches made in this process."""
        return replace(params, loader_workers=0, **self.changes())


def main() -> None:
    """Run the benchmark."""
    args = parse()
    budget = Budget(args.steps, args.epochs)
    report = Report(f"ablations-{args.system}", {"dataset": args.dataset, **budget.changes()})
    for name in args.only:
        found = alone(measure, args.system, name, args.dataset, budget)
        report_variant(report, VARIANTS[args.system][name], found)
    report.finish(args.record)


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; each system has variants of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    systems = parser.add_subparsers(dest="system", required=True)
    for system, variants in VARIANTS.items():
        of_system = systems.add_parser(system, help=", ".join(variants))
        of_system.add_argument("--dataset", default="shapes")
        of_system.add_argument("--only", nargs="+", choices=list(variants), default=list(variants), help="default: all")
        of_system.add_argument(
            "--steps", type=positive, help="per epoch, of every training (default: as in params.yaml)"
        )
        of_system.add_argument("--epochs", type=positive, help="of every training (default: as in params.yaml)")
        of_system.add_argument("--record", action="store_true", help="keep the result in benchmarks/records")
    return parser.parse_args(words)


def positive(text: str) -> int:
    """A number of the command line. Raises ArgumentTypeError below 1."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: use 1 or more")
    return int(text)


@dataclass(frozen=True)
class Found:
    """Scores of one variant, and those of picking an object at random; `beside` are further rows: (what, value, unit)."""

    scores: dict[str, float]
    right_object: float
    random_object: dict[str, float]
    beside: list[tuple[str, float, str]]


def report_variant(report: Report, title: str, found: Found) -> None:
    """mIoU and oIoU beside a random object's, then what else there is to know."""
    for metric in ("mIoU", "oIoU"):
        ratio = found.scores[metric] / found.random_object[metric]
        report.add(f"{title}: {metric}", found.scores[metric], "", ratio, "a random object")
    report.add("  right object", found.right_object, "of all")
    for row in found.beside:
        report.add(f"  {row[0]}", *row[1:])


def measure(system: str, variant: str, dataset: str, budget: Budget) -> Found:
    """Train one variant in this process and score it on the whole validation split under protocol `ours`."""
    params, store = load_params(paths.PARAMS), ShardStore(paths.shards(dataset))
    section = varied(params.of(system), system, variant)
    assert section.train is not None
    word_len = section.train.word_len
    torch.manual_seed(params.train.seed)
    clip = variant_clip(system, variant, params)
    torch.manual_seed(params.train.seed)
    model = build(section, system, variant, clip)
    beside: list[tuple[str, float, str]] = []
    with tempfile.TemporaryDirectory() as place:
        if section.initialise is not None:
            untrained = score(model, store, word_len)
            part = first_stage(system)
            assert part is not None
            locator = part(clip, section.model)
            model.adopt(train(locator, budget.of(section.initialise), store, Path(place) / "first"))
            located = score(model, store, word_len)
            beside += [("after the first stage: mIoU", located.scores["mIoU"], "")]
            beside += [("before any training: mIoU", untrained.scores["mIoU"], "")]
        model.load_state_dict(train(model, budget.of(section.train), store, Path(place) / "second"))
    if system == "lts":
        beside += lts_rows(model, store, word_len)
    return replace(score(model, store, word_len), beside=beside)


def varied(section: SystemSection, system: str, variant: str) -> SystemSection:
    """The section of params.yaml with what a variant changes; it is trained as ever."""
    return replace(section, model=replace(section.model, **CHANGES[system].get(variant, {})))


def build(section: SystemSection, system: str, variant: str, clip: CLIP) -> MapSystem:
    """The untrained model of a variant's section."""
    model = (OracleLTS if variant == "oracle" else system_class(system))(clip, section.model)
    assert isinstance(model, MapSystem)
    return model


def lts_rows(model: MapSystem, store: ShardStore, word_len: int) -> list[tuple[str, float, str]]:
    """How well the prior alone answers, where there is one, and how much is trained."""
    rows = []
    if model.locates or isinstance(model, OracleLTS):
        rows += [("the prior alone: mIoU", score(model, store, word_len, "locate").scores["mIoU"], "")]
    return [*rows, ("trained parameters", trained_parameters(model) / 1e6, "million")]


def train(model: MapSystem, params: TrainParams, store: ShardStore, place: Path) -> dict[str, torch.Tensor]:
    """One stage of training from its beginning; returns the weights that are kept of it."""
    trainer = make_trainer(model, params, store, LocalRuntime(Checkpoints(Storage(place))))
    if isinstance(model, OracleLTS):
        trainer.validate = partial(validate_oracle, store=store, params=params)
    trainer.fit()
    return trainer.best_weights()


def validate_oracle(model: MapSystem, store: ShardStore, params: TrainParams) -> dict[str, float]:
    """What the training's own validation says of other models, for one that must be told the truth."""
    images = store.images_of(params.validate_split)[: params.validate_images].tolist()
    protocol = PROTOCOLS[params.validate_protocol]
    column = columns(model, store, params.word_len, protocol, params.validate_split, images)
    found = scores(column["intersection"], column["union"])
    return {f"val/{metric}": found[metric] for metric in ("mIoU", "oIoU")}


def score(
    model: MapSystem, store: ShardStore, word_len: int, method: Literal["segment", "locate"] = "segment"
) -> Found:
    """Scores on the whole validation split, of the masks or of the coarse map."""
    column = columns(model, store, word_len, PROTOCOLS["ours"], "val", method=method)
    random_object = {
        "mIoU": float(column["random_iou"].mean()),
        "oIoU": float(column["random_intersection"].sum() / column["random_union"].sum()),
    }
    found = scores(column["intersection"], column["union"])
    return Found(found, float(column["right_object"].mean()), random_object, [])


def columns(
    model: MapSystem,
    store: ShardStore,
    word_len: int,
    protocol: Protocol,
    split: str,
    images: list[int] | None = None,
    method: Literal["segment", "locate"] = "segment",
) -> dict[str, np.ndarray]:
    """The table of an evaluation by columns, texts left out."""
    answer: Answerer = MapAnswers(model, word_len, method)
    if isinstance(model, OracleLTS):
        answer = OracleAnswers(model, word_len, method)
    table = evaluate(answer, store, queries_of(store, split, protocol, images), protocol, split=split)
    return {name: table[name].to_numpy() for name in table.column_names if name not in ("text", "kind", "split")}


def variant_clip(system: str, variant: str, params: Params) -> CLIP:
    """The CLIP of a variant: the pipeline's own, the same with random weights, or one pre-trained with learned positions."""
    name = params.of(system).clip
    folder = paths.clip(name)
    if variant not in ("random_clip", "learned_positions"):
        return load_saved_clip(folder)
    architecture = read_clip_config(folder)["architecture"]
    if variant == "random_clip":
        return build_clip(architecture)
    architecture["vision_cfg"]["pos_embed_type"] = "learnable"
    clip, root = build_clip(architecture), paths.raw(params.captions)
    data = read_captions(root, root / params.captions / "captions.json", input_size(clip))
    print(pretrain_clip(clip, data, params.clip(name), torch.device(best_device())))
    return clip.cpu()


if __name__ == "__main__":
    main()
