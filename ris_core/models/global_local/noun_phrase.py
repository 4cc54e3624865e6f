"""The target noun phrase of a referring expression: "woman in black next to kid" -> "woman".

Global-Local (Yu, Seo, Son, CVPR 2023, section 3.3; Seonghoon-Yu/Zero-shot-RIS) takes the noun chunk with the root of a
dependency parse by spaCy. That is the backend "spacy" here. "rules" needs no model: it reads a base noun phrase off the
front of the expression with lists of closed-class words. "whole" takes the expression itself.
"""

from __future__ import annotations

import importlib
import logging
import re
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from ris_core.errors import ConfigError

BACKENDS = ("auto", "spacy", "rules", "whole")

log = logging.getLogger(__name__)


class Parsed(NamedTuple):
    """An expression as it is encoded (lower case, tokens separated by single spaces) and its noun phrase."""

    sentence: str
    phrase: str


class NounPhraseFinder:
    """Finds noun phrases with one backend; `backend` tells which it became and belongs into every record of results.

    Args:
        backend: one of `BACKENDS`. "auto" is "spacy" where the model is installed and else, with a warning, "rules".
        spacy_model: name of an installed spaCy package, or a folder. The published results used en_core_web_lg. It is
            loaded at the first expression.
        nlp: a loaded spaCy pipeline to be used instead.

    Raises:
        ConfigError: unknown backend, or "spacy" without spaCy or its model.
    """

    def __init__(self, backend: str = "auto", spacy_model: str = "en_core_web_lg", nlp: Any = None) -> None:
        if backend not in BACKENDS:
            raise ConfigError(f"unknown noun-phrase backend {backend!r}; there are {', '.join(BACKENDS)}")
        self.spacy_model = spacy_model
        if nlp is not None:
            self._nlp = nlp
        available = nlp is not None or spacy_available(spacy_model)
        if backend == "spacy" and not available:
            raise ConfigError(
                f"noun phrases by spaCy need spaCy and its model {spacy_model}: pip install spacy, then python -m spacy "
                f"download {spacy_model}; or take noun_phrase 'rules'"
            )
        if backend == "auto":
            backend = "spacy" if available else "rules"
            if not available:
                log.warning("noun phrases by rules: spaCy's model %s is not installed", spacy_model)
        self.backend = backend

    @cached_property
    def _nlp(self) -> Any:
        return importlib.import_module("spacy").load(self.spacy_model)

    def __call__(self, expression: str) -> Parsed:
        """Give lower-cased sentence and noun phrase of an expression. An expression without a noun phrase is its own."""
        lowered = " ".join(expression.lower().split())
        if self.backend == "spacy":
            # Parsed again after the joining, as in the official code: "can't" has become "ca n't".
            sentence = " ".join(token.text for token in self._nlp(lowered) if token.text != " ")
            return Parsed(sentence, phrase_of_parse(self._nlp(sentence)))
        return Parsed(lowered, phrase_by_rules(lowered) if self.backend == "rules" else lowered)


def spacy_available(model: str) -> bool:
    """Tell whether spaCy and this model (a package or a folder) are installed; imports neither."""
    return find_spec("spacy") is not None and (
        Path(model).is_dir() or (model.isidentifier() and find_spec(model) is not None)
    )


def phrase_of_parse(doc: Any) -> str:
    """Find the noun chunk of a spaCy `Doc` that holds its root; of several sentences, the last root.

    If the root is in no chunk, that of its first child; if that is in none either, the whole text.
    """
    chunk_of = {index: chunk.text for chunk in doc.noun_chunks for index in range(chunk.start, chunk.end)}
    roots = [token for token in doc if token.head.i == token.i]
    for candidate in (*roots[-1:], *(child for root in roots[-1:] for child in list(root.children)[:1])):
        if candidate.i in chunk_of:
            return chunk_of[candidate.i]
    return doc.text


