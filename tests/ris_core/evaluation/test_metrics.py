"""Scores by hand, thresholds met to the last pixel, and intervals that respect images."""

from __future__ import annotations

import numpy as np
import pytest

from ris_core.evaluation.metrics import (
    PRECISION_AT,
    PROTOCOLS,
    SIZES,
    Protocol,
    bootstrap_intervals,
    by_group,
    generalised,
    holm,
    iou,
    paired_bootstrap,
    scores,
    size_groups,
)


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def test_scores_by_hand() -> None:
    """IoUs .9, .5, .1, 0: their mean, and the ratio of the sums, which the large object rules."""
    found = scores(ints(90, 10, 1, 0), ints(100, 20, 10, 5))
    assert found == {
        "mIoU": pytest.approx((0.9 + 0.5 + 0.1) / 4),
        "oIoU": pytest.approx(101 / 135),
        "Pr@0.5": 0.5,
        "Pr@0.6": 0.25,
        "Pr@0.7": 0.25,
        "Pr@0.8": 0.25,
        "Pr@0.9": 0.25,
    }


@pytest.mark.parametrize("level", PRECISION_AT)
@pytest.mark.parametrize("union", [10, 30, 70, 100_000_000_000])
def test_an_iou_of_exactly_the_level_counts_unless_strict(level: float, union: int) -> None:
    """Compared as integers: 0.7 * 10 and 0.3 * 3 are not what they seem in floating point."""
    exact = union // 10 * round(level * 10)
    name = f"Pr@{level}"
    assert scores(ints(exact), ints(union))[name] == 1.0
    assert scores(ints(exact), ints(union), strict=True)[name] == 0.0
    assert scores(ints(exact - 1), ints(union))[name] == 0.0
    assert scores(ints(exact + 1), ints(union), strict=True)[name] == 1.0


def test_an_empty_union_counts_as_nothing_found() -> None:
    assert iou(ints(0, 3), ints(0, 4)).tolist() == [0.0, 0.75]
    for strict in (False, True):
        found = scores(ints(0, 3), ints(0, 4), strict)
        assert found["mIoU"] == 0.375
        assert found["oIoU"] == 0.75
        assert found["Pr@0.5"] == 0.5
    assert set(scores(ints(0), ints(0)).values()) == {0.0}


def test_no_expressions_at_all() -> None:
    assert set(scores(ints(), ints()).values()) == {0.0}


def test_sums_do_not_overflow() -> None:
    many = np.full(3, 2**61, np.int64) // 10
    assert scores(many, many)["oIoU"] == 1.0


def test_groups_are_scored_apart() -> None:
    found = by_group(["b", "a", "b"], ints(1, 5, 3), ints(2, 5, 4))
    assert list(found) == ["a", "b"]
    assert found["a"] == {"count": 1, **scores(ints(5), ints(5))}
    assert found["b"] == {"count": 2, **scores(ints(1, 3), ints(2, 4))}
    strict = by_group(["a"], ints(1), ints(2), strict=True)
    assert strict["a"]["Pr@0.5"] == 0.0


def correlated(images: int = 60, each: int = 10) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every expression of an image has that image's difficulty: ten of them tell little more than one."""
    random = np.random.default_rng(4)
    ids = np.repeat(np.arange(images), each)
    union = random.integers(80, 120, len(ids))
    return (union * random.random(images)[ids]).astype(np.int64), union, ids


def test_intervals_hold_the_estimate_and_are_wider_where_images_are_alike_inside() -> None:
    intersection, union, ids = correlated()
    point = scores(intersection, union)
    by_image = bootstrap_intervals(intersection, union, ids, samples=400, seed=0)
    independent = bootstrap_intervals(intersection, union, np.arange(len(ids)), samples=400, seed=0)
    assert set(by_image) == {"mIoU", "oIoU"}
    for name in by_image:
        low, high = by_image[name]
        assert 0 <= low < point[name] < high <= 1
        assert high - low > 2 * (independent[name][1] - independent[name][0])
    # Sixty images of uniform difficulty: the standard error of their mean is known.
    expected = 2 * 1.96 * iou(intersection, union)[::10].std() / np.sqrt(60)
    assert by_image["mIoU"][1] - by_image["mIoU"][0] == pytest.approx(expected, rel=0.15)


