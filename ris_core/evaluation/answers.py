"""What systems answer: masks at a protocol's resolution, whether they come from a predicted map or from proposals.

An `Answerer` is asked about few images at a time, each of them encoded once for all of its expressions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from ris_core.data.dataset import ShardStore
from ris_core.data.images import load_image
from ris_core.data.proposal_store import ProposalStore, candidates
from ris_core.device import autocast
from ris_core.evaluation.metrics import Protocol
from ris_core.evaluation.overlap import packed, pairwise_overlap
from ris_core.evaluation.params import EXPRESSIONS_PER_BATCH
from ris_core.evaluation.queries import Query, of_images
from ris_core.models.answer import Choice, Frame, Reading, choose, read_map, resized
from ris_core.models.clip import normalise
from ris_core.models.contract import MapSystem, ProposalSystem

KEPT_IMAGES = 500


class Answers(NamedTuple):
    """The answers to N expressions about one image, (h, w) being the protocol's resolution."""

    masks: torch.Tensor  # (N, h, w) bool
    scores: torch.Tensor  # (N,) float: how sure the system is of each, 0..1
    found: bool = True  # whether there was anything to choose from


class Answerer(ABC):
    """Who is asked. What it gives are answers by image, in the order of that image's queries."""

    @abstractmethod
    def __call__(self, store: ShardStore, queries: Sequence[Query], protocol: Protocol) -> dict[int, Answers]:
        """Answer queries about a few images, under a protocol."""

    def about(self, store: ShardStore, queries: Sequence[Query]) -> Answerer:
        """Give an answerer to these queries alone, under any protocol: what no protocol changes is computed once, here."""
        return self


@dataclass(frozen=True)
class MapAnswers(Answerer):
    """A trained system's: mask logits, or the coarse map of one that has one, above the protocol's threshold.

    `word_len` is the most tokens of a sentence that are read, `precision` a name of `device.PRECISIONS`, `at_once` the most
    expressions of a forward pass. A score is the mean probability inside the mask.
    """

    model: MapSystem
    word_len: int
    method: Literal["segment", "locate"] = "segment"
    precision: str = "fp32"
    at_once: int = EXPRESSIONS_PER_BATCH

    def __call__(self, store: ShardStore, queries: Sequence[Query], protocol: Protocol) -> dict[int, Answers]:
        return self.about(store, queries)(store, queries, protocol)

    @torch.inference_mode()
    def about(self, store: ShardStore, queries: Sequence[Query]) -> Answerer:
        """Encode each image once and compute one map for each of its texts; texts of equal tokens share theirs."""
        model = self.model.eval()
        device = next(model.parameters()).device
        place = {image: i for i, image in enumerate(of_images(queries))}
        pixels = torch.from_numpy(np.stack([store.pixels(image) for image in place])).to(device)
        text_of = {text: i for i, text in enumerate(dict.fromkeys(query.text for query in queries))}
        tokens = model.tokenize(list(text_of), self.word_len)
        read = [row.tobytes() for row in tokens.numpy()]
        rows: dict[tuple[int, bytes], int] = {}
        row_of: dict[tuple[int, str], int] = {}
        asked: list[tuple[int, int]] = []  # of each row the image and the text
        for image, text in dict.fromkeys((query.image, query.text) for query in queries):
            row = rows.setdefault((image, read[text_of[text]]), len(rows))
            if row == len(asked):
                asked.append((place[image], text_of[text]))
            row_of[image, text] = row
        index, chosen = torch.tensor(asked).T
        with autocast(self.precision, device):
            features = model.encode_image(normalise(pixels.permute(0, 3, 1, 2)))
            logits = [
                self._map(features, tokens[some].to(device), images.to(device), store.image_size)
                for some, images in zip(chosen.split(self.at_once), index.split(self.at_once), strict=True)
            ]
        return _Maps(torch.cat(logits), row_of)

    def _map(self, features: Any, tokens: torch.Tensor, index: torch.Tensor, image_size: int) -> torch.Tensor:
        if self.method == "locate":
            return self.model.located(features, tokens, index, image_size)
        return self.model.segment(features, tokens, index)


