"""What systems answer: masks at a protocol's resolution, whether they come from a predicted map or from proposals.

An `Answerer` is asked about few images at a time, each of them encoded once for all of its expressions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
from ris_core.evaluation.queries import Query
from ris_core.models.answer import Frame, choose, read_map, resized
from ris_core.models.clip import normalise
from ris_core.models.contract import MapSystem, ProposalSystem

KEPT_IMAGES = 500


class Answers(NamedTuple):
    """The answers to N expressions about one image, (h, w) being the protocol's resolution."""

    masks: torch.Tensor  # (N, h, w) bool
    scores: torch.Tensor  # (N,) float: how sure the system is of each, 0..1
    found: bool = True  # whether there was anything to choose from


Answerer = Callable[[ShardStore, Sequence[Query], Protocol], dict[int, Answers]]  # by image, in the queries' order


@dataclass(frozen=True)
class MapAnswers:
    """A trained system's: mask logits, or the coarse map of one that has one, above the protocol's threshold.

    `word_len` is the most tokens of a sentence that are read, `precision` a name of `device.PRECISIONS`. A score is the
    mean probability inside the mask.
    """

    model: MapSystem
    word_len: int
    method: Literal["segment", "locate"] = "segment"
    precision: str = "fp32"

    @torch.inference_mode()
    def __call__(self, store: ShardStore, queries: Sequence[Query], protocol: Protocol) -> dict[int, Answers]:
        model = self.model.eval()
        device = next(model.parameters()).device
        images = sorted({query.image for query in queries})
        place = {image: i for i, image in enumerate(images)}
        pixels = torch.from_numpy(np.stack([store.pixels(image) for image in images])).to(device)
        tokens = model.tokenize([query.text for query in queries], self.word_len).to(device)
        index = torch.tensor([place[query.image] for query in queries], device=device)
        with autocast(self.precision, device):
            features = model.encode_image(normalise(pixels.permute(0, 3, 1, 2)))
            if self.method == "locate":
                logits = model.located(features, tokens, index, store.image_size)
            else:
                logits = model.segment(features, tokens, index)
        answers = {}
        for image, i in place.items():
            row = store.row(image)
            frame = Frame(row["height"], row["width"], store.image_size, store.resample)
            found = read_map(logits[index == i], frame, protocol.reading)
            answers[image] = Answers(found.masks, found.scores)
        return answers


class ProposalAnswers:
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
        return {
            image: self._of_image(store, image, [query.text for query in queries if query.image == image], protocol)
            for image in dict.fromkeys(query.image for query in queries)
        }

    def _encode(self, store: ShardStore, image: int) -> Any:
        row = store.row(image)
        return self.model.encode_proposals(load_image(self.photos / row["file_name"]), candidates(row, self.proposals))

    def _of_image(self, store: ShardStore, image: int, texts: list[str], protocol: Protocol) -> Answers:
        masks = torch.from_numpy(candidates(store.row(image), self.proposals))
        scores = self.model.score(self.encoded(store, image), texts).float()
        choice = choose(masks.to(scores.device), scores)
        return Answers(resized(choice.masks, protocol.reading), choice.shares, found=len(masks) > 0)


@dataclass(frozen=True)
class BestProposals:
    """The upper bound of any choice: for each expression the proposal whose IoU with the true mask is highest."""

    proposals: ProposalStore

    def __call__(self, store: ShardStore, queries: Sequence[Query], protocol: Protocol) -> dict[int, Answers]:
        return {
            image: self._of_image(store, image, [query.ann_id for query in queries if query.image == image], protocol)
            for image in dict.fromkeys(query.image for query in queries)
        }

    def _of_image(self, store: ShardStore, image: int, ann_ids: list[int], protocol: Protocol) -> Answers:
        masks = torch.from_numpy(candidates(store.row(image), self.proposals))
        truth = torch.from_numpy(np.stack([store.mask(image, ann_id) for ann_id in ann_ids])).bool()
        intersections, unions = pairwise_overlap(truth, masks)
        choice = choose(masks, intersections / unions.clamp(min=1))
        return Answers(resized(choice.masks, protocol.reading), torch.ones(len(ann_ids)), found=len(masks) > 0)


def pairwise_overlap(first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Give intersections and unions, int64 (N, M), of two stacks of masks of 0 and 1, (N, ...) and (M, ...) of equal size."""
    a, b = first.flatten(1).float(), second.flatten(1).float()
    intersection = (a @ b.T).round().long()  # exact: pixel counts stay far below 2^24
    return intersection, a.sum(1).long()[:, None] + b.sum(1).long()[None] - intersection