# Closed-class words of the rules. They do not know what things are called, only how a phrase ends.


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_DETERMINERS = _words("a an the this that these those some any each every both all another no")
_POSSESSIVES = _words("my your his her its our their")
_PREPOSITIONS = _words(
    "of in on at by with without w w/ from to into onto near beside besides behind between among amongst under "
    "underneath beneath below above over across against along alongside around through throughout inside outside "
    "toward towards during before after beyond off past opposite up down out away atop upon via within for about as "
    "than like"
)
_BEFORE_TO = _words("close next")  # "next to" is a preposition, "next" alone is not
_WH_WORDS = _words("who whom whose which what where when why how")
_VERBS = _words(
    "am is are was were be been being have has had having do does did doing done "
    "can could will would shall should may might must"
)
_CONJUNCTIONS = _words("and or but nor so yet while because if though although unless until since")
_PRONOUNS = _words(
    "i you he she it we they me him us them mine yours hers ours theirs myself himself herself itself themselves"
)
_STOPPERS = _WH_WORDS | _VERBS | _CONJUNCTIONS | _PRONOUNS
_POSITIONS = _words(
    "left right top bottom front back middle center centre far rear upper lower closest nearest leftmost rightmost "
    "farthest furthest first second third fourth fifth last"
)
_ING_NOUNS = _words(
    "building ceiling painting string clothing something anything nothing everything thing awning railing crossing "
    "pudding topping frosting icing dressing wedding earring siding parking spring evening morning stuffing covering "
    "swing"
)
_ED_NOUNS = _words("colored coloured speed weed breed feed reed sled shed seed steed moped")
_TOKEN = re.compile(r"'s\b|w/|\w+(?:[-']\w+)*|[^\w\s]")
_ORDINAL = re.compile(r"\d+(?:st|nd|rd|th)")


def phrase_by_rules(sentence: str) -> str:
    """Find the first base noun phrase of a lower-case expression, tokens separated by spaces; the whole if there is none.

    Reads on until a word that cannot be part of it: a preposition, verb form, conjunction, pronoun, punctuation, another
    determiner, a participle or a trailing position ("guy right"). Participles are told by their endings only, so
    irregular ones are missed ("umbrella held by woman" -> "umbrella held").
    """
    tokens = _TOKEN.findall(sentence.replace("’", "'").replace("'s", " 's"))
    start = _after_leading_preposition(tokens)
    end = next((i for i in range(start, len(tokens)) if _ends_phrase(tokens, start, i)), len(tokens))
    while end > start and (tokens[end - 1] in _DETERMINERS or tokens[end - 1] in _POSSESSIVES):
        end -= 1
    phrase = tokens[start:end]
    if not phrase or (len(phrase) == 1 and _is_participle(phrase[0], "ing", _ING_NOUNS)):
        return sentence
    return " ".join(phrase)


def _after_leading_preposition(tokens: list[str]) -> int:
    """Tell where to begin: "on the left, the man" after the comma, "on the left" and "close to the man" at the object."""
    start = 0
    while length := _preposition_at(tokens, start):
        start += length
    if start and "," in tokens[start:-1]:
        return tokens.index(",", start) + 1
    return start


def _preposition_at(tokens: list[str], i: int) -> int:
    """Count the tokens of the preposition at i; 0 if there is none."""
    if i + 1 < len(tokens) and tokens[i] in _BEFORE_TO and tokens[i + 1] == "to":
        return 2
    return int(i < len(tokens) and tokens[i] in _PREPOSITIONS)


def _ends_phrase(tokens: list[str], start: int, i: int) -> bool:
    """Tell whether the phrase that begins at `start` is over before token i."""
    word, following = tokens[i], tokens[i + 1] if i + 1 < len(tokens) else None
    if word == "'s":
        return i == start
    if _preposition_at(tokens, i) or word in _STOPPERS or word.endswith("n't") or _is_punctuation(word):
        return True
    if not any(_is_content(earlier) for earlier in tokens[start:i]):
        return False
    if word in _DETERMINERS or word in _POSSESSIVES:
        return tokens[i - 1] != "'s"
    if _is_participle(word, "ing", _ING_NOUNS):
        return True
    if _is_participle(word, "ed", _ED_NOUNS):
        return (
            following is None
            or _preposition_at(tokens, i + 1) > 0
            or following in _DETERMINERS
            or following in _POSSESSIVES
        )
    return _is_position(word) and _trails(tokens, i)


def _trails(tokens: list[str], i: int) -> bool:
    """Tell whether the run of positional words from i on closes a phrase ("man far left of ...") or leads to a noun."""
    while i < len(tokens) and _is_position(tokens[i]):
        i += 1
    return i == len(tokens) or tokens[i] == "side" or _preposition_at(tokens, i) > 0 or _is_punctuation(tokens[i])


def _is_participle(word: str, ending: str, nouns: frozenset[str]) -> bool:
    """Tell a participle by its ending ("ing", "ed"); words as short as "ring" and "red" are none."""
    return word.endswith(ending) and len(word) > (4 if ending == "ing" else 3) and word not in nouns


def _is_position(word: str) -> bool:
    return word in _POSITIONS or _ORDINAL.fullmatch(word) is not None


def _is_content(word: str) -> bool:
    return not (word in _DETERMINERS or word in _POSSESSIVES or _is_position(word) or _is_punctuation(word))


def _is_punctuation(word: str) -> bool:
    return not any(character.isalnum() for character in word)
