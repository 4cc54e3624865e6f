"""Parameters of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass

from ris_core.device import PRECISIONS
from ris_core.evaluation.metrics import PROTOCOLS
from ris_core.options import option

EXPRESSIONS_PER_BATCH = 64


@dataclass
class EvaluateParams:
    """Stage `evaluate`: scores at original resolution, with baselines that show whether language is understood."""

    protocols: list[str] = option(["ours"], choices=tuple(PROTOCOLS))
    splits: list[str] | None = None
    shuffled_split: str | None = "val"
    bootstrap_samples: int = option(1000, minimum=1)
    expressions_per_batch: int = option(EXPRESSIONS_PER_BATCH, minimum=1)
    precision: str = option("auto", choices=PRECISIONS)
    seed: int = 0
