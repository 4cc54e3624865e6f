"""Predictions of a file, each brought to the expression of a split that it is about; what does not fit is told at once."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ris_core.data.dataset import ShardStore
from ris_core.errors import DataError, list_problems, short
from ris_core.evaluation.finished import Finished, Key
from ris_core.evaluation.predictions import REMEDY, Entry, Header, empty, finished, read_predictions

SHOWN = 4  # problems of one kind


@dataclass(frozen=True, slots=True)
class Expression:
    """An expression of a dataset, as entries may name it: `index` is its place among its referent's, from 0."""

    split: str
    image_id: int
    height: int
    width: int
    ref_id: int
    sent_id: int
    index: int
    sent: str
    raw: str

    @property
    def key(self) -> Key:
        """Give what it is known by."""
        return self.ref_id, self.sent_id

    def says(self, text: str) -> bool:
        """Tell whether a text is its own, as typed or as cleaned; case and blanks do not count."""
        return plain(text) in (plain(self.sent), plain(self.raw))


@dataclass(frozen=True)
class Predictions:
    """A file's predictions of a split: finished masks of all its expressions (of the first of each referent, see `header`).

    missing: how many of them the file does not have, whose masks are empty. elsewhere: its entries of other splits, which
    are left out, by split.
    """

    header: Header
    given: dict[Key, Finished]
    missing: int
    elsewhere: dict[str, int]


class Problems:
    """What is wrong with entries, by kind: of each kind the first few are shown, so that none hides another."""

    def __init__(self) -> None:
        self.found: defaultdict[str, list[str]] = defaultdict(list)

    def add(self, kind: str, told: str) -> None:
        """Take one down."""
        self.found[kind].append(told)

    def lines(self) -> list[str]:
        """List them for a message."""
        lines = []
        for kind, told in self.found.items():
            lines += told[:SHOWN]
            if len(told) > SHOWN:
                lines.append(f"and {len(told) - SHOWN} more {kind}")
        return lines


def plain(text: str) -> str:
    """Give a text as it is compared."""
    return " ".join(text.lower().split())


class Expressions:
    """The expressions of some splits, by what entries name them by."""

    def __init__(self, store: ShardStore, splits: Iterable[str]):
        self.of_sent: defaultdict[int, list[Expression]] = defaultdict(list)
        self.of_ref: defaultdict[int, list[Expression]] = defaultdict(list)
        for split in splits:
            for image in store.images_of(split):
                self._add(store.row(int(image)), split)

    def _add(self, row: dict[str, Any], split: str) -> None:
        for ref in row["refs"]:
            if ref["split"] == split:
                for index, each in enumerate(ref["sentences"]):
                    found = Expression(
                        *(split, row["image_id"], row["height"], row["width"], ref["ref_id"]),
                        *(each["sent_id"], index, each["sent"], each["raw"]),
                    )
                    self.of_sent[found.sent_id].append(found)
                    self.of_ref[found.ref_id].append(found)

    def meant(self, entry: Entry) -> list[Expression] | str:
        """Give the expressions that an entry may be about, or what is wrong; none, if nothing here has its id.

        More than one where a referent has the same text several times.
        """
        if entry.sent_id is not None:
            found = self.of_sent.get(entry.sent_id, [])
            if entry.ref_id is not None and len(found) > 1:
                found = [each for each in found if each.ref_id == entry.ref_id]
            if len(found) > 1:
                refs = ", ".join(str(each.ref_id) for each in found)
                return f"{entry.where} may mean a sentence of each of the refs {refs}: give its ref_id, too"
            return found
        assert entry.ref_id is not None
        found = self.of_ref.get(entry.ref_id, [])
        if not found:
            return found
        if entry.sentence_index is not None:
            chosen = [each for each in found if each.index == entry.sentence_index]
            return (
                chosen
                or f"{entry.where}: 'sentence_index' is {entry.sentence_index}, and its ref has {len(found)} sentences"
            )
        if entry.text is not None:
            chosen = [each for each in found if each.says(entry.text)]
            told = ", ".join(short(each.sent) for each in found)
            return chosen or f"{entry.where}: its ref has no sentence {short(entry.text)}, but {told}"
        return (
            found
            if len(found) == 1
            else f"{entry.where}: its ref has {len(found)} sentences: give sent_id, sentence_index or text"
        )


