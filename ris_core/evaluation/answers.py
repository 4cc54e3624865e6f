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
import torch.nn.functional as F
from torch import nn

from ris_core.data.dataset import ShardStore
from ris_core.data.letterbox import unletterbox
from ris_core.data.proposal_store import ProposalStore, candidates
from ris_core.data.shards import load_image
from ris_core.data.text import encode, pad_token_batch
from ris_core.evaluation.metrics import Protocol
from ris_core.evaluation.queries import Query
from ris_core.models.choice import choose
from ris_core.models.clip import normalise
from ris_core.models.systems import upsampled_map

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

    `word_len` is the most tokens of a sentence that are read. A score is the mean probability inside the mask.
    """

    model: nn.Module
    word_len: int
    method: Literal["segment", "locate"] = "segment"

    @torch.inference_mode()
    def __call__(self, store: ShardStore, queries: Sequence[Query], protocol: Protocol) -> dict[int, Answers]:
        model: Any = self.model.eval()
        device = next(model.parameters()).device
        images = sorted({query.image for query in queries})
        place = {image: i for i, image in enumerate(images)}
        pixels = torch.from_numpy(np.stack([store.pixels(image) for image in images])).to(device)
        features = model.encode_image(normalise(pixels.permute(0, 3, 1, 2)))
        texts = [encode(query.text) for query in queries]
        tokens = torch.from_numpy(pad_token_batch(texts, min(self.word_len, max(map(len, texts))))).to(device)
        index = torch.tensor([place[query.image] for query in queries], device=device)
        inputs = (features, tokens, index)
        coarse = self.method == "locate"
        logits = upsampled_map(model, inputs, store.image_size) if coarse else model.segment(*inputs)
        probabilities = logits.float().sigmoid()[:, 0]
        return {image: self._of_image(store, image, probabilities[index == i], protocol) for image, i in place.items()}

    @staticmethod
    def _of_image(store: ShardStore, image: int, probabilities: torch.Tensor, protocol: Protocol) -> Answers:
        row = store.row(image)
        full = unletterbox(
            probabilities, row["height"], row["width"], store.image_size, store.resample, protocol.upsampling
        )
        if protocol.resolution != "original":
            size = (int(protocol.resolution), int(protocol.resolution))
            full = F.interpolate(full[None], size, mode="bilinear", align_corners=False)[0]
        masks = full > protocol.threshold
        return Answers(masks, (full * masks).flatten(1).sum(1) / masks.flatten(1).sum(1).clamp(min=1))


class ProposalAnswers:
    """A zero-shot system's: for each expression the proposal it scores highest, whatever the protocol's threshold.

    It sees the original photographs, below `photos`. Without `proposals` it chooses among the annotated objects, which
    shows how well it chooses; a score is the softmax of the chosen proposal's among all.
    """

    def __init__(self, model: Any, photos: Path, proposals: ProposalStore | None = None):
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
        return Answers(resized(choice.masks, protocol), choice.shares, found=len(masks) > 0)


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
        return Answers(resized(choice.masks, protocol), torch.ones(len(ann_ids)), found=len(masks) > 0)


def resized(masks: torch.Tensor, protocol: Protocol) -> torch.Tensor:
    """Masks (N, H, W) of 0 and 1, any dtype, at the protocol's resolution, bool, by nearest neighbours."""
    if protocol.resolution == "original":
        return masks.bool()
    size = (int(protocol.resolution), int(protocol.resolution))
    return F.interpolate(masks[None].to(torch.uint8), size, mode="nearest")[0].bool()


def pairwise_overlap(first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Intersections and unions, int64 (N, M), of two stacks of masks of 0 and 1, (N, ...) and (M, ...) of equal size."""
    a, b = first.flatten(1).float(), second.flatten(1).float()
    intersection = (a @ b.T).round().long()  # exact: pixel counts stay far below 2^24
    return intersection, a.sum(1).long()[:, None] + b.sum(1).long()[None] - intersection
