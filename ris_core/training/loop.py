"""The training loop: one for every system, with or without a cluster.

It never waits for the device inside a step, never stores what it can recompute (batches, learning rates and random
numbers are functions of the position), and goes on exactly where an interrupted run stopped.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from ris_core.data.dataset import TrainingBatches
from ris_core.device import autocast, resolved_precision
from ris_core.errors import ConfigError
from ris_core.models.clip import normalise
from ris_core.models.contract import MapSystem
from ris_core.training.checkpoint import Checkpoint, Position, cpu_copy
from ris_core.training.optim import make_optimizer, set_learning_rates
from ris_core.training.params import TrainParams
from ris_core.training.runtime import Runtime, share_buffers
from ris_core.weights import load_strictly

LOG_EVERY = 20


Validate = Callable[[MapSystem], dict[str, float]]
Log = Callable[[dict[str, float], int], None]
Tensors = list[torch.Tensor] | tuple[torch.Tensor, ...]


class Trainer:
    """Owns model, optimiser, weight average and position of one run; `fit` drives them to the last epoch."""

    def __init__(
        self, model: MapSystem, batches: TrainingBatches, validate: Validate, params: TrainParams, runtime: Runtime
    ):
        self.batches, self.validate, self.params, self.runtime = batches, validate, params, runtime
        self.device = runtime.device
        self.model: MapSystem = model.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.ddp = runtime.prepare(self.model)
        self.step_model = torch.compile(self.ddp) if params.compile else self.ddp
        self.optimizer = make_optimizer(self.model, params)
        self.trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.autocast = autocast(params.precision, self.device)
        scaled = resolved_precision(params.precision, self.device) == "fp16"  # the published CRIS recipe
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=scaled)
        self.average = (
            AveragedModel(self.model, multi_avg_fn=moving_average(params.ema_decay), use_buffers=True)
            if params.ema_decay
            else None
        )
        self.position = Position()
        self.best: dict[str, torch.Tensor] | None = None
        self._resume()

    def _resume(self) -> None:
        checkpoint = self.runtime.load()
        if checkpoint is None:
            return
        load_strictly(self.model, checkpoint.model, "The checkpoint of this run does not fit its model")
        checkpoint.restore(self.optimizer, self.scaler, self.average)
        self.position, self.best = checkpoint.position, checkpoint.best
        if self.runtime.rank == 0:
            print(f"resuming at epoch {self.position.epoch + 1}, step {self.position.step}", file=sys.stderr)

    def checkpoint(self) -> Checkpoint | None:
        """Give the whole state on the CPU; None on other ranks than 0, which hold copies of it."""
        if self.runtime.rank:
            return None
        state = {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}
        if self.average is not None:
            state["average"] = self.average.state_dict()
        return Checkpoint(self.position, cpu_copy(self.model.state_dict()), state, self.best)

    def fit(self, log: Log = lambda metrics, step: None) -> Position:
        """Train from the current position to the end; `log(metrics, global_step)` is called on rank 0 only."""
        while self.position.epoch < self.params.epochs:
            self._train_epoch(log)
            self._finish_epoch(log)
        return self.position

    def _train_epoch(self, log: Log) -> None:
        self.model.train()
        epoch, first = self.position.epoch, self.position.step
        total = torch.tensor(self.position.loss_sum, device=self.device)
        loader = self.batches.loader(epoch, first, self.params.loader_workers)
        quiet = self.runtime.rank > 0 or not sys.stderr.isatty()
        bar = tqdm(loader, f"epoch {epoch + 1}/{self.params.epochs}", len(self.batches), initial=first, disable=quiet)
        started = time.perf_counter()
        for step, batch in enumerate(bar, first):
            lr = set_learning_rates(self.optimizer, self.params, epoch, step, len(self.batches))
            total += self._step(batch, epoch * len(self.batches) + step)
            self.position.step = step + 1
            done = step + 1 - first
            if done % LOG_EVERY == 0 and self.runtime.rank == 0:
                rate = (
                    done
                    * self.params.batch_images
                    * self.params.expressions_per_image
                    / (time.perf_counter() - started)
                )
                loss = total.item() / (step + 1)
                bar.set_postfix(loss=f"{loss:.4f}", lr=f"{lr:.1e}", samples=f"{rate:.0f}/s")
                log({"train/loss": loss, "lr": lr, "samples_per_second": rate}, epoch * len(self.batches) + step + 1)
            every = self.params.checkpoint_every_steps
            if every and (step + 1) % every == 0 and step + 1 < len(self.batches):
                self.position.loss_sum = total.item()
                self.runtime.report({"epoch": epoch, "step": step + 1}, self.checkpoint())
        self.seconds = time.perf_counter() - started
        self.train_loss = total.item() / len(self.batches)

    def _step(self, batch: dict[str, torch.Tensor], global_step: int) -> torch.Tensor:
        """Do one optimiser step; returns the detached loss, still on the device."""
        torch.manual_seed((self.params.seed * 1_000_003 + global_step) * 4099 + self.runtime.rank)
        batch = {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}
        images = normalise(batch["image"]).contiguous(memory_format=torch.channels_last)
        with self.autocast:
            output = self.step_model(images, batch["tokens"], batch["image_index"])
        loss = self.model.loss(output, batch["target"], self.params.loss)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        if self.params.clip_grad_norm:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.trained, self.params.clip_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None:
            self.average.update_parameters(self.model)
        return loss.detach()

    def _finish_epoch(self, log: Log) -> None:
        position = self.position
        weights = self.model if self.average is None else self.average.module
        assert isinstance(weights, MapSystem)
        if not math.isfinite(self.train_loss):
            remedy = "lower train.lr, or set train.clip_grad_norm; the checkpoint before this epoch is kept"
            raise ConfigError(
                f"training diverged: the loss of epoch {position.epoch + 1} is {self.train_loss}; {remedy}"
            )
        share_buffers(weights)
        metrics = {"train/loss": self.train_loss, **self.validate(weights)}
        position.epoch, position.step, position.loss_sum = position.epoch + 1, 0, 0.0
        position.history.append({"epoch": position.epoch, **metrics})
        if self.params.keep == "last" or metrics["val/mIoU"] >= position.best_score:
            position.best_score, position.best_epoch = metrics["val/mIoU"], position.epoch
            self.best = cpu_copy(weights.state_dict())
        if self.runtime.rank == 0:
            shown = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
            print(f"epoch {position.epoch}/{self.params.epochs}  {shown}  ({self.seconds:.0f} s)", file=sys.stderr)
            log(metrics, position.epoch * len(self.batches))
        self.runtime.report({"epoch": float(position.epoch), **metrics}, self.checkpoint())


def moving_average(decay: float) -> Callable[[Tensors, Tensors, Any], None]:
    """Update in place for `AveragedModel`: average <- decay * average + (1 - decay) * value; integers are copied.

    torch's own function computes average + (1 - decay) * (value - average), which makes NaN of the -inf in CLIP's
    causal mask, a buffer. A tensor that the average shares with the model (a frozen CLIP) is left alone.
    """

    @torch.no_grad()
    def update(averages: Tensors, values: Tensors, _: Any) -> None:
        own = [i for i, average in enumerate(averages) if average.data_ptr() != values[i].data_ptr()]
        if not own:
            return
        averages, values = [averages[i] for i in own], [values[i] for i in own]
        if averages[0].is_floating_point():
            torch._foreach_mul_(averages, decay)
            torch._foreach_add_(averages, values, alpha=1 - decay)
        else:
            torch._foreach_copy_(averages, values)

    return update
