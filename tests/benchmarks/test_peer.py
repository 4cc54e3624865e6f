"""The peer is the authors' checkout, or nothing; a ratio stands beside what it is of."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import peer
from benchmarks.measure import Report, Timing
from benchmarks.peer import FILES, Peers, check, package, report_peers, their_evaluation
from benchmarks.samples import SENTENCES_OF_REFS, write_images
from ris_core.errors import ConfigError


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder that looks like one; its `__init__` cannot be imported, as the authors' without loguru."""
    (tmp_path / "model").mkdir()
    for name in FILES:
        (tmp_path / "model" / name).write_text("from . import layers\n" if name == "segmenter.py" else "x = 1\n")
    (tmp_path / "model/__init__.py").write_text("import a_package_that_nobody_has\n")
    return tmp_path


def test_what_is_no_checkout_is_refused(tmp_path: Path, checkout: Path) -> None:
    check(checkout, "cpu")
    (checkout / "model/layers.py").unlink()
    with pytest.raises(ConfigError, match=r"is no checkout of CRIS: model/layers\.py missing; get one by `git clone"):
        check(checkout, "cpu")
    with pytest.raises(ConfigError, match=r"model/clip\.py, model/layers\.py, model/segmenter\.py missing"):
        check(tmp_path / "nowhere", "cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_told(checkout: Path) -> None:
    with pytest.raises(ConfigError, match="this machine has no GPU"):
        check(checkout, "cuda")


def test_their_package_is_there_in_the_block_alone(checkout: Path) -> None:
    with package(checkout):
        import model.segmenter  # type: ignore[import-not-found]

        assert model.segmenter.layers.x == 1
    assert not [name for name in sys.modules if name == "model" or name.startswith("model.")]


class Half(nn.Module):
    """Marks the left half of every photo."""

    def forward(self, images: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        assert tokens.shape == (1, 17)
        logits = torch.full((1, 1, 26, 26), -5.0)
        logits[..., :13] = 5.0
        return logits


def test_their_loop_asks_each_sentence_and_scores_it_by_its_mask(tmp_path: Path) -> None:
    records = write_images(tmp_path, 1)
    scores = their_evaluation(Half(), tmp_path, records, 104, "cpu")
    assert len(scores) == sum(SENTENCES_OF_REFS)
    first, second, *_ = records[0].refs
    ends = [len(first.sentences), len(first.sentences) + len(second.sentences)]
    for some in (scores[: ends[0]], scores[ends[0] : ends[1]]):
        assert len(set(some)) == 1, "the answer is always the same"
    assert all(0 <= score < 1 for score in scores)


def test_each_of_ours_stands_beside_theirs() -> None:
    spent = {"their step": 8.0, "our step": 6.0, "their evaluation": 14.0, "our evaluation": 7.0}
    report = Report("peer", {})
    report_peers(report, Peers({name: Timing(s, 0.0) for name, s in spent.items()}, 1e-6, 2, 7), "cpu")
    rows = {row.what.strip(): row for row in report.rows}
    assert (rows["here"].ratio, rows["here"].value) == (0.75, 3.0)
    assert rows["here"].of == f"that (goal {peer.GOALS['cpu']})"
    assert (rows["here, from photo to score"].ratio, rows["here, from photo to score"].value) == (2.0, 1.0)
