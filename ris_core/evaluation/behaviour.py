"""Whether a system does what its expression says: three behavioural tests, reported as numbers.

A score on a test split cannot tell understanding from luck; changing one thing whose effect is known can. In the terms
of CheckList (Ribeiro et al., ACL 2020), "mirror" is an invariance test with its directional control, "swap" a
directional test, "absent" asks what an answer's score is worth. All see a system through `set_image` and `predict` alone, so they
apply to every one, and all their cases come from the data: no vocabulary of a dataset is written down here.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from ris_core.data.dataset import ShardStore
from ris_core.data.images import load_image
from ris_core.data.text import expression_kind
from ris_core.errors import DataError
from ris_core.predictor import Prediction

Answers = dict[str, Prediction]  # to each text
Group = dict[str, float | int]

SAME = 0.5  # IoU from which two masks count as the same answer
# A word names a category if this share of the referents it is used of, and this many of them, belong to it.
NAMING_SHARE = 0.8
NAMING_REFERENTS = 3

_OTHER_SIDE = {"left": "right", "right": "left"}
# wording.py writes left, right, leftmost and rightmost; the other endings are those of RefCOCO's annotators.
_SIDE = re.compile(r"\b(left|right)(?=(?:most|est|y|er|hand|side|wards?)?\b)", re.IGNORECASE)


class Answering(Protocol):
    """What is tested: `RISPredictor`, or anything else that answers expressions about the image last set."""

    def set_image(self, image: np.ndarray, /) -> None:
        """Take an image, RGB uint8 (H, W, 3)."""
        ...

    def predict(self, expressions: Sequence[str], /) -> list[Prediction]:
        """Give one prediction per expression: `mask` bool (H, W) and `score`."""
        ...


class Expression(NamedTuple):
    """A text and the annotation it means."""

    ann_id: int
    text: str


def behaviour(
    predictor: Answering, store: ShardStore, image_root: Path, split: str, images: int, seed: int
) -> dict[str, Group]:
    """Ask about `images` images of `split`, drawn with `seed` (all of them if there are fewer), and say how it behaved.

    Every group has its number of `cases`, and no further number when that is 0. Numbers are means over cases, all from
    0 to 1; IoUs are at the photo's own size, and two empty masks agree (1.0).

    mirror: image mirrored, left and right exchanged in the text, answer mirrored back. `iou` with the answer to the
        original; `agree`, the share above 0.5; `iou_unswapped`, the control with the text as it was (low if sides are
        understood). `iou_plain` of `cases_plain`: expressions without a side, mirrored image, same text. Cases are the
        distinct expressions of an image.
        In generalised data, those about none or several objects too; the other tests ask about single ones.
    swap: two attribute sentences about two objects of one image that differ in one word. `iou` of the two masks;
        `moved`, the share below 0.5; `followed`, the share where each mask has the larger IoU with its own object.
    absent: per image, an attribute sentence about an object of another image that names a category this image has none
        of (see `Strangers`), against the image's own attribute sentences. `score_present` and `score_absent`; `auroc`, the
        chance that a present expression scores higher than an absent one (0.5 is chance); `empty_absent`, the share of
        absent expressions answered with an empty mask.

    Files are read from `image_root / file_name`. Raises DataError if `images` is below 1, the split does not exist, or
    an image cannot be read (BadImage).
    """
    if images < 1:
        raise DataError(f"behaviour of {images} images says nothing: ask for 1 or more")
    random = np.random.default_rng(seed)
    known = store.images_of(split)
    strangers = Strangers(store, split)
    found = _Cases()
    for image in map(int, np.sort(random.choice(known, min(images, len(known)), replace=False))):
        row, expressions = store.row(image), _expressions(store, image, split)
        own = [each for each in expressions if each.ann_id >= 0 and expression_kind(each.text) == "attribute"]
        texts = list(dict.fromkeys(expression.text for expression in expressions))
        stranger = strangers.draw(row, texts, random) if own else None
        rgb = load_image(image_root / row["file_name"])
        answers = _ask(predictor, rgb, texts + ([stranger] if stranger else []))
        mirrored = _ask(predictor, np.ascontiguousarray(rgb[:, ::-1]), texts + [swap_sides(text) for text in texts])
        found.add_mirrored(texts, answers, mirrored)
        found.add_swapped(store, image, own, answers)
        if stranger:
            found.absent.append(answers[stranger])
            found.present += [answers[text].score for text in dict.fromkeys(expression.text for expression in own)]
    return {"mirror": found.mirror(), "swap": found.swap(), "absent": found.scores()}


def swap_sides(text: str) -> str:
    """Exchange left and right in every word of position of a text, their endings and capitals kept."""
    return _SIDE.sub(_other_side, text)


def _other_side(match: re.Match[str]) -> str:
    word, other = match[0], _OTHER_SIDE[match[0].lower()]
    return other.upper() if word.isupper() else other.capitalize() if word[0].isupper() else other


def mask_iou(one: np.ndarray, other: np.ndarray) -> float:
    """Give the IoU of two masks, bool (H, W); 1.0 if both are empty."""
    union = np.count_nonzero(one | other)
    return np.count_nonzero(one & other) / union if union else 1.0


class Strangers:
    """Sentences of a split that are about nothing in a given image.

    Another category is not enough: "the red one", said of a star, fits every red thing. So a sentence is used only if
    one of its words names its referent's category, which the split itself tells: it is used of hardly anything else.
    """

    def __init__(self, store: ShardStore, split: str):
        said = list(_attribute_sentences(store, split))
        of_word: dict[str, dict[int, str]] = defaultdict(dict)
        for ref_id, category, text in said:
            for word in text.lower().split():
                of_word[word][ref_id] = category
        names = {word: _named(list(categories.values())) for word, categories in of_word.items()}
        self.sentences = [(c, text) for _, c, text in said if any(names[word] == c for word in text.lower().split())]

    def draw(self, row: dict[str, Any], own: Sequence[str], random: np.random.Generator) -> str | None:
        """Draw a sentence about nothing in the image of a shard's `row`, whose sentences are `own`; None if there is none."""
        here = {item["category"] for item in row["instances"]}
        fitting = [text for category, text in self.sentences if category not in here and text not in own]
        return fitting[random.integers(len(fitting))] if fitting else None


