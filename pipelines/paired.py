"""Tables of several systems over the same expressions: brought together row by row, and tested in pairs."""

from __future__ import annotations

import sys
from itertools import combinations

import numpy as np
import pyarrow as pa

from ris_core.errors import DataError
from ris_core.evaluation.metrics import holm, paired_bootstrap
from ris_core.evaluation.params import EvaluateParams
from ris_core.options import Plain

EXPRESSION = ["sent_id", "image_id", "ref_id", "text", "kind"]  # what says that two rows are about the same
ANSWER = ["intersection", "union"]
MEASURES = ("mIoU", "oIoU")


def joined(tables: dict[str, pa.Table], where: str) -> pa.Table:
    """Give one row per expression that every system answered, ordered by sent_id.

    Columns EXPRESSION, and `<system>/intersection`, `<system>/union` of each. Says on stderr which tables had more;
    `where` names them there. Raises DataError if no expression is left.
    """
    result = None
    for system, table in tables.items():
        own = table.rename_columns({name: f"{system}/{name}" for name in ANSWER})
        result = own if result is None else result.join(own, EXPRESSION, join_type="inner")
    if result is None or not len(result):
        raise DataError(f"{where}: no expression was answered by all of {', '.join(tables)}; evaluate them again")
    for system, table in tables.items():
        if len(table) > len(result):
            dropped = f"{len(table) - len(result)} of {len(table)} expressions of {system}"
            print(f"{where}: {dropped} left out, as other systems did not answer them", file=sys.stderr)
    return result.sort_by("sent_id")


def pairs(table: pa.Table, systems: list[str], params: EvaluateParams, empty_union: float = 0.0) -> list[Plain]:
    """Give differences of each two systems on a joined table, with p values also adjusted for the number of pairs.

    empty_union: that of the protocol.
    """
    found: list[Plain] = []
    for first, second in combinations(systems, 2):
        answers = (*overlaps(table, first), *overlaps(table, second))
        measured = paired_bootstrap(
            *answers,
            table["image_id"].to_numpy(),
            params.bootstrap_samples,
            params.seed,
            empty_union=empty_union,
        )
        found.append(
            {
                "first": first,
                "second": second,
                **{
                    name: {"difference": each.difference, "interval": list(each.interval), "p": each.p}
                    for name, each in measured.items()
                },
            }
        )
    for name in MEASURES:
        for pair, adjusted in zip(found, holm([pair[name]["p"] for pair in found]), strict=True):
            pair[name]["p_holm"] = adjusted
    return found


def overlaps(table: pa.Table, system: str) -> tuple[np.ndarray, np.ndarray]:
    """Give intersections and unions of one system in a joined table, int64 (N,)."""
    return table[f"{system}/intersection"].to_numpy(), table[f"{system}/union"].to_numpy()


def headlines(splits: dict[str, Plain]) -> list[str]:
    """Give a line per split and pair for the terminal."""
    lines = []
    for split, part in splits.items():
        for pair in part["pairs"]:
            line = f"{split:6s} {pair['first']} - {pair['second']}:"
            for name in MEASURES:
                low, high = pair[name]["interval"]
                line += f"  {name} {pair[name]['difference']:+.3f} [{low:+.3f}, {high:+.3f}]"
                line += f" p {pair[name]['p']:.3f} (Holm {pair[name]['p_holm']:.3f})"
            lines.append(line)
    return lines