class _Maps(Answerer):
    """Answers read from logits (N, 1, g, g), `row_of` an image and a text; a map is read once for each way to read it."""

    def __init__(self, logits: torch.Tensor, row_of: Mapping[tuple[int, str], int]):
        self.logits, self.row_of = logits, row_of
        self.read: dict[tuple[int, Reading], tuple[torch.Tensor, torch.Tensor]] = {}

    @torch.inference_mode()
    def __call__(self, store: ShardStore, queries: Sequence[Query], protocol: Protocol) -> dict[int, Answers]:
        answers = {}
        for image, asked in of_images(queries).items():
            row = store.row(image)
            frame = Frame(row["height"], row["width"], store.image_size, store.resample)
            found = [self._read(self.row_of[image, query.text], frame, protocol.reading) for query in asked]
            masks, scores = zip(*found, strict=True)
            answers[image] = Answers(torch.stack(masks), torch.stack(scores))
        return answers

    def _read(self, row: int, frame: Frame, reading: Reading) -> tuple[torch.Tensor, torch.Tensor]:
        """Read one map by itself: what a photo's size needs of memory then stays in a CPU's cache, twice as fast."""
        if (row, reading) not in self.read:
            found = read_map(self.logits[row : row + 1], frame, reading)
            self.read[row, reading] = found.masks[0], found.scores[0]
        return self.read[row, reading]


class ProposalAnswers(Answerer):
    """A zero-shot system's: for each expression the proposal it scores highest, whatever the protocol's threshold.

    It sees the original photographs, below `photos`. Without `proposals` it chooses among the annotated objects, which
    shows how well it chooses; a score is the softmax of the chosen proposal's among all.
    """

    def __init__(self, model: ProposalSystem, photos: Path, proposals: ProposalStore | None = None):
        self.model, self.photos, self.proposals = model, photos, proposals
        # The same images come again under other protocols and controls. Of a photo, features take about a megabyte.
        self.encoded = lru_cache(KEPT_IMAGES)(self._encode)

    @torch.inference_mode()
    def __call__(self, store: ShardStore, queries: Sequence[Query], protocol: Protocol) -> dict[int, Answers]:
        return self.about(store, queries)(store, queries, protocol)

    @torch.inference_mode()
    def about(self, store: ShardStore, queries: Sequence[Query]) -> Answerer:
        """Score all proposals of an image once for each of its texts."""
        choices = {}
        for image, asked in of_images(queries).items():
            texts = list(dict.fromkeys(query.text for query in asked))
            masks = torch.from_numpy(candidates(store.row(image), self.proposals))
            scores = self.model.score(self.encoded(store, image), texts).float()
            choices[image] = _Choices(
                choose(masks.to(scores.device), scores), {text: i for i, text in enumerate(texts)}, len(masks) > 0
            )
        return _Chosen(choices)

    def _encode(self, store: ShardStore, image: int) -> Any:
        row = store.row(image)
        return self.model.encode_proposals(load_image(self.photos / row["file_name"]), candidates(row, self.proposals))


class _Choices(NamedTuple):
    """What was chosen for each text about an image, and whether there was anything to choose from."""

    choice: Choice
    row_of: dict[str, int]
    found: bool


@dataclass(frozen=True)
class _Chosen(Answerer):
    """Answers of choices that were made, by image."""

    choices: Mapping[int, _Choices]

    def __call__(self, store: ShardStore, queries: Sequence[Query], protocol: Protocol) -> dict[int, Answers]:
        answers = {}
        for image, asked in of_images(queries).items():
            choice, row_of, found = self.choices[image]
            rows = [row_of[query.text] for query in asked]
            answers[image] = Answers(resized(choice.masks[rows], protocol.reading), choice.shares[rows], found)
        return answers


@dataclass(frozen=True)
class BestProposals(Answerer):
    """The upper bound of any choice: for each expression the proposal whose IoU with the true mask is highest."""

    proposals: ProposalStore

    def __call__(self, store: ShardStore, queries: Sequence[Query], protocol: Protocol) -> dict[int, Answers]:
        return {
            image: self._of_image(store, image, [query.ann_id for query in asked], protocol)
            for image, asked in of_images(queries).items()
        }

    def _of_image(self, store: ShardStore, image: int, ann_ids: list[int], protocol: Protocol) -> Answers:
        masks = torch.from_numpy(candidates(store.row(image), self.proposals))
        truth = torch.from_numpy(np.stack([store.mask(image, ann_id) for ann_id in ann_ids]))
        intersections, unions = pairwise_overlap(packed(truth), packed(masks))
        choice = choose(masks, torch.from_numpy(intersections / np.maximum(unions, 1)))
        return Answers(resized(choice.masks, protocol.reading), torch.ones(len(ann_ids)), found=len(masks) > 0)
