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
from ris_core.models.answer import Reading

PRECISION_AT = (0.5, 0.6, 0.7, 0.8, 0.9)
SIZES = ("small", "medium", "large")


@dataclass(frozen=True)
class Protocol:
    """A named way of scoring; every published number belongs to one of these.

    sentences: 'all', or only the 'first' of each referent. text: the REFER field that is fed to the model. threshold: a
    pixel is foreground if its probability is above it. resolution: 'original', or a side length to which prediction and
    ground truth (nearest neighbour, aspect ratio lost) are resized. strict: Pr@X counts IoU > X rather than >= X.
    upsampling: where the cells of a predicted map lie, see `letterbox.unletterbox`; 'corners' is the official CRIS code's.
    skip_unanswered: leave expressions out about images in which a zero-shot system had no proposal to choose from; else
    they count as IoU 0. least_area: answers of fewer pixels say that nothing is there. empty_union: the IoU of an empty
    answer where nothing is there.
    """

    name: str
    sentences: str = "all"
    text: str = "sent"
    threshold: float = 0.5
    resolution: str | int = "original"
    strict: bool = False
    upsampling: Upsampling = "grid"
    skip_unanswered: bool = False
    least_area: int = 0
    empty_union: float = 0.0

    @property
    def is_generalised(self) -> bool:
        """Tell whether it scores answers that nothing is there."""
        return self.empty_union > 0

    @property
    def reading(self) -> Reading:
        """Tell how answers are read under it."""
        return Reading(self.threshold, self.resolution, self.upsampling)


# `lavt` scores the arg max of two logits, which for one logit is a threshold of 0.5. Its reference reads pixels of value 1
# only, so that overlapping polygons of one annotation count as background; here ground truth is always their union.
# The reference of `global_local` reads ground truth in the same way.
# `grefcoco` is that of generalised data (GRES, CVPR 2023; henghuiding/ReLA): mIoU is its gIoU, where saying rightly that
# nothing is there counts 1, oIoU its cIoU; beside them stand N-acc. and T-acc., and Pr@X over expressions that have a target.
# A mask of fewer than 50 pixels says that nothing is there, as the paper reads systems without a classifier for that.
PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol("ours"),
        Protocol("cris", threshold=0.35, strict=True, upsampling="corners"),
        Protocol("cris_val", sentences="first", threshold=0.35, strict=True, upsampling="corners"),
        Protocol("lavt", text="raw", resolution=480),
        Protocol("global_local", text="raw", skip_unanswered=True),
        Protocol("grefcoco", text="raw", least_area=50, empty_union=1.0),
    )
}


def suited(names: Sequence[str], generalised: bool) -> list[Protocol]:
    """Give the protocols of these names; before them `grefcoco`, unless one like it is named, where data is generalised.

    There, all others count the right answer to what means nothing as wrong, so that none of them may decide by itself.
    """
    named = [PROTOCOLS[name] for name in names]
    lacking = generalised and not any(protocol.is_generalised for protocol in named)
    return [PROTOCOLS["grefcoco"], *named] if lacking else named


def iou(intersection: np.ndarray, union: np.ndarray, empty_union: float = 0.0) -> np.ndarray:
    """Give the IoU per expression, float64; an empty union (nothing there, nothing predicted) counts as `empty_union`."""
    return np.where(union > 0, intersection / np.maximum(union, 1), empty_union)


def generalised(
    intersection: np.ndarray, union: np.ndarray, area: np.ndarray, has_target: np.ndarray
) -> dict[str, float]:
    """Give what a generalised protocol scores beside mIoU and oIoU, of int64 and bool arrays (N,).

    N_acc: the share of expressions without a target whose answer is empty; T_acc: of those with one whose answer is not (0 where
    there is no such expression); Pr@X over expressions with a target. area: the answers' in pixels.
    """
    found = {"no_target": int((~has_target).sum())}
    named = {"N_acc": (~has_target, area == 0), "T_acc": (has_target, area > 0)}
    rates = {name: float((of & right).sum() / max(1, int(of.sum()))) for name, (of, right) in named.items()}
    precision = scores(intersection[has_target], union[has_target])
    return {**found, **rates, **{name: value for name, value in precision.items() if name.startswith("Pr@")}}


def scores(
    intersection: np.ndarray, union: np.ndarray, strict: bool = False, empty_union: float = 0.0
) -> dict[str, float]:
    """Give mIoU, oIoU and Pr@0.5..0.9 in 0..1 from int64 arrays (N,); all zero when N is 0.

    Pr@X compares integers (10 I against 10 X U), so that an IoU of exactly X is never lost to rounding.
    """
    values = iou(intersection, union, empty_union)
    count = max(1, len(values))
    result = {"mIoU": float(values.sum() / count), "oIoU": float(intersection.sum() / max(1, int(union.sum())))}
    for level in PRECISION_AT:
        left, right = 10 * intersection, round(10 * level) * union
        hits = (left > right) if strict else (left >= right) & (union > 0)
        result[f"Pr@{level}"] = float(hits.sum() / count)
    return result