def test_intervals_depend_on_the_seed_alone() -> None:
    data = correlated()
    assert bootstrap_intervals(*data, samples=50, seed=3) == bootstrap_intervals(*data, samples=50, seed=3)
    assert bootstrap_intervals(*data, samples=50, seed=3) != bootstrap_intervals(*data, samples=50, seed=4)


def test_a_wider_level_gives_a_wider_interval() -> None:
    data = correlated()
    narrow, wide = (bootstrap_intervals(*data, samples=400, seed=0, level=level)["mIoU"] for level in (0.5, 0.99))
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


def test_one_image_has_no_spread() -> None:
    found = bootstrap_intervals(ints(1, 3), ints(4, 4), ints(7, 7), samples=20, seed=0)
    assert found == {"mIoU": (0.5, 0.5), "oIoU": (0.5, 0.5)}


def test_a_difference_is_that_of_the_scores_and_its_interval_holds_it() -> None:
    first, union, ids = correlated()
    second = (0.9 * first).astype(np.int64)
    found = paired_bootstrap(first, union, second, union, ids, samples=400, seed=0)
    ahead, behind = scores(first, union), scores(second, union)
    assert list(found) == ["mIoU", "oIoU"]
    for name, each in found.items():
        assert each.difference == pytest.approx(ahead[name] - behind[name])
        assert each.interval[0] < each.difference < each.interval[1]
        assert each.p == 2 / 401  # no resample says otherwise, and still it is not 0
    mirrored = paired_bootstrap(second, union, first, union, ids, samples=400, seed=0)
    for name, each in found.items():
        assert mirrored[name].difference == -each.difference
        assert mirrored[name].interval == pytest.approx((-each.interval[1], -each.interval[0]))
        assert mirrored[name].p == each.p


def test_what_makes_images_hard_for_both_cancels_out() -> None:
    """Both fail on the same images: either's interval is wide, that of their difference is not."""
    first, union, ids = correlated()
    second = np.maximum(first - 2, 0)
    alone = bootstrap_intervals(first, union, ids, samples=400, seed=0)["mIoU"]
    paired = paired_bootstrap(first, union, second, union, ids, samples=400, seed=0)["mIoU"]
    assert paired.interval[1] - paired.interval[0] < 0.1 * (alone[1] - alone[0])
    assert paired.p < 0.01


def test_the_same_answers_do_not_differ() -> None:
    first, union, ids = correlated()
    for each in paired_bootstrap(first, union, first, union, ids, samples=100, seed=0).values():
        assert (each.difference, each.interval, each.p) == (0.0, (0.0, 0.0), 1.0)


def test_p_values_are_small_by_chance_as_rarely_as_they_say() -> None:
    """Two systems that are equally good, on images that are hard for both: 5 % of p values are below 0.05."""
    low = 0
    for seed in range(200):
        random = np.random.default_rng(seed)
        ids, union = np.repeat(np.arange(50), 4), np.full(200, 1000)
        hard = random.random(50)[ids]
        answers = [(1000 * np.clip(hard + random.normal(0, 0.1, 50)[ids], 0, 1)).astype(np.int64) for _ in range(2)]
        low += paired_bootstrap(answers[0], union, answers[1], union, ids, samples=200, seed=seed)["mIoU"].p < 0.05
    assert 2 <= low <= 22


def test_systems_with_other_expressions_cannot_be_paired() -> None:
    first, union, ids = correlated()
    with pytest.raises(ValueError, match="same length"):
        paired_bootstrap(first, union, first[1:], union[1:], ids, samples=10, seed=0)


def test_holm_by_hand() -> None:
    """Sorted .01 .02 .03 .04 times 4 3 2 1 are .04 .06 .06 .04; the last may not be below the one before."""
    assert holm([0.02, 0.01, 0.04, 0.03]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.6, 0.5]) == [1.0, 1.0]
    assert holm([0.03]) == [0.03]
    assert holm([]) == []


