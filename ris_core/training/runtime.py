"""What a training loop needs from its surroundings, and the version without any cluster.

The loop is written against `Runtime`. `LocalRuntime` serves one plain process and `torchrun`; the orchestration adds one
for Ray Train. A loop that only sees this protocol gives the same weights under all of them.
"""

from __future__ import annotations

import os
from typing import Protocol

import torch
import torch.distributed as dist
from torch import nn

from ris_core.device import best_device
from ris_core.training.checkpoint import Checkpoint, Checkpoints


class Runtime(Protocol):
    """Rank and world of this process, its device, and where checkpoints come from and go to."""

    rank: int
    world: int
    device: torch.device

    def prepare(self, model: nn.Module) -> nn.Module:
        """Put the model on its device, wrapped for gradient averaging when there are several processes."""
        ...

    def load(self) -> Checkpoint | None:
        """Load the newest whole checkpoint of this run, if there is one. Every rank does."""
        ...

    def save(self, checkpoint: Checkpoint) -> None:
        """Have a checkpoint written while training goes on. Rank 0 alone calls it."""
        ...

    def finish(self) -> None:
        """Wait until what was given to `save` is written. Every rank calls it, at the end."""
        ...


class LocalRuntime:
    """A plain process, or one of `torchrun`'s."""

    rank: int
    world: int
    device: torch.device

    def __init__(self, checkpoints: Checkpoints, device: str | None = None):
        self.checkpoints = checkpoints
        self.rank = int(os.environ.get("RANK", 0))
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        self.device = torch.device(device or best_device())
        if self.world > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")

    def prepare(self, model: nn.Module) -> nn.Module:
        model.to(self.device)
        if self.world == 1:
            return model
        if self.device.type == "cuda":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
            return nn.parallel.DistributedDataParallel(model, device_ids=[self.device.index])
        return nn.parallel.DistributedDataParallel(model)

    def load(self) -> Checkpoint | None:
        return self.checkpoints.load(tell=self.rank == 0)

    def save(self, checkpoint: Checkpoint) -> None:
        self.checkpoints.save_beside(checkpoint)

    def finish(self) -> None:
        self.checkpoints.wait()
        self.wait()

    def wait(self) -> None:
        """Wait until every process is here."""
        if self.world > 1:
            dist.barrier()


def share_buffers(model: nn.Module) -> None:
    """Give every process rank 0's buffers: the running statistics of plain batch norms differ after a step.

    DistributedDataParallel does so before each forward pass, but validation does not go through it.
    """
    if dist.is_initialized() and dist.get_world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Give the elementwise sum of a tensor over all processes; the tensor itself where there is only one."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values
