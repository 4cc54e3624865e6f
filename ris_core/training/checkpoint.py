"""The one checkpoint format: a folder with weights in safetensors, optimiser state, and a readable `state.json`.

    last.safetensors    the weights to go on from
    best.safetensors    the weights with the best validation score so far (absent before the first validation)
    optimizer.pt        optimiser, gradient scaler and weight average (torch, read with weights_only=True)
    state.json          position (epoch, next step), best score, history of epochs, format version

The schedule, the sampler and the random numbers of a step are functions of that position, so these four files are all
that is needed to go on exactly.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ris_core.errors import WeightsError

FORMAT = 1


@dataclass
class Position:
    """Where training stands: `step` is the next step of `epoch`; `history` has one row per finished epoch."""

    epoch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    best_score: float = float("-inf")
    best_epoch: int = -1
    history: list[dict[str, float]] = field(default_factory=list)


@dataclass
class Checkpoint:
    """What `save` writes and `load` returns. Tensors are on the CPU after `load`."""

    position: Position
    model: dict[str, torch.Tensor]
    optimizer: dict[str, Any]
    best: dict[str, torch.Tensor] | None = None


def save(folder: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint beside `folder` and put it in place when it is whole; an older one is replaced."""
    temporary = folder.with_name(folder.name + ".partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    write_into(temporary, checkpoint)
    old = folder.with_name(folder.name + ".old")
    if folder.exists():  # else the old one is all there is, and stays until the new one is in place
        shutil.rmtree(old, ignore_errors=True)
        os.replace(folder, old)
    os.replace(temporary, folder)
    shutil.rmtree(old, ignore_errors=True)


def write_into(folder: Path, checkpoint: Checkpoint) -> None:
    """Write the files of a checkpoint into an existing, private folder."""
    save_file(_contiguous(checkpoint.model), str(folder / "last.safetensors"))
    if checkpoint.best is not None:
        save_file(_contiguous(checkpoint.best), str(folder / "best.safetensors"))
    torch.save(checkpoint.optimizer, folder / "optimizer.pt")
    (folder / "state.json").write_text(json.dumps({"format": FORMAT, **asdict(checkpoint.position)}, indent=1))


def load(folder: Path) -> Checkpoint:
    """Read a checkpoint. Raises WeightsError if a file is missing or damaged, or the format is another one.

    A folder that `save` was replacing when it was stopped is found under its `.old` name.
    """
    if not folder.exists() and folder.with_name(folder.name + ".old").exists():
        folder = folder.with_name(folder.name + ".old")
    missing = [n for n in ("last.safetensors", "optimizer.pt", "state.json") if not (folder / n).exists()]
    if missing:
        raise WeightsError(
            f"{folder} is not a whole checkpoint: {', '.join(missing)} missing; delete it to start afresh"
        )
    best = folder / "best.safetensors"
    try:
        state = json.loads((folder / "state.json").read_text())
        model = load_file(str(folder / "last.safetensors"))
        optimizer = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
        best_weights = load_file(str(best)) if best.exists() else None
    except (SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WeightsError(f"{folder} is damaged ({reason}); delete it to start afresh") from error
    if state.pop("format", None) != FORMAT:
        raise WeightsError(
            f"{folder}/state.json has another format than {FORMAT}; delete the checkpoint to start afresh"
        )
    return Checkpoint(Position(**state), model, optimizer, best_weights)


def exists(folder: Path) -> bool:
    """Whether `load` would find a checkpoint at `folder`."""
    return folder.exists() or folder.with_name(folder.name + ".old").exists()


def cpu_copy(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict's own copy on the CPU, safe from later steps."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in state.items()}


def _contiguous(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """safetensors wants plain contiguous, unshared tensors (channels_last weights are not)."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