def _attribute_sentences(store: ShardStore, split: str) -> Iterator[tuple[int, str, str]]:
    """List (ref_id, category, text) of each in the split that is about one object."""
    for image in store.images_of(split):
        row = store.row(int(image))
        categories = {item["ann_id"]: item["category"] for item in row["instances"]}
        for ref in row["refs"]:
            counts = ref["split"] == split and ref["ann_id"] >= 0
            texts = [s["sent"] for s in ref["sentences"] if counts]
            yield from (
                (ref["ref_id"], categories[ref["ann_id"]], t) for t in texts if expression_kind(t) == "attribute"
            )


def _named(categories: Sequence[str]) -> str | None:
    """Give the category that a word names, from those of all referents it is used of."""
    category, count = Counter(categories).most_common(1)[0]
    return category if count >= max(NAMING_REFERENTS, NAMING_SHARE * len(categories)) else None


def _expressions(store: ShardStore, image: int, split: str) -> list[Expression]:
    """Give the image's distinct expressions in the split, in the order of its row."""
    refs = [ref for ref in store.row(image)["refs"] if ref["split"] == split]
    return list(dict.fromkeys(Expression(ref["ann_id"], s["sent"]) for ref in refs for s in ref["sentences"]))


def _ask(predictor: Answering, rgb: np.ndarray, texts: Sequence[str]) -> Answers:
    """Give the answer to each text, all asked at once."""
    distinct = list(dict.fromkeys(texts))
    predictor.set_image(rgb)
    return dict(zip(distinct, predictor.predict(distinct), strict=True))


def _one_word_apart(one: str, other: str) -> bool:
    first, second = one.lower().split(), other.lower().split()
    return len(first) == len(second) and sum(a != b for a, b in zip(first, second, strict=True)) == 1


@dataclass
class _Cases:
    """What was seen so far, over all images."""

    sided: list[tuple[float, float]] = field(default_factory=list)  # IoU with sides exchanged, and without
    plain: list[float] = field(default_factory=list)
    pairs: list[tuple[float, bool]] = field(default_factory=list)  # IoU of the two masks; did each find its object?
    present: list[float] = field(default_factory=list)
    absent: list[Prediction] = field(default_factory=list)

    def add_mirrored(self, texts: Sequence[str], answers: Answers, mirrored: Answers) -> None:
        for text in texts:
            expected, other = answers[text].mask[:, ::-1], swap_sides(text)
            unchanged = mask_iou(mirrored[text].mask, expected)
            if other == text:
                self.plain.append(unchanged)
            else:
                self.sided.append((mask_iou(mirrored[other].mask, expected), unchanged))

    def add_swapped(self, store: ShardStore, image: int, own: Sequence[Expression], answers: Answers) -> None:
        for pair in combinations(own, 2):
            if pair[0].ann_id != pair[1].ann_id and _one_word_apart(pair[0].text, pair[1].text):
                one, other = (answers[expression.text].mask for expression in pair)
                mine, its = (store.mask(image, expression.ann_id).astype(bool) for expression in pair)
                followed = mask_iou(one, mine) > mask_iou(one, its) and mask_iou(other, its) > mask_iou(other, mine)
                self.pairs.append((mask_iou(one, other), followed))

    def mirror(self) -> Group:
        group: Group = {"cases": len(self.sided)}
        if self.sided:
            swapped, unswapped = np.array(self.sided).T
            group |= {"iou": float(swapped.mean()), "agree": float((swapped > SAME).mean())}
            group |= {"iou_unswapped": float(unswapped.mean())}
        group["cases_plain"] = len(self.plain)
        return group | ({"iou_plain": float(np.mean(self.plain))} if self.plain else {})

    def swap(self) -> Group:
        if not self.pairs:
            return {"cases": 0}
        iou, followed = np.array(self.pairs, float).T
        shares = {"moved": float((iou < SAME).mean()), "followed": float(followed.mean())}
        return {"cases": len(iou), **shares, "iou": float(iou.mean())}

    def scores(self) -> Group:
        if not self.absent:
            return {"cases": 0}
        from scipy.stats import mannwhitneyu  # type: ignore[import-untyped]  # takes two seconds to import

        absent = [answer.score for answer in self.absent]
        pairs_won = mannwhitneyu(self.present, absent, method="asymptotic").statistic  # a tie counts as half
        return {
            "cases": len(absent),
            "score_present": float(np.mean(self.present)),
            "score_absent": float(np.mean(absent)),
            "auroc": float(pairs_won / (len(self.present) * len(absent))),
            "empty_absent": float(np.mean([not answer.mask.any() for answer in self.absent])),
        }
