"""The tables of the report page, as plain rows and columns: what stands beside what, and how a number is written."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ris_core.options import Plain

MAIN_PRECISION = ("Pr@0.5", "Pr@0.7", "Pr@0.9")  # of the table of all systems; all five stand in a system's own
BOUNDS = {  # what a system that chooses among proposals could have scored
    "upper_bound": "best of its proposals, each time",
    "oracle_proposals": "choosing among the true objects",
}
BEHAVIOUR = {  # test -> measure -> what it means; behaviour.py has the definitions
    "mirror": {
        "cases": "expressions with a side, on the mirrored image",
        "iou": "IoU of the answer, mirrored back, with the one to the plain image, left and right swapped in the text: high "
        "if sides are understood",
        "iou_unswapped": "the same without swapping the words: low if sides are understood",
        "iou_plain": "expressions without left or right, on the mirrored image: high if only the words decide",
    },
    "swap": {
        "cases": "pairs of expressions about two objects of an image that name another colour or shape",
        "moved": "the share where the two masks differ (IoU below 0.5)",
        "followed": "the share where each mask is nearer to its own object",
    },
    "absent": {
        "cases": "expressions about something that is not in the image",
        "score_present": "mean score of answers about what is there",
        "score_absent": "mean score of answers about what is not",
        "auroc": "the chance that the former scores higher; 0.5 means the score tells nothing",
        "empty_absent": "the share of what is not there that is answered with an empty mask",
    },
}


def by_dataset(runs: Iterable[Plain]) -> dict[str, list[Plain]]:
    """Put runs under the names of their datasets."""
    found: dict[str, list[Plain]] = {}
    for run in runs:
        found.setdefault(run["dataset"], []).append(run)
    return found


def overviews(runs: Sequence[Plain]) -> list[Plain]:
    """Make a table of the systems of one dataset for each protocol, the first protocol first.

    `scores` of a row are {split: scores}, of the splits that its system was evaluated on; `bounds` are rows of their own.
    The random object's are the same for all systems, and taken from the first that has the split.
    """
    tables = []
    for name in first_seen(run["metrics"] for run in runs):
        scored = [run for run in runs if name in run["metrics"]]
        splits = first_seen(run["metrics"][name] for run in scored)
        rows = [
            {
                "system": run["system"],
                "cost": run["cost"],
                "waiting": run["waiting"],
                "scores": run["metrics"][name],
                "bounds": bounds(run["metrics"][name]),
            }
            for run in scored
        ]
        random = {
            split: next(row["scores"][split]["random_object"] for row in rows if split in row["scores"])
            for split in splits
        }
        settings = scored[0]["protocols"][name]
        tables.append({"protocol": settings, "splits": splits, "rows": rows, "random": random})
    return tables


def bounds(splits: dict[str, Plain]) -> list[Plain]:
    """Give what one system could have scored, as far as measured: rows with a label and {split: mIoU and oIoU}."""
    return [
        {"label": label, "scores": {split: scores[name] for split, scores in splits.items() if name in scores}}
        for name, label in BOUNDS.items()
        if any(name in scores for scores in splits.values())
    ]


def unanswered(rows: Iterable[Plain]) -> list[str]:
    """Tell, for each system that had nothing to choose from for some expressions, how many that were."""
    found = []
    for row in rows:
        counts = [
            f"{scores['unanswered']} of {scores['expressions']} in {split}"
            for split, scores in row["scores"].items()
            if scores.get("unanswered")
        ]
        if counts:
            found.append(f"{row['system']}: {', '.join(counts)}")
    return found


def devices(runs: Iterable[Plain]) -> list[str]:
    """List devices on which systems were timed, with the rate of matrix products there, in GFLOP/s, beside each timing."""
    found: dict[str, list[str]] = {}
    for run in runs:
        if run["waiting"]:
            rate = significant(run["waiting"]["gflop_per_s_matmul"])
            found.setdefault(run["waiting"]["device"], []).append(f"{run['system']} {rate}")
    return [f"{device} ({', '.join(rates)})" for device, rates in found.items()]


def sliced(runs: Sequence[Plain], key: str, groups: Sequence[str]) -> Plain | None:
    """Give mIoU of the systems of one dataset by group of expressions, under the first protocol; None if there are none.

    `key` names the slices in a split's scores. Columns are {split: [(group, number of expressions, note)]}, rows are
    (system, numbers in that order, None where there is none). A note is a group's range of sizes.
    """
    protocol = first_seen(run["metrics"] for run in runs)[0]
    scored = [(run["system"], run["metrics"].get(protocol, {})) for run in runs]
    columns: dict[str, list[tuple[str, int, str]]] = {}
    for split in first_seen(splits for _, splits in scored):
        known = [splits[split][key] for _, splits in scored if key in splits.get(split, {})]
        for group in groups:
            part = next((slices for slices in known if group in slices), None)
            if part is not None:
                columns.setdefault(split, []).append((group, part[group]["count"], size_range(group, part)))
    if not columns:
        return None
    rows = []
    for system, splits in scored:
        slices = {split: splits.get(split, {}).get(key, {}) for split in columns}
        values = [slices[split].get(group, {}).get("mIoU") for split in columns for group, _, _ in columns[split]]
        rows.append((system, values))
    return {"protocol": protocol, "columns": columns, "rows": rows}


def size_range(group: str, slices: Plain) -> str:
    """Give the range of object sizes that a group holds, if it is one of sizes: '≤ 4.1 %' (of the image)."""
    if "bounds" not in slices:
        return ""
    low, high = (f"{100 * bound:.2g} %" for bound in slices["bounds"])
    return {"small": f"≤ {low}", "medium": f"≤ {high}", "large": f"> {high}"}[group]


def kinds(runs: Sequence[Plain]) -> Plain | None:
    """Give `sliced` by kind of expression, all kinds that occur."""
    scores = (part for run in runs for splits in run["metrics"].values() for part in splits.values())
    return sliced(runs, "by_kind", first_seen(part["by_kind"] for part in scores))


def sizes(runs: Sequence[Plain]) -> Plain | None:
    """Give `sliced` by size of the object, from small to large."""
    return sliced(runs, "by_size", ("small", "medium", "large"))


def behaviours(runs: Sequence[Plain]) -> Plain | None:
    """Give what behavioural tests found of the systems of one dataset, as `sliced`; None if no system was tested."""
    tested = [(run["system"], run["behaviour"]) for run in runs if run["behaviour"]]
    if not tested:
        return None
    columns = {test: list(measures) for test, measures in BEHAVIOUR.items()}
    rows = [
        (system, [found.get(test, {}).get(name) for test in columns for name in columns[test]])
        for system, found in tested
    ]
    return {"columns": columns, "rows": rows}


def first_seen(names: Iterable[Iterable[str]]) -> list[str]:
    """Give all names, in the order in which they first appear."""
    return list(dict.fromkeys(name for some in names for name in some))


def score(value: float | None) -> str:
    """Write a number from 0 to 1 with three digits, a count as it is, and a dash for what was not measured."""
    if value is None:
        return "–"
    return str(value) if isinstance(value, int) else f"{value:.3f}"


def p_value(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def significant(value: float) -> str:
    """Write three digits where there are as many, never an exponent."""
    if value == 0:
        return "0"
    digits = next((digits for digits, least in enumerate((100, 10, 1, 0.1)) if abs(value) >= least), 4)
    return f"{value:,.{digits}f}"


def millions(value: int) -> str:
    """Write a number of parameters."""
    return f"{significant(value / 1e6)}\u00a0M" if value else "0"
