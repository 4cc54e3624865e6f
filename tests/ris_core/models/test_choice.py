"""One among proposals: the best scored, the first of equals, and how sure that is."""

from __future__ import annotations

import torch

from ris_core.models.choice import choose

MASKS = torch.zeros(3, 4, 5, dtype=torch.bool)
MASKS[0, :2], MASKS[1, 1:3], MASKS[2, 3, 4] = True, True, True


def test_the_best_scored_proposal_is_chosen_for_each_expression() -> None:
    scores = torch.tensor([[0.1, 0.3, 0.2], [5.0, -5.0, 0.0], [-3.0, -2.0, -1.0]])
    choice = choose(MASKS, scores)
    assert choice.masks.dtype == torch.bool
    assert torch.equal(choice.masks, MASKS[[1, 0, 2]])
    torch.testing.assert_close(choice.shares, scores.softmax(1).max(1).values)


def test_the_first_of_equals_is_chosen() -> None:
    choice = choose(MASKS, torch.tensor([[1.0, 2.0, 2.0], [3.0, 3.0, 3.0]]))
    assert torch.equal(choice.masks, MASKS[[1, 0]])
    torch.testing.assert_close(choice.shares[1], torch.tensor(1 / 3))


def test_a_pixels_relevance_is_the_sum_of_the_shares_of_what_holds_it() -> None:
    scores = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)) * 4
    choice = choose(MASKS, scores)
    shares = scores.softmax(1)
    assert choice.relevance.shape == (6, 4, 5)
    torch.testing.assert_close(choice.relevance[:, 0, 0], shares[:, 0])
    torch.testing.assert_close(choice.relevance[:, 1, 0], shares[:, 0] + shares[:, 1])
    torch.testing.assert_close(choice.relevance[:, 3, 4], shares[:, 2])
    assert not choice.relevance[:, 3, 0].any(), "what no proposal holds"


def test_shares_and_relevance_stay_within_0_and_1_whatever_the_scores() -> None:
    everything = torch.ones(50, 3, 3, dtype=torch.bool)
    for scale in (1e-3, 1.0, 1e4):
        choice = choose(everything, torch.randn(20, 50, generator=torch.Generator().manual_seed(1)) * scale)
        assert choice.shares.isfinite().all()
        assert 0 < choice.shares.min() <= choice.shares.max() <= 1
        assert 0 <= choice.relevance.min() <= choice.relevance.max() <= 1
        torch.testing.assert_close(choice.relevance, torch.ones(20, 3, 3))


def test_a_single_proposal_is_certain() -> None:
    choice = choose(MASKS[:1], torch.tensor([[-100.0], [3.0]]))
    assert torch.equal(choice.masks, MASKS[[0, 0]])
    assert choice.shares.tolist() == [1.0, 1.0]


def test_without_proposals_answers_are_empty_masks_of_share_0() -> None:
    choice = choose(MASKS[:0], torch.zeros(2, 0))
    assert choice.masks.dtype == torch.bool
    assert choice.masks.shape == choice.relevance.shape == (2, 4, 5)
    assert not choice.masks.any()
    assert not choice.relevance.any()
    assert choice.shares.tolist() == [0.0, 0.0]


def test_without_expressions_there_are_no_answers() -> None:
    for masks in (MASKS, MASKS[:0]):
        choice = choose(masks, torch.zeros(0, len(masks)))
        assert choice.masks.shape == choice.relevance.shape == (0, 4, 5)
        assert choice.shares.shape == (0,)
