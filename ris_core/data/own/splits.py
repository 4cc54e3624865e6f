"""Which split an image is in, where nobody says: a draw that is a function of its name and a seed alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable


def draw(images: Iterable[str], val: float, test: float, seed: int) -> dict[str, str]:
    """Give train, val or test for each image name: `round(val * n)` and `round(test * n)` of n, at least one of what is asked.

    All expressions about an image go together, so no split knows an image of another. Images are ordered by a digest of
    seed and name, so that the order of a table plays no part, and an image that comes later moves few others.
    """
    ordered = sorted(set(images), key=lambda name: hashlib.sha256(f"{seed} {name}".encode()).digest())
    scored: dict[str, str] = {}
    for split, share in (("val", val), ("test", test)):
        count = max(round(share * len(ordered)), 1) if share else 0
        start = len(scored)
        scored |= dict.fromkeys(ordered[start : start + count], split)
    return {name: scored.get(name, "train") for name in ordered}
