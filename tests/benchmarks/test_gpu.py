"""What is timed on a GPU runs on a CPU, too, with a small model; shares are shares of the chip that is there."""

from __future__ import annotations

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu import Found, measure, peak_of, report_case
from benchmarks.measure import Report
from ris_core.errors import ConfigError


@pytest.fixture(autouse=True)
def small_floor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.models.MATMUL_SIDE", {"cpu": 100, "cuda": 8192})
    monkeypatch.setattr(gpu, "ANSWERS", 3)
    monkeypatch.setattr(gpu, "WARM_STEPS", 1)


def test_everything_is_measured_of_a_small_model() -> None:
    found = measure("small", "cpu", 2, 5)
    assert found.title == "small CRIS"
    assert min(found.images_per_second, found.gflop_per_second, found.matmul, found.answer_ms) > 0
    assert 0 <= found.waited < 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["gpu"])
    with pytest.raises(ConfigError, match="no GPU that torch sees: nothing was measured"):
        gpu.main()


def test_shares_are_of_the_chip() -> None:
    assert peak_of("NVIDIA H100 80GB HBM3") == 989_000
    assert peak_of("NVIDIA GeForce RTX 5090") is None
    found = Found("CRIS-R50", 760.0, 494_500.0, 0.015, 700_000.0, 1.5)
    report = Report("gpu", {})
    report_case(report, found, 989_000.0, 0.5)
    rows = {row.what.strip(): row for row in report.rows}
    assert (rows["MFU"].value, rows["MFU"].ratio) == (0.5, 1.0)
    assert rows["waited for the loader"].ratio == 0.5
    assert rows["one more expression, p50"].ratio == 0.5
    report_case(report, found, None, 0.5)
    assert "not known" in report.rows[-3].what
