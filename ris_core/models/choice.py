"""One among an image's proposals: what a zero-shot system's scores mean as masks, certainty and a map to look at."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Choice(NamedTuple):
    """The answers to N expressions about an image of H x W pixels."""

    masks: torch.Tensor  # (N, H, W) bool: the chosen proposals; empty where there was none
    shares: torch.Tensor  # (N,) float 0..1: how sure, the softmax of the chosen one's score among all
    relevance: torch.Tensor  # (N, H, W) float 0..1: the shares of all proposals that hold a pixel, added up


def choose(masks: torch.Tensor, scores: torch.Tensor) -> Choice:
    """Proposals (P, H, W) bool and scores (N, P), higher is better -> the best proposal for each expression.

    The first of equals. Without proposals the answers are empty masks of share 0.
    """
    if not len(masks):
        empty = torch.zeros((len(scores), *masks.shape[1:]), device=scores.device)
        return Choice(empty.bool(), scores.new_zeros(len(scores)), empty)
    shares = scores.softmax(dim=1)
    best = scores.argmax(dim=1)
    relevance = torch.einsum("np,phw->nhw", shares, masks.to(shares.dtype)).clamp(max=1)
    return Choice(masks[best], shares.gather(1, best[:, None])[:, 0], relevance)
