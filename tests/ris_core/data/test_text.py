"""Token parity with the official CRIS tokenisation, and the heuristic that sorts expressions into kinds."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from ris_core.data.text import decode, encode, expression_kind, pad_token_batch, pad_tokens, tokenize
from ris_core.errors import ConfigError

GOLDEN = Path(__file__).parents[2] / "golden"
TOKENS = json.loads((GOLDEN / "cris_transform.json").read_text())["tokens"]


def test_tokens_equal_the_official_ones() -> None:
    more = list(TOKENS["more"])
    for texts, official in ((TOKENS["sents"], TOKENS["ids_len17"]), (more, [TOKENS["more"][text] for text in more])):
        assert pad_token_batch([encode(text) for text in texts], 17).tolist() == official
        longest = max(sum(token != 0 for token in row) for row in official)
        assert tokenize(texts, 17).tolist() == [row[:longest] for row in official]


def test_a_batch_is_cut_at_the_length_and_no_longer_than_its_longest_text() -> None:
    assert tokenize(["left guy", TOKENS["long"]], 17)[1].tolist() == TOKENS["long_ids_len17"]
    assert tokenize(["left guy", "the man on the left"], 17).shape == (2, 7)
    assert tokenize([], 17).shape == (0, 17)


@pytest.mark.parametrize("length", [17, 22])
def test_long_texts_are_cut_and_keep_an_end_mark(length: int) -> None:
    ids = encode(TOKENS["long"])
    assert len(ids) > 22
    cut = pad_tokens(ids, length)
    assert cut.dtype == np.int64
    assert cut.tolist() == TOKENS[f"long_ids_len{length}"]


def test_a_text_that_just_fits_is_not_cut() -> None:
    ids = encode("the man on the left")
    assert pad_tokens(ids, len(ids)).tolist() == ids
    assert pad_tokens(ids, len(ids) - 1).tolist() == [*ids[: len(ids) - 2], 49407]


def test_a_batch_is_as_long_as_its_longest_text() -> None:
    batch = pad_token_batch([encode("left guy"), encode("the man on the left")])
    assert batch.shape == (2, 7)
    assert batch[0].tolist() == [49406, 1823, 2149, 49407, 0, 0, 0]
    assert pad_token_batch([]).shape == (0, 0)


def test_decoding_gives_the_words_back() -> None:
    assert decode(pad_tokens(encode("  LEFT   Guy "), 17).tolist()) == "left guy"


def test_a_length_without_room_for_both_marks_is_refused() -> None:
    with pytest.raises(ConfigError, match="token length 1 has no room for a start and an end mark"):
        pad_tokens(encode("left guy"), 1)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("second star from the left", "order"),
        ("2nd from right", "order"),
        ("last cup", "order"),
        ("guy from the far left", "order"),
        ("the ring left of the red square", "relation"),
        ("woman next to the dog", "relation"),
        ("bigger than the star", "relation"),
        ("left guy", "location"),
        ("Bottom-right corner!", "location"),
        ("largest star", "size"),
        ("the small blue one", "size"),
        ("man in red shirt", "attribute"),
        ("often brightly firstborn", "attribute"),  # "of", "right" and "first" only inside words
        ("", "attribute"),
    ],
)
def test_the_most_decisive_kind_of_an_expression_wins(text: str, kind: str) -> None:
    assert expression_kind(text) == kind
