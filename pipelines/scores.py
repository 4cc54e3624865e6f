"""From tables of expressions to the numbers that results/ keeps, and to the lines a terminal shows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from ris_core.data.text import NONE
from ris_core.evaluation.metrics import Protocol, bootstrap_intervals, by_group, generalised, scores, size_groups
from ris_core.evaluation.params import EvaluateParams
from ris_core.options import Plain

# Beside the score of a split: sentences exchanged within an image, and over the whole split; the coarse map of a system
# that has one, scored as if it were the mask; a zero-shot system choosing among the annotated objects, and the best of
# the proposals that it chose among.
SHUFFLED = ("shuffled_in_image", "shuffled_across")
LOCATED = "located"
ORACLE = "oracle_proposals"
BEST = "upper_bound"


def sorted_splits(known: Iterable[str]) -> list[str]:
    """List all splits but train, validation first."""
    return sorted((split for split in known if split != "train"), key=lambda split: (split != "val", split))


def summaries(
    tables: Mapping[str, pa.Table], protocols: Sequence[Protocol], splits: Sequence[str], params: EvaluateParams
) -> Plain:
    """Give the scores of a model, by protocol and split, of the tables of all jobs; controls stand beside their split's."""
    metrics: Plain = {}
    for protocol in protocols:
        for split in splits:
            job = f"{protocol.name}/{split}"
            part = summary(tables[job], protocol, params)
            if f"{job}/{BEST}" in tables:
                part[BEST] = short(tables[f"{job}/{BEST}"], protocol)
            metrics.setdefault(protocol.name, {})[split] = part
    for control in (*SHUFFLED, LOCATED, ORACLE):
        if control in tables and tables[control].num_rows:  # none where no image has two referents in this split
            metrics[protocols[0].name][params.shuffled_split][control] = short(tables[control], protocols[0])
    return metrics


def summary(table: pa.Table, protocol: Protocol, params: EvaluateParams) -> Plain:
    """Give all scores of one split: ours with intervals, a random object's, and slices by kind and, of what is there, by size."""
    unanswered = table.num_rows - int(table["found"].to_numpy().sum())
    table = counted(table, protocol)
    column = {name: table[name].to_numpy() for name in table.column_names if name not in ("text", "kind", "split")}
    intersection, union = column["intersection"], column["union"]
    has_target = column["object_share"] > 0  # always, but in generalised data
    intervals = bootstrap_intervals(
        intersection,
        union,
        column["image_id"],
        params.bootstrap_samples,
        params.seed,
        empty_union=protocol.empty_union,
    )
    kinds = np.array(table["kind"].to_pylist(), object)
    sized = kinds != NONE
    sizes, bounds = size_groups(column["object_share"][sized])

    def groups(names: Sequence[str], of: np.ndarray) -> dict[str, dict[str, float]]:
        found = by_group(names, intersection[of], union[of], protocol.strict, protocol.empty_union)
        return {name: {key: part[key] for key in ("count", "mIoU", "oIoU")} for name, part in found.items()}

    found = rounded(
        {
            "expressions": len(table),
            "images": len(np.unique(column["image_id"])),
            **({"unanswered": unanswered} if unanswered else {}),
            **scores(intersection, union, protocol.strict, protocol.empty_union),
            **(generalised(intersection, union, column["area"], has_target) if protocol.is_generalised else {}),
            **{f"{name}_95": list(interval) for name, interval in intervals.items()},
            "right_object": float(column["right_object"][has_target].mean()) if has_target.any() else 0.0,
            "random_object": {
                "mIoU": float(column["random_iou"].mean()),
                "oIoU": float(column["random_intersection"].sum() / column["random_union"].sum()),
            },
            "by_kind": groups(kinds.tolist(), np.full(len(kinds), True)),
            "by_size": {"bounds": list(bounds), **groups(sizes, sized)},
        }
    )
    assert isinstance(found, dict)
    return found


def counted(table: pa.Table, protocol: Protocol) -> pa.Table:
    """Keep rows that a protocol counts: under one that skips them, not those where there was nothing to choose from."""
    return table.filter(table["found"]) if protocol.skip_unanswered else table


def short(table: pa.Table, protocol: Protocol) -> dict[str, float]:
    """Give mIoU and oIoU of a control."""
    table = counted(table, protocol)
    found = scores(table["intersection"].to_numpy(), table["union"].to_numpy(), protocol.strict, protocol.empty_union)
    return rounded({name: found[name] for name in ("mIoU", "oIoU")})


def rounded(value: Any) -> Any:
    """Round floats to five digits, so that a committed metrics file does not change with the last bit of a sum."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return round(value, 5) if isinstance(value, float) else value


def headline(protocol: str, split: str, part: Plain) -> str:
    """Give one line for the terminal."""
    low, high = part["mIoU_95"]
    line = f"{protocol:9s} {split:6s} mIoU {part['mIoU']:.3f} [{low:.3f}, {high:.3f}]  oIoU {part['oIoU']:.3f}  "
    line += f"Pr@0.5 {part['Pr@0.5']:.3f}  right object {part['right_object']:.3f}  "
    line += f"random object {part['random_object']['mIoU']:.3f} / {part['random_object']['oIoU']:.3f}"
    if "N_acc" in part:
        line += f"  N-acc {part['N_acc']:.3f}" if part["no_target"] else "  N-acc - (every expression has a target)"
        line += f"  T-acc {part['T_acc']:.3f}"
    for control in (*SHUFFLED, LOCATED, ORACLE, BEST):
        if control in part:
            line += f"  {control} {part[control]['mIoU']:.3f}"
    return line
