"""Scores of referring segmentation, from integer intersections and unions per expression.

mIoU is the mean IoU over expressions; oIoU (papers also say cumulative IoU, cIoU) is the sum of intersections over the
sum of unions, dominated by large objects; Pr@X is the share of expressions with IoU of at least (or above) X. Papers mix
the first two in one table: here both are always reported.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ris_core.data.letterbox import Upsampling

PRECISION_AT = (0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True)
class Protocol:
    """A named way of scoring; every published number belongs to one of these.

    sentences: 'all', or only the 'first' of each referent. text: the REFER field that is fed to the model. threshold: a
    pixel is foreground if its probability is above it. resolution: 'original', or a side length to which prediction and
    ground truth (nearest neighbour, aspect ratio lost) are resized. strict: Pr@X counts IoU > X rather than >= X.
    upsampling: where the cells of a predicted map lie, see `letterbox.unletterbox`; 'corners' is the official CRIS code's.
    """

    name: str
    sentences: str = "all"
    text: str = "sent"
    threshold: float = 0.5
    resolution: str | int = "original"
    strict: bool = False
    upsampling: Upsampling = "grid"


# `lavt` scores the arg max of two logits, which for one logit is a threshold of 0.5. Its reference reads pixels of value 1
# only, so that overlapping polygons of one annotation count as background; here ground truth is always their union.
PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol("ours"),
        Protocol("cris", threshold=0.35, strict=True, upsampling="corners"),
        Protocol("cris_val", sentences="first", threshold=0.35, strict=True, upsampling="corners"),
        Protocol("lavt", text="raw", resolution=480),
    )
}


def iou(intersection: np.ndarray, union: np.ndarray) -> np.ndarray:
    """IoU per expression, float64; an empty union (nothing there, nothing predicted) counts as 0."""
    return np.where(union > 0, intersection / np.maximum(union, 1), 0.0)


def scores(intersection: np.ndarray, union: np.ndarray, strict: bool = False) -> dict[str, float]:
    """mIoU, oIoU and Pr@0.5..0.9 in 0..1 from int64 arrays (N,); all zero when N is 0.

    Pr@X compares integers (10 I against 10 X U), so that an IoU of exactly X is never lost to rounding.
    """
    values = iou(intersection, union)
    count = max(1, len(values))
    result = {"mIoU": float(values.sum() / count), "oIoU": float(intersection.sum() / max(1, int(union.sum())))}
    for level in PRECISION_AT:
        left, right = 10 * intersection, round(10 * level) * union
        hits = (left > right) if strict else (left >= right) & (union > 0)
        result[f"Pr@{level}"] = float(hits.sum() / count)
    return result


def bootstrap_intervals(
    intersection: np.ndarray, union: np.ndarray, image_ids: np.ndarray, samples: int, seed: int, level: float = 0.95
) -> dict[str, tuple[float, float]]:
    """Percentile bootstrap intervals of mIoU and oIoU, resampling whole images.

    Expressions about one image share its difficulty, so they are not independent; resampling images rather than
    expressions keeps the interval honest (cluster bootstrap; Davison and Hinkley 1997, section 3.8).
    """
    images, member = np.unique(image_ids, return_inverse=True)
    per_image = np.stack(
        [
            np.bincount(member, weights=column, minlength=len(images))
            for column in (iou(intersection, union), np.ones(len(union)), intersection, union)
        ]
    )
    random = np.random.default_rng(seed)
    draws = random.multinomial(len(images), np.full(len(images), 1 / len(images)), size=samples)
    total_iou, count, total_intersection, total_union = per_image @ draws.T.astype(np.float64)
    tails = [50 * (1 - level), 100 - 50 * (1 - level)]
    means = {"mIoU": total_iou / count, "oIoU": total_intersection / np.maximum(total_union, 1)}
    return {
        name: (float(low), float(high))
        for name, (low, high) in ((n, np.percentile(v, tails)) for n, v in means.items())
    }


def by_group(
    names: Sequence[str], intersection: np.ndarray, union: np.ndarray, strict: bool = False
) -> dict[str, dict[str, float]]:
    """`scores` for each distinct name (kind of expression, say), with the number of expressions as `count`."""
    labels = np.asarray(names)
    return {
        str(name): {
            "count": int((labels == name).sum()),
            **scores(intersection[labels == name], union[labels == name], strict),
        }
        for name in np.unique(labels)
    }
