"""Predictions as a file: one mask per expression, in COCO's result format with the keys of expressions.

    {"info": {"dataset": "refcoco_unc", "split": "val", "protocol": {...}, ...},
     "annotations": [{"sent_id": 7, "ref_id": 3, "image_id": 1, "ann_id": 9, "text": "left guy",
                      "segmentation": {"size": [480, 640], "counts": "..."}, "score": 0.93}, ...]}

COCO's results (cocodataset.org/#format-results) are the list alone, which is read as well. `info.protocol` tells how masks came
about, with fields of `metrics.Protocol` or the name of one: all of them, where an evaluation here wrote it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ris_core.data import masks
from ris_core.data.refer.rows import misfits
from ris_core.data.refer.untrusted import parse_json, read_input
from ris_core.errors import DataError, short
from ris_core.evaluation.finished import Finished
from ris_core.evaluation.metrics import PROTOCOLS, Protocol
from ris_core.files import replaced_file
from ris_core.options import Plain

CAP_BYTES = 2**30  # of a file; all 142,210 expressions of RefCOCO take a tenth of it as run lengths
ENTRIES = "annotations"
REMEDY = "See docs/comparing.md for the form of the file."

# What the fields of a protocol may be that say how a mask came about; nothing is known of one that is not told.
_TELLS: Mapping[str, tuple[type, ...]] = {
    "name": (str,),
    "sentences": (str,),
    "text": (str,),
    "threshold": (int, float),
    "resolution": (str, int),
    "upsampling": (str,),
}


@dataclass(frozen=True)
class Header:
    """What a file says of all its masks: for which data they are, and of their protocol what is known."""

    dataset: str | None = None
    split: str | None = None
    protocol: Plain = field(default_factory=dict)

    @property
    def side(self) -> int | None:
        """Give the side of the squares that masks are, None where each has the size of its image."""
        resolution = self.protocol.get("resolution", "original")
        return None if resolution == "original" else int(resolution)

    @property
    def only_first(self) -> bool:
        """Tell whether only the first sentence of each referent is answered."""
        return bool(self.protocol.get("sentences") == "first")


@dataclass(frozen=True, slots=True)
class Entry:
    """A prediction of a file: what says which expression it is about, and its `segmentation`, which nobody looked at."""

    where: str
    sent_id: int | None
    ref_id: int | None
    image_id: int | None
    sentence_index: int | None
    text: str | None
    segmentation: Any
    score: float


def write_predictions(path: Path, info: Plain, protocol: Protocol, entries: Iterable[Plain]) -> None:
    """Write predictions, an entry a line; the file appears whole or not at all. `info` says where they are from."""
    with replaced_file(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write('{"info": ' + json.dumps({**info, "protocol": asdict(protocol)}) + f',\n"{ENTRIES}": [')
        for number, entry in enumerate(entries):
            file.write((",\n" if number else "\n") + json.dumps(entry, ensure_ascii=False))
        file.write("\n]}\n")


def entry_of(row: Plain, ann_id: int, size: tuple[int, int], counts: str) -> Plain:
    """Make an entry of a row of `evaluator.TABLE_SCHEMA` and the run lengths of its mask of so many rows and columns."""
    return {
        "sent_id": row["sent_id"],
        "ref_id": row["ref_id"],
        "image_id": row["image_id"],
        "ann_id": ann_id,
        "text": row["text"],
        "segmentation": {"size": list(size), "counts": counts} if row["found"] else None,
        "score": round(row["score"], 5),
    }


def read_predictions(path: Path) -> tuple[Header, list[Entry], list[str]]:
    """Read a file's header, the entries whose keys can be used, and what is wrong with the header and the other entries.

    Raises DataError when the file as a whole cannot be used: missing, of another kind, larger than a gigabyte, damaged.
    """
    content, _ = read_input(path.parent, path.name, REMEDY, CAP_BYTES)
    found = parse_json(content, path, REMEDY)
    info, entries = found.get("info", {}) if isinstance(found, dict) else {}, found
    if isinstance(found, dict):
        entries = found.get(ENTRIES)
    if not isinstance(entries, list):
        told = f"its keys are {', '.join(map(short, list(found)[:6]))}" if isinstance(found, dict) else short(found)
        raise DataError(f"{path} is neither a list of predictions nor has it one as '{ENTRIES}': {told}. {REMEDY}")
    header, problems = _header(info)
    usable = []
    for number, entry in enumerate(entries):
        parsed = _entry(entry, number)
        if isinstance(parsed, Entry):
            usable.append(parsed)
        else:
            problems.append(parsed)
    return header, usable, problems


def _header(info: object) -> tuple[Header, list[str]]:
    """Give what is told of all masks, and what is wrong with it."""
    if not isinstance(info, dict):
        return Header(), [f"info: expected a dict, found {short(info)}"]
    told = info.get("protocol", {})
    if isinstance(told, str) and told in PROTOCOLS:
        told = asdict(PROTOCOLS[told])
    elif isinstance(told, str):
        return Header(), [f"info.protocol: there is no protocol {short(told)}; there are {', '.join(PROTOCOLS)}"]
    if not isinstance(told, dict):
        return Header(), [f"info.protocol: expected a name or a dict, found {short(told)}"]
    problems = [f"info: {fault}" for fault in _wrong(info, {"dataset": (str,), "split": (str,)})]
    problems += [f"info.protocol: {fault}" for fault in _wrong(told, _TELLS)]
    known = list(dict.fromkeys(protocol.resolution for protocol in PROTOCOLS.values()))
    if told.get("resolution", "original") not in known:
        there = " or ".join(map(str, known))
        told_of = f"'resolution' is {short(told['resolution'])}, and protocols score masks of resolution {there}"
        problems.append(f"info.protocol: {told_of}: bring the masks to their images' sizes, by nearest neighbours")
    if problems:
        return Header(), problems
    return Header(info.get("dataset"), info.get("split"), {key: told[key] for key in _TELLS if key in told}), []


def _wrong(entry: Plain, kinds: Mapping[str, tuple[type, ...]]) -> list[str]:
    """Tell what is wrong with those of some keys that are there."""
    return misfits(entry, {key: kind for key, kind in kinds.items() if key in entry})


_KEYS: Mapping[str, tuple[type, ...]] = {
    **dict.fromkeys(("sent_id", "ref_id", "image_id", "sentence_index"), (int,)),
    "text": (str,),
    "score": (int, float),
}


def _entry(entry: object, number: int) -> Entry | str:
    """Give an entry whose keys are of the right kinds, or what is wrong with it."""
    where = f"entry {number}"
    if not isinstance(entry, dict):
        return f"{where}: expected a dict, found {short(entry)}"
    wrong = _wrong(entry, _KEYS)
    if "sent_id" not in entry and "ref_id" not in entry:
        wrong.append("no 'sent_id' and no 'ref_id': one of them says which expression it is about")
    if "segmentation" not in entry:
        wrong.append("no 'segmentation' (null where there was nothing to choose from)")
    if wrong:
        return f"{where}: {'; '.join(wrong)}"
    key = next(key for key in ("sent_id", "ref_id") if key in entry)
    keys = {name: entry.get(name) for name in ("sent_id", "ref_id", "image_id", "sentence_index", "text")}
    score = float(entry.get("score", 1.0))
    return Entry(f"{where} ({key} {entry[key]})", **keys, segmentation=entry["segmentation"], score=score)


def finished(entry: Entry, height: int, width: int) -> Finished:
    """Make a finished mask of an entry, its union of parts at (height, width) pixels. Raises DataError if it is none."""
    if entry.segmentation is None:
        return Finished(None, entry.score)
    if entry.segmentation == []:  # as tools write the polygons of an empty mask
        return empty(height, width, entry.score)
    return Finished(masks.segmentation_to_counts(entry.segmentation, height, width), entry.score)


def empty(height: int, width: int, score: float = 0.0) -> Finished:
    """Give a mask without any pixel."""
    return Finished(masks.encode(np.zeros((height, width), np.uint8)), score)