def test_sizes_are_thirds_and_equals_stay_together() -> None:
    names, bounds = size_groups(np.array([0.5, 0.1, 0.2, 0.6, 0.4, 0.3]))
    assert names == ["large", "small", "small", "large", "medium", "medium"]
    assert bounds == (0.2, 0.4)
    assert size_groups(np.array([0.1, 0.2, 0.2, 0.2, 0.2, 0.3])) == ([*["small"] * 5, "large"], (0.2, 0.2))
    assert size_groups(np.full(5, 0.25)) == (["small"] * 5, (0.25, 0.25))
    assert size_groups(np.zeros(0)) == ([], (0.0, 0.0))


@pytest.mark.parametrize("count", [1, 2, 3, 10, 300, 301, 302])
def test_sizes_do_not_depend_on_the_order(count: int) -> None:
    shares = np.linspace(0.01, 0.7, count)
    names, bounds = size_groups(shares)
    numbers = [names.count(name) for name in SIZES]
    assert max(numbers) - min(numbers) <= 1
    assert names == sorted(names, key=SIZES.index)
    order = np.random.default_rng(0).permutation(count)
    assert size_groups(shares[order]) == ([names[i] for i in order], bounds)


def test_the_named_protocols_are_those_of_the_papers() -> None:
    assert {
        "ours": Protocol("ours", "all", "sent", 0.5, "original", False),
        "cris": Protocol("cris", "all", "sent", 0.35, "original", True, "corners"),
        "cris_val": Protocol("cris_val", "first", "sent", 0.35, "original", True, "corners"),
        "lavt": Protocol("lavt", "all", "raw", 0.5, 480, False),
        "global_local": Protocol("global_local", "all", "raw", 0.5, "original", False, skip_unanswered=True),
        "grefcoco": Protocol("grefcoco", "all", "raw", 0.5, "original", False, least_area=50, empty_union=1.0),
    } == PROTOCOLS


def test_generalised_scores_are_those_of_gres() -> None:
    """Six expressions: rightly and wrongly told absent, found, half found, missed, and missed by saying it is absent.

    As henghuiding/ReLA counts them (gres_model/evaluation/refer_evaluation.py): no target and none told is an IoU of 1 and no
    pixel; no target and something told is 0, and its pixels are in the union.
    """
    intersection = np.array([0, 0, 80, 50, 0, 0])
    union = np.array([0, 70, 80, 100, 120, 60])
    area = np.array([0, 70, 80, 50, 60, 0])
    has_target = np.array([False, False, True, True, True, True])
    found = scores(intersection, union, empty_union=1.0)
    assert found["mIoU"] == pytest.approx((1 + 0 + 1 + 0.5 + 0 + 0) / 6)  # gIoU
    assert found["oIoU"] == pytest.approx(130 / 430)  # cIoU
    assert scores(intersection, union)["mIoU"] == pytest.approx(1.5 / 6)
    assert generalised(intersection, union, area, has_target) == {
        "no_target": 2,
        "N_acc": 0.5,
        "T_acc": 0.75,
        "Pr@0.5": 0.5,
        **dict.fromkeys(("Pr@0.6", "Pr@0.7", "Pr@0.8", "Pr@0.9"), 0.25),
    }
    none = generalised(intersection[2:], union[2:], area[2:], has_target[2:])
    assert (none["no_target"], none["N_acc"]) == (0, 0.0)


def test_saying_rightly_that_nothing_is_there_counts_in_intervals_and_differences() -> None:
    intersection, union, images = np.zeros(8, np.int64), np.zeros(8, np.int64), np.arange(8)
    assert bootstrap_intervals(intersection, union, images, 20, 0, empty_union=1.0)["mIoU"] == (1.0, 1.0)
    assert bootstrap_intervals(intersection, union, images, 20, 0)["mIoU"] == (0.0, 0.0)
    wrong = paired_bootstrap(intersection, union, intersection, union + 9, images, 20, 0, empty_union=1.0)["mIoU"]
    assert (wrong.difference, wrong.interval) == (1.0, (1.0, 1.0))
