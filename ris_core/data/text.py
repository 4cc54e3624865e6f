"""Expressions as CLIP tokens, and a rough label for the kind of language an expression uses.

The byte-pair encoding is open_clip's own `SimpleTokenizer` (49,408 ids; 49406 starts and 49407 ends a text, 0 pads).
Cutting and padding follow CRIS (DerrickWang005/CRIS.pytorch, `utils/dataset.py`), where a text that is too long keeps
its first ids and its last place becomes the end mark.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

import numpy as np

from ris_core.errors import ConfigError

if TYPE_CHECKING:
    from open_clip.tokenizer import SimpleTokenizer

START_ID = 49406
END_ID = 49407
PAD_ID = 0

MOST_WORDS = 100_000  # whose byte pairs are remembered; the vocabulary of all expressions of RefCOCO is a tenth of it

ExpressionKind = Literal["attribute", "location", "order", "relation", "size"]
# What stands in place of it where an expression does not mean exactly one object: there, how many they are is what is hard.
SEVERAL, NONE = "several", "none"


class _Words(dict[str, str]):
    """What open_clip remembers of words, which is all that it ever read; here, no more of them once there are many."""

    def __setitem__(self, word: str, pairs: str) -> None:
        if len(self) < MOST_WORDS:
            super().__setitem__(word, pairs)


@lru_cache(maxsize=1)
def _tokenizer() -> SimpleTokenizer:
    from open_clip.tokenizer import SimpleTokenizer  # takes a good second to import: only when a text is really encoded

    tokenizer = SimpleTokenizer()
    tokenizer.cache = _Words(tokenizer.cache)
    return tokenizer


def encode(text: str) -> list[int]:
    """Give all token ids of one text, uncut, with start and end mark: `encode("left guy") == [49406, 1823, 2149, 49407]`."""
    return [START_ID, *_tokenizer().encode(text), END_ID]


def decode(ids: Sequence[int]) -> str:
    """Give the lower-case words behind token ids; marks and padding are left out."""
    words = [int(i) for i in ids if i not in (START_ID, END_ID, PAD_ID)]
    return _tokenizer().decode(words).strip()


def pad_tokens(ids: Sequence[int], length: int) -> np.ndarray:
    """Bring token ids to a fixed length: int64 (length,), zero padded.

    A longer text keeps its first `length` ids and the last of them becomes the end mark, so that the sentence state is
    still read at an end mark (CRIS; 17 ids for RefCOCO and RefCOCO+, 22 for RefCOCOg).
    """
    return pad_token_batch([ids], length)[0]


def pad_token_batch(batch: Sequence[Sequence[int]], length: int | None = None) -> np.ndarray:
    """Bring several texts to one length: int64 (N, length). Without a length, that of the longest text.

    Shortening a batch to its longest text changes no result: attention is causal and padding is masked.
    """
    if length is None:
        length = max((len(ids) for ids in batch), default=0)
    if batch and length < 2:
        raise ConfigError(f"token length {length} has no room for a start and an end mark; use 17 (RefCOCO) or more")
    tokens = np.full((len(batch), length), PAD_ID, dtype=np.int64)
    for row, ids in zip(tokens, batch, strict=True):
        row[: len(ids)] = ids[:length]
        if len(ids) > length:
            row[-1] = END_ID
    return tokens


def tokenize(texts: Sequence[str], length: int) -> np.ndarray:
    """Encode, cut at `length` and pad to the longest in one go: int64 (N, L)."""
    ids = [encode(text) for text in texts]
    return pad_token_batch(ids, min(length, max(map(len, ids), default=length)))


# Closed-class words only. They say how an expression points at its object, not what the object is.
_SIDES = r"(?:left|right|top|bottom|front|back|middle|cent(?:er|re)|end)"
_KIND_PATTERNS: tuple[tuple[ExpressionKind, str], ...] = (
    (
        "order",
        r"first|second|third|fourth|fifth|sixth|last|\d+(?:st|nd|rd|th)|"
        rf"from (?:the |your )?(?:far )?{_SIDES}|(?:from )?{_SIDES} to {_SIDES}",
    ),
    (
        "relation",
        r"next to|of|between|behind|above|below|beneath|under|underneath|over|beside|besides|than|near|nearest|"
        r"close to|closer|closest|farther|further|farthest|furthest|touching|against|among|opposite|adjacent|"
        r"in front",
    ),
    (
        "location",
        r"left|right|top|bottom|middle|cent(?:er|re)|central|corner|front|back|background|foreground|side|edge|"
        r"upper|lower|leftmost|rightmost|topmost|bottommost|up|down|far|end",
    ),
    (
        "size",
        r"large|larger|largest|big|bigger|biggest|small|smaller|smallest|little|tiny|tiniest|huge|giant|"
        r"tall|taller|tallest|short|shorter|shortest|wide|widest|narrow|thin|thinnest|thick|long|longest",
    ),
)


@lru_cache(maxsize=1)
def _kind_matchers() -> list[tuple[ExpressionKind, re.Pattern[str]]]:
    return [(kind, re.compile(rf"(?<!\w)(?:{words})(?!\w)")) for kind, words in _KIND_PATTERNS]


def expression_kind(text: str) -> ExpressionKind:
    """Tell which kind of language an expression leans on, for slicing scores: a heuristic on closed-class words.

    The first kind that matches wins, in the order order > relation > location > size > attribute, because the harder
    kind usually decides ("second star from the left" is order although it says "left"). Attribute is what remains.
    """
    lowered = text.lower()
    for kind, pattern in _kind_matchers():
        if pattern.search(lowered):
            return kind
    return "attribute"
