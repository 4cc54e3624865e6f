"""A plain process: one rank of one, checkpoints in its folder; and what torchrun's environment says is believed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from ris_core.device import best_device
from ris_core.training.checkpoint import Checkpoint, Position
from ris_core.training.runtime import LocalRuntime, share_buffers, sum_over_ranks


def example(epoch: int) -> Checkpoint:
    optimizer = torch.optim.Adam([nn.Parameter(torch.ones(2))])
    state = {"optimizer": optimizer.state_dict(), "scaler": {}}
    return Checkpoint(Position(epoch=epoch), {"weight": torch.ones(2)}, state)


def test_a_plain_process_is_alone(tmp_path: Path) -> None:
    runtime = LocalRuntime(tmp_path, "cpu")
    assert (runtime.rank, runtime.world, runtime.device) == (0, 1, torch.device("cpu"))
    model = nn.Linear(2, 2)
    assert runtime.prepare(model) is model
    values = torch.arange(3.0)
    assert sum_over_ranks(values) is values
    share_buffers(nn.BatchNorm1d(2))  # has nobody to share with
    assert values.tolist() == [0, 1, 2]


def test_it_loads_what_it_reported_last(tmp_path: Path) -> None:
    runtime = LocalRuntime(tmp_path / "run", "cpu")
    assert runtime.load() is None
    for epoch in (1, 2):
        runtime.report({"epoch": epoch}, example(epoch))
    runtime.report({"epoch": 3}, None)
    found = LocalRuntime(tmp_path / "run", "cpu").load()
    assert found is not None
    assert found.position.epoch == 2


def test_a_save_that_was_stopped_is_found_again(tmp_path: Path) -> None:
    runtime = LocalRuntime(tmp_path, "cpu")
    runtime.report({}, example(4))
    (tmp_path / "checkpoint").rename(tmp_path / "checkpoint.old")
    found = runtime.load()
    assert found is not None
    assert found.position.epoch == 4


def test_only_the_first_rank_writes(tmp_path: Path) -> None:
    runtime = LocalRuntime(tmp_path, "cpu")
    runtime.rank = 1
    runtime.report({}, example(1))
    assert list(tmp_path.iterdir()) == []


def test_the_best_device_is_this_processs_gpu_or_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert best_device() == "cuda:3"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert best_device() == "cpu"
