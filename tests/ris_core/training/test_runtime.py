"""A plain process: one rank of one; what torchrun's environment says is believed, and two processes share one step."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_world import Tiny
from torch import multiprocessing, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from ris_core.device import best_device
from ris_core.storage import Storage
from ris_core.training.checkpoint import Checkpoint, Checkpoints, Position
from ris_core.training.loop import Trainer
from ris_core.training.run import first_stage_model, make_trainer
from ris_core.training.runtime import LocalRuntime, share_buffers, sum_over_ranks


def plain(folder: Path) -> LocalRuntime:
    return LocalRuntime(Checkpoints(Storage(folder)), "cpu")


def example(epoch: int) -> Checkpoint:
    optimizer = torch.optim.Adam([nn.Parameter(torch.ones(2))])
    state = {"optimizer": optimizer.state_dict(), "scaler": {}}
    return Checkpoint(Position(epoch=epoch), {"weight": torch.ones(2)}, state)


def test_a_plain_process_is_alone(tmp_path: Path) -> None:
    runtime = plain(tmp_path)
    assert (runtime.rank, runtime.world, runtime.device) == (0, 1, torch.device("cpu"))
    model = nn.Linear(2, 2)
    assert runtime.prepare(model) is model
    values = torch.arange(3.0)
    assert sum_over_ranks(values) is values
    share_buffers(nn.BatchNorm1d(2))  # has nobody to share with
    assert values.tolist() == [0, 1, 2]


def test_it_loads_what_it_saved_last(tmp_path: Path) -> None:
    runtime = plain(tmp_path / "run")
    assert runtime.load() is None
    for epoch in (1, 2):
        runtime.save(example(epoch))
    runtime.finish()
    found = plain(tmp_path / "run").load()
    assert found is not None
    assert found.position.epoch == 2


def test_only_the_first_rank_speaks_of_damage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runtime = plain(tmp_path)
    runtime.save(example(1))
    runtime.finish()
    (tmp_path / "00001-0000000/last.safetensors").write_bytes(b"")
    other, first = plain(tmp_path), plain(tmp_path)
    other.rank = 1
    assert other.load() is None
    assert capsys.readouterr().err == ""
    assert first.load() is None
    assert "starting afresh" in capsys.readouterr().err


def test_the_best_device_is_this_processs_gpu_or_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert best_device() == "cuda:3"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert best_device() == "cpu"


# Two processes

IMAGES = 6


def trainer_of(tiny: Tiny, runtime: LocalRuntime, parts: int | None) -> Trainer:
    """The first stage of RISCLIP, which has no batch norm: what a step does is a sum over its expressions."""
    section = tiny.params().of("risclip")
    params = section.initialise
    assert params is not None
    params.batch_images, params.micro_batch_images = IMAGES, parts
    return make_trainer(first_stage_model(section, "risclip", tiny.clip_vit), params, tiny.store(), runtime)


def stepped(trainer: Trainer) -> dict[str, Any]:
    """What a step leaves: its loss, the gradients, and how many images each forward pass was given."""
    seen: list[int] = []
    trainer.model.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    trainer.model.train()
    loss = trainer._step(trainer.batches.epoch(0)[0], 0)
    gradients = [parameter.grad for parameter in trainer.trained if parameter.grad is not None]
    return {"loss": loss, "gradients": gradients, "seen": seen}


def counted_sum(sums, bucket):  # type: ignore[no-untyped-def]  # torch reads types, and not from texts
    """Sum gradients over the processes as ever, and note how many there were."""
    sums.append(bucket.buffer().numel())
    return allreduce_hook(torch.distributed.group.WORLD, bucket)


def one_of_two(rank: int, port: int, tiny: Tiny, folder: Path) -> None:
    """Do a step in one go and in parts, in one of two processes; what comes of it is put into a file."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    found: dict[str, Any] = {}
    for name, parts in (("whole", None), ("parts", 2)):
        runtime = plain(folder / name)
        trainer = trainer_of(tiny, runtime, parts)
        sums: list[int] = []
        assert isinstance(trainer.ddp, nn.parallel.DistributedDataParallel)
        trainer.ddp.register_comm_hook(sums, counted_sum)
        found[name] = {**stepped(trainer), "sums": sum(sums)}
        trainer._save()  # by the first alone
        runtime.finish()
        found[name]["loaded"] = trainer.runtime.load() is not None
    norm = nn.BatchNorm1d(2)
    norm.running_mean += rank + 1  # type: ignore[operator]
    share_buffers(norm)
    found["shared"] = norm.running_mean
    found["sum"] = sum_over_ranks(torch.tensor([1.0, rank]))
    torch.save(found, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_share_a_step_in_one_go_and_in_parts(tiny: Tiny, tmp_path: Path) -> None:
    """Gradients are those of one process over the whole batch, to rounding, and summed once a step, whatever the parts."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(one_of_two, (port, tiny, tmp_path), nprocs=2)
    alone = stepped(trainer_of(tiny, plain(tmp_path / "alone"), None))
    assert alone["seen"] == [IMAGES]
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    scale = max(gradient.abs().max().item() for gradient in alone["gradients"])
    for name, seen in (("whole", [3]), ("parts", [2, 1])):
        assert first[name]["seen"] == second[name]["seen"] == seen
        assert first[name]["loss"] != second[name]["loss"], "each has its half of the batch"
        assert (first[name]["loss"] + second[name]["loss"]).item() / 2 == pytest.approx(alone["loss"].item(), rel=1e-5)
        ours, theirs = first[name]["gradients"], second[name]["gradients"]
        assert len(ours) == len(alone["gradients"]) > 4
        for mine, other, expected in zip(ours, theirs, alone["gradients"], strict=True):
            assert torch.equal(mine, other)
            torch.testing.assert_close(mine, expected, rtol=1e-3, atol=1e-5 * scale)
        assert first[name]["sums"] == sum(gradient.numel() for gradient in ours), "each gradient travels once"
        assert first[name]["loaded"]
        assert second[name]["loaded"]
    for found in (first, second):
        assert found["shared"].tolist() == [1, 1], "the first one's"
        assert found["sum"].tolist() == [2, 1]