def contradictions(entry: Entry, expression: Expression) -> list[str]:
    """Tell what an entry says of itself that is not so of the expression which it names."""
    told = [
        f"its {name} is {getattr(entry, name)}, not {getattr(expression, name)}"
        for name in ("ref_id", "image_id")
        if getattr(entry, name) not in (None, getattr(expression, name))
    ]
    if entry.sentence_index not in (None, expression.index):
        told.append(f"its sentence_index is {entry.sentence_index}, not {expression.index}")
    if entry.text is not None and not expression.says(entry.text):
        told.append(f"its text is {short(entry.text)}, not {short(expression.sent)}")
    return told


def read(path: Path, store: ShardStore, dataset: str, split: str, *, missing_as_empty: bool = False) -> Predictions:
    """Read a file of predictions of a split's expressions, in any order.

    Raises DataError with everything that is wrong: with the file, its header, its entries; and for expressions that are
    missing, unless these count as answered with an empty mask.
    """
    header, entries, wrong = read_predictions(path)
    problems = Problems()
    for told in wrong:
        problems.add("that cannot be read", told)
    for name, asked in (("dataset", dataset), ("split", split)):
        said = getattr(header, name)
        if said not in (None, asked):
            problems.add("contradictions", f"info: its {name} is {short(said)}, and it is scored on {asked}")
    here = Expressions(store, [split])
    matched = _Matched(here, store, split, header.side, problems)
    for entry in entries:
        matched.add(entry)
    matched.share()
    wanted = [each for found in here.of_ref.values() for each in (found[:1] if header.only_first else found)]
    missing = [each for each in wanted if each.key not in matched.by]
    if missing and not missing_as_empty:
        ids = ", ".join(str(each.sent_id) for each in missing[:SHOWN])
        more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
        told = f"{len(missing)} of {len(wanted)} expressions of {split} are missing: sent_id {ids}{more}"
        problems.add("that are missing", f"{told} (with --missing zero they count as unanswered)")
    if problems.found:
        raise DataError(list_problems(f"{path} cannot be scored on {dataset} {split}", problems.lines(), REMEDY))
    for each in missing:
        matched.given[each.key] = empty(*size_of(each, header.side))
    return Predictions(header, matched.given, len(missing), dict(matched.elsewhere))


def size_of(expression: Expression, side: int | None) -> tuple[int, int]:
    """Give the rows and columns that a mask has, of squares with that side if there is one."""
    return (expression.height, expression.width) if side is None else (side, side)


class _Matched:
    """Entries brought to expressions, one after the other; what is wrong goes to `problems`."""

    def __init__(self, here: Expressions, store: ShardStore, split: str, side: int | None, problems: Problems):
        self.here, self.store, self.split, self.side, self.problems = here, store, split, side, problems
        self.given: dict[Key, Finished] = {}
        self.by: dict[Key, Entry] = {}
        self.elsewhere: Counter[str] = Counter()
        self._shared: list[tuple[Sequence[Expression], Finished]] = []
        self._others: Expressions | None = None

    def add(self, entry: Entry) -> None:
        """Take one entry in."""
        meant = self.here.meant(entry)
        if isinstance(meant, str):
            self.problems.add("that name no expression", meant)
        elif not meant:
            self._add_stranger(entry)
        elif told := contradictions(entry, meant[0]):
            self.problems.add("that contradict the data", f"{entry.where}: {'; '.join(told)}")
        else:
            free = [each for each in meant if each.key not in self.by]
            if not free:
                earlier = self.by[meant[-1].key].where
                self.problems.add("duplicates", f"{entry.where} is about the same expression as {earlier}")
                return
            self.by[free[0].key] = entry
            try:
                self.given[free[0].key] = finished(entry, *size_of(free[0], self.side))
            except DataError as error:
                self.problems.add("masks that cannot be used", f"{entry.where}: {error}")
                return
            if len(meant) > 1:
                self._shared.append((meant, self.given[free[0].key]))

    def _add_stranger(self, entry: Entry) -> None:
        """Take in an entry of no expression of this split."""
        if self._others is None:
            self._others = Expressions(self.store, [split for split in self.store.splits if split != self.split])
        meant = self._others.meant(entry)
        if isinstance(meant, str) or not meant:
            told = f"{entry.where}: {self.store.manifest['dataset']} has no such expression, in no split"
            self.problems.add("with unknown ids", told)
        else:
            self.elsewhere[meant[0].split] += 1

    def share(self) -> None:
        """Let the last mask for a text answer what is left of sentences of the same referent that say the same."""
        for meant, answer in reversed(self._shared):
            for each in meant:
                if each.key not in self.by:
                    self.by[each.key], self.given[each.key] = self.by[meant[0].key], answer
