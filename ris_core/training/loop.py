"""The training loop: one for every system, with or without a cluster.

It never waits for the device inside a step, never stores what it can recompute (batches, learning rates and random
numbers are functions of the position), writes checkpoints while it goes on, and after an interruption goes on exactly where
the newest of them stands.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from ris_core.data.dataset import Batch, TrainingBatches
from ris_core.device import autocast, resolved_precision
from ris_core.errors import ClusterError, ConfigError
from ris_core.models.clip import normalise
from ris_core.models.contract import MapSystem
from ris_core.training.checkpoint import Checkpoint, Position, Weights, changing, completed, cpu_copy, plain_copy
from ris_core.training.optim import make_optimizer, set_learning_rates
from ris_core.training.params import TrainParams
from ris_core.training.runtime import Runtime, share_buffers, sum_over_ranks
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
        self.average = averaged(self.model, params.ema_decay) if params.ema_decay else None
        self.position = Position()
        self.best: Weights | None = None  # as far as training changes them
        self._resume()

    def _resume(self) -> None:
        checkpoint = self.runtime.load()
        position = checkpoint.position if checkpoint is not None else self.position
        here = torch.tensor([position.epoch, position.step], device=self.device)
        if not torch.equal(sum_over_ranks(here.clone()), here * self.runtime.world):
            raise ClusterError(
                f"process {self.runtime.rank} finds the newest checkpoint at epoch {position.epoch + 1}, step "
                f"{position.step}, others elsewhere: see that all nodes reach the same RIS_STORAGE"
            )
        if checkpoint is None:
            return
        self.position, self.best = position, checkpoint.best
        if checkpoint.is_concluded:  # all there is to do is to tell what was logged
            return
        title = "The checkpoint of this run does not fit its model"
        load_strictly(self.model, completed(checkpoint.model, self.model), title)
        checkpoint.restore(self.optimizer, self.scaler)
        if self.average is not None:
            assert isinstance(self.average.module, MapSystem)
            load_strictly(self.average.module, completed(checkpoint.average or {}, self.average.module), title)
            self.average.n_averaged.fill_(checkpoint.optimizer["averaged"])
        if self.runtime.rank == 0:
            print(f"resuming at epoch {position.epoch + 1}, step {position.step}", file=sys.stderr)

    def _save(self) -> None:
        """Have the whole state written while training goes on; other ranks than 0 hold copies of it."""
        if self.runtime.rank:
            return
        state = {
            "optimizer": plain_copy(self.optimizer.state_dict()),
            "scaler": self.scaler.state_dict(),
            "averaged": 0,
        }
        average = None
        if self.average is not None:
            state["averaged"] = int(self.average.n_averaged)
            average = cpu_copy(changing(self.average.module))
        position = replace(self.position, history=[*self.position.history], points=[*self.position.points])
        self.runtime.save(Checkpoint(position, cpu_copy(changing(self.model)), state, average, self.best))

    def fit(self, log: Log = lambda metrics, step: None) -> Position:
        """Train from the current position to the end; `log(metrics, global_step)` is called on rank 0 only.

        After an interruption it gets again what was logged before, so that nothing is lost that was on its way.
        """
        if self.runtime.rank == 0:
            for row in self.position.points:
                log({name: value for name, value in row.items() if name != "step"}, int(row["step"]))
        while self.position.epoch < self.params.epochs:
            self._train_epoch(log)
            self._finish_epoch(log)
        self.runtime.finish()
        return self.position

    def best_weights(self) -> Weights:
        """Give all weights of the best epoch, the frozen ones among them, on the CPU."""
        assert self.best is not None
        return {name: tensor.cpu() for name, tensor in completed(self.best, self.model).items()}

    def _log(self, metrics: dict[str, float], step: int, log: Log) -> None:
        points = self.position.points
        if points and points[-1]["step"] == step:  # an epoch ends: its loss was logged
            metrics = {name: value for name, value in metrics.items() if name not in points[-1]}
            points[-1] = points[-1] | metrics
        else:
            points.append({"step": step, **metrics})
        log(metrics, step)

    def _train_epoch(self, log: Log) -> None:
        self.model.train()
        epoch, first = self.position.epoch, self.position.step
        total = torch.tensor(self.position.loss_sum, device=self.device)
        loader = self.batches.loader(epoch, first, self.params.loader_workers)
        quiet = self.runtime.rank > 0 or not sys.stderr.isatty()
        batches = Waiting(loader)
        bar = tqdm(batches, f"epoch {epoch + 1}/{self.params.epochs}", len(self.batches), initial=first, disable=quiet)
        started = time.perf_counter()
        for step, batch in enumerate(bar, first):
            lr = set_learning_rates(self.optimizer, self.params, epoch, step, len(self.batches))
            total += self._step(batch, epoch * len(self.batches) + step)
            self.position.step = step + 1
            done = step + 1 - first
            if (step + 1) % LOG_EVERY == 0 and self.runtime.rank == 0:
                passed = time.perf_counter() - started
                rate = done * self.params.batch_images * self.params.expressions_per_image / passed
                loss = total.item() / (step + 1)
                bar.set_postfix(loss=f"{loss:.4f}", lr=f"{lr:.1e}", samples=f"{rate:.0f}/s")
                metrics = {
                    "train/loss": loss,
                    "lr": lr,
                    "samples_per_second": rate,
                    "loader_wait": batches.seconds / passed,
                }
                self._log(metrics, epoch * len(self.batches) + step + 1, log)
            every = self.params.checkpoint_every_steps
            if every and (step + 1) % every == 0 and step + 1 < len(self.batches):
                self.position.loss_sum = total.item()
                self._stop_if_diverged(self.position.loss_sum / (step + 1))
                self._save()
        self.seconds = time.perf_counter() - started
        self.train_loss = total.item() / len(self.batches)

    def _step(self, batch: Batch, global_step: int) -> torch.Tensor:
        """Do one optimiser step; returns the detached loss, still on the device."""
        torch.manual_seed((self.params.seed * 1_000_003 + global_step) * 4099 + self.runtime.rank)
        batch = {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}
        self.optimizer.zero_grad(set_to_none=True)
        loss = torch.zeros((), device=self.device)
        parts = micro_batches(batch, self.params.micro_batch_images)
        for number, part in enumerate(parts):
            share = len(part["image"]) / len(batch["image"])
            with self._gradients_summed(number == len(parts) - 1):
                loss += self._backward(part, share)
        if self.params.clip_grad_norm:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.trained, self.params.clip_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None:
            self.average.update_parameters(self.model)
        return loss

    def _backward(self, batch: Batch, share: float) -> torch.Tensor:
        """Add the gradients of a part of the batch, `share` of it; gives its part of the loss, detached."""
        images = normalise(batch["image"]).contiguous(memory_format=torch.channels_last)
        with self.autocast:
            output = self.step_model(images, batch["tokens"], batch["image_index"])
        loss = self.model.loss(output, batch["target"], self.params.loss)
        if share < 1:
            loss = loss * share
        self.scaler.scale(loss).backward()
        return loss.detach()

    def _gradients_summed(self, last: bool) -> AbstractContextManager[None]:
        """Let the processes sum their gradients after the last part of a batch only."""
        if last or not isinstance(self.ddp, nn.parallel.DistributedDataParallel):
            return nullcontext()
        return self.ddp.no_sync()

    def _stop_if_diverged(self, loss: float) -> None:
        """Raise ConfigError before weights that went wrong take the place of good ones."""
        if not math.isfinite(loss):
            remedy = "lower train.lr, or set train.clip_grad_norm; the checkpoints from before that are kept"
            raise ConfigError(f"training diverged: the loss of epoch {self.position.epoch + 1} is {loss}; {remedy}")

    def _finish_epoch(self, log: Log) -> None:
        position = self.position
        weights = self.model if self.average is None else self.average.module
        assert isinstance(weights, MapSystem)
        self._stop_if_diverged(self.train_loss)
        share_buffers(weights)
        metrics = {"train/loss": self.train_loss, **self.validate(weights)}
        position.epoch, position.step, position.loss_sum = position.epoch + 1, 0, 0.0
        position.history.append({"epoch": position.epoch, **metrics})
        if self.params.keep == "last" or metrics["val/mIoU"] >= position.best_score:
            position.best_score, position.best_epoch = metrics["val/mIoU"], position.epoch
            self.best = cpu_copy(changing(weights))
        if self.runtime.rank == 0:
            shown = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
            print(f"epoch {position.epoch}/{self.params.epochs}  {shown}  ({self.seconds:.0f} s)", file=sys.stderr)
            self._log(metrics, position.epoch * len(self.batches), log)
        self._save()


class Waiting:
    """Gives what it is made of, and tells how long it was waited for: where that is much, the loader holds up training."""

    def __init__(self, batches: Iterable[Batch]):
        self.batches, self.seconds = batches, 0.0

    def __iter__(self) -> Iterator[Batch]:
        batches = iter(self.batches)
        while True:
            asked = time.perf_counter()
            batch = next(batches, None)
            self.seconds += time.perf_counter() - asked
            if batch is None:
                return
            yield batch


def micro_batches(batch: Batch, images: int | None) -> list[Batch]:
    """Cut a batch, made as `TrainingBatches` makes it, into parts of at most `images` images; None leaves it whole."""
    count = len(batch["image"])
    if images is None or images >= count:
        return [batch]
    each = len(batch["image_index"]) // count  # expressions of an image
    parts = []
    for first in range(0, count, images):
        asked = slice(first * each, (first + images) * each)
        part = {name: batch[name][asked] for name in ("tokens", "target")}
        index = batch["image_index"][asked] - first
        parts.append({**part, "image": batch["image"][first : first + images], "image_index": index})
    return parts


def averaged(model: MapSystem, decay: float) -> AveragedModel:
    """Make the running average of a model's weights. What is frozen is the model's own, so that it stays exactly as it is."""
    average = AveragedModel(model, multi_avg_fn=moving_average(decay), use_buffers=True)
    for own, frozen in zip(average.module.parameters(), model.parameters(), strict=True):
        if not frozen.requires_grad:
            own.data = frozen.data
    return average


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