@dataclass(frozen=True)
class Difference:
    """How much better one system scores than another on the same expressions, and how sure that is.

    difference: first - second. interval: its percentile interval. p: two-sided, of the difference being none.
    """

    difference: float
    interval: tuple[float, float]
    p: float


def bootstrap_intervals(
    intersection: np.ndarray,
    union: np.ndarray,
    image_ids: np.ndarray,
    samples: int,
    seed: int,
    level: float = 0.95,
    empty_union: float = 0.0,
) -> dict[str, tuple[float, float]]:
    """Give percentile bootstrap intervals of mIoU and oIoU, resampling whole images.

    Expressions about one image share its difficulty, so they are not independent; resampling images rather than
    expressions keeps the interval honest (cluster bootstrap; Davison and Hinkley 1997, section 3.8). `empty_union` is the
    IoU of an expression where nothing is there and nothing was marked.
    """
    means = _resampled(intersection, union, image_ids, samples, seed, empty_union)
    return {name: _percentiles(values, level) for name, values in means.items()}


def paired_bootstrap(
    first_intersection: np.ndarray,
    first_union: np.ndarray,
    second_intersection: np.ndarray,
    second_union: np.ndarray,
    image_ids: np.ndarray,
    samples: int,
    seed: int,
    level: float = 0.95,
    empty_union: float = 0.0,
) -> dict[str, Difference]:
    """Give differences in mIoU and oIoU of two systems; the int64 arrays (N,) hold the same expressions in the same order.

    Each resample draws the same images for both, so that what makes an image hard for both cancels out. The p value is
    twice the smaller share of resampled differences that lie at zero or on one side of it, plus one in count and
    samples (so never 0; Davison and Hinkley 1997, section 4.2), at most 1. `empty_union` is as in `bootstrap_intervals`.
    """
    first, second = (
        _resampled(intersection, union, image_ids, samples, seed, empty_union)
        for intersection, union in ((first_intersection, first_union), (second_intersection, second_union))
    )
    measured = [
        scores(intersection, union, empty_union=empty_union)
        for intersection, union in ((first_intersection, first_union), (second_intersection, second_union))
    ]
    found = {}
    for name in first:
        differences = first[name] - second[name]
        beyond = min(int((differences <= 0).sum()), int((differences >= 0).sum()))
        p = min(1.0, 2 * (beyond + 1) / (samples + 1))
        found[name] = Difference(measured[0][name] - measured[1][name], _percentiles(differences, level), p)
    return found


def _resampled(
    intersection: np.ndarray, union: np.ndarray, image_ids: np.ndarray, samples: int, seed: int, empty_union: float
) -> dict[str, np.ndarray]:
    """Give mIoU and oIoU of `samples` draws of whole images, float64 (samples,) each.

    The draws depend on the seed and the number of images alone: two systems with the same images meet the same draws.
    """
    images, member = np.unique(image_ids, return_inverse=True)
    per_image = np.stack(
        [
            np.bincount(member, weights=column, minlength=len(images))
            for column in (iou(intersection, union, empty_union), np.ones(len(union)), intersection, union)
        ]
    )
    random = np.random.default_rng(seed)
    draws = random.multinomial(len(images), np.full(len(images), 1 / len(images)), size=samples)
    total_iou, count, total_intersection, total_union = per_image @ draws.T.astype(np.float64)
    return {"mIoU": total_iou / count, "oIoU": total_intersection / np.maximum(total_union, 1)}


def _percentiles(values: np.ndarray, level: float) -> tuple[float, float]:
    """Give the interval that leaves out half of 1 - `level` of the values on each side."""
    low, high = np.percentile(values, [50 * (1 - level), 100 - 50 * (1 - level)])
    return float(low), float(high)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p values for being one family of tests, in the order given (Holm 1979, step-down).

    Below a level a, they claim something wrong anywhere in the family with a probability of at most a.
    """
    values = np.asarray(p_values, np.float64)
    order = np.argsort(values, kind="stable")
    stepped = np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1))
    adjusted = np.empty_like(values)
    adjusted[order] = np.minimum(stepped, 1.0)
    return [float(value) for value in adjusted]


def size_groups(shares: np.ndarray) -> tuple[list[str], tuple[float, float]]:
    """Give 'small', 'medium' or 'large' for each object, and the largest share that is small and that is medium.

    shares: float (N,), the share of its image that an object covers. The groups are thirds by rank; objects of equal
    size are in the same one, so that neither their order nor rounding decides. Without objects the bounds are 0.
    """
    if not len(shares):
        return [], (0.0, 0.0)
    bounds = np.quantile(shares, [1 / 3, 2 / 3], method="inverted_cdf")  # shares that occur, not between two
    return [SIZES[i] for i in np.searchsorted(bounds, shares)], (float(bounds[0]), float(bounds[1]))


def by_group(
    names: Sequence[str], intersection: np.ndarray, union: np.ndarray, strict: bool = False, empty_union: float = 0.0
) -> dict[str, dict[str, float]]:
    """Give `scores` for each distinct name (kind of expression, say), with the number of expressions as `count`."""
    labels = np.asarray(names)
    return {
        str(name): {
            "count": int((labels == name).sum()),
            **scores(intersection[labels == name], union[labels == name], strict, empty_union),
        }
        for name in np.unique(labels)
    }
