"""Misuses of parameters and of systems, each an error for mypy: `make lint` checks this file, and an ignore that is not needed
fails there. Nothing runs it.
"""

from __future__ import annotations

import torch

from pipelines.params import load_params
from ris_core.models.contract import MapSystem, ProposalSystem, System
from ris_core.models.registry import load_model
from ris_core.predictor import RISPredictor


def parameters() -> None:
    params = load_params()
    params.mistyped  # type: ignore[attr-defined]  # noqa: B018
    params.evaluate.bootstrap_sample  # type: ignore[attr-defined]  # noqa: B018
    params.of("cris").train.epochs  # type: ignore[union-attr]  # noqa: B018  # a zero-shot system trains nothing
    params.clip("rn").steps = "many"  # type: ignore[assignment]


def systems(system: System, trained: MapSystem, choosing: ProposalSystem, images: torch.Tensor) -> None:
    system.encode_image(images)  # type: ignore[operator]  # of one kind only
    trained.encode_images(images)  # type: ignore[operator]
    trained.score(None, ["left"])  # type: ignore[operator]
    choosing.stride + 1  # type: ignore[operator]
    model, described = load_model("models/cris-shapes")
    model.segment(None, images)  # type: ignore[operator]
    described.info.wordlen  # type: ignore[attr-defined]  # noqa: B018


def predictor(found: RISPredictor) -> None:
    found.answer("street.jpg", ["left"])  # type: ignore[arg-type]  # to be encoded first
    found.answer(found.encode("street.jpg"), "left", threshold="0.5")  # type: ignore[arg-type]
