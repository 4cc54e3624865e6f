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
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from ris_core.contents import BadFile, reason
from ris_core.errors import ConfigError, WeightsError
from ris_core.files import replaced, replaced_folder
from ris_core.options import Plain, from_plain, option
from ris_core.weights import read_json, read_safetensors, read_torch

FORMAT = 1


@dataclass
class Position:
    """Where training stands: `step` is the next step of `epoch`; `history` has one row per finished epoch."""

    epoch: int = option(0, minimum=0)
    step: int = option(0, minimum=0)
    loss_sum: float = 0.0
    best_score: float = float("-inf")
    best_epoch: int = option(-1, minimum=-1)
    history: list[dict[str, float]] = field(default_factory=list)


@dataclass
class Checkpoint:
    """What `save` writes and `load` returns. Tensors are on the CPU after `load`.

    optimizer: state dicts of the optimiser ("optimizer"), of the gradient scaler ("scaler") and, where there is one, of the
    weight average ("average").
    """

    position: Position
    model: dict[str, torch.Tensor]
    optimizer: dict[str, Any]
    best: dict[str, torch.Tensor] | None = None

    def restore(self, optimizer: Optimizer, scaler: torch.amp.GradScaler, average: AveragedModel | None = None) -> None:
        """Give optimiser (Adam or AdamW), gradient scaler and weight average their states back.

        Raises WeightsError if they are not those of this model and these options.
        """
        groups = [_types(group) for group in optimizer.param_groups]
        try:
            optimizer.load_state_dict(self.optimizer["optimizer"])
            scaler.load_state_dict(self.optimizer["scaler"])
            if average is not None:
                average.load_state_dict(self.optimizer["average"])
            fits = all(before <= _types(group) for before, group in zip(groups, optimizer.param_groups, strict=True))
            problem = "" if fits else "its groups of parameters have other options"
            if not all(_is_state_of(parameter, state) for parameter, state in optimizer.state.items()):
                problem = "its moments have other shapes than the parameters"
        except Exception as error:  # torch checks little of what it is given
            problem = reason(error)
        if problem:
            raise WeightsError(
                f"optimizer.pt in the checkpoint of this run does not fit its model and options ({problem}); delete the "
                "checkpoint to start afresh"
            )


def save(folder: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint beside `folder` and put it in place when it is whole; an older one is replaced."""
    with replaced_folder(folder) as temporary:
        write_into(temporary, checkpoint)


def write_into(folder: Path, checkpoint: Checkpoint) -> None:
    """Write the files of a checkpoint into an existing, private folder."""
    save_file(_contiguous(checkpoint.model), str(folder / "last.safetensors"))
    if checkpoint.best is not None:
        save_file(_contiguous(checkpoint.best), str(folder / "best.safetensors"))
    torch.save(checkpoint.optimizer, folder / "optimizer.pt")
    (folder / "state.json").write_text(json.dumps({"format": FORMAT, **asdict(checkpoint.position)}, indent=1))


def load(folder: Path) -> Checkpoint:
    """Read a checkpoint. Raises WeightsError if a file is missing or damaged, or the format is another one.

    One that `save` was replacing when it was stopped is found under its other name.
    """
    if not folder.exists() and replaced(folder).exists():
        folder = replaced(folder)
    missing = [n for n in ("last.safetensors", "optimizer.pt", "state.json") if not (folder / n).exists()]
    if missing:
        raise WeightsError(
            f"{folder} is not a whole checkpoint: {', '.join(missing)} missing; delete it to start afresh"
        )
    best = folder / "best.safetensors"
    try:
        state = read_json(folder / "state.json")
        if state.pop("format", None) != FORMAT:
            raise WeightsError(
                f"{folder}/state.json has another format than {FORMAT}; delete the checkpoint to start afresh"
            )
        position = _position(state)
        model = read_safetensors(folder / "last.safetensors")
        optimizer = _optimizer(folder / "optimizer.pt")
        best_weights = read_safetensors(best) if position.best_epoch > 0 or best.exists() else None
    except BadFile as error:
        raise WeightsError(
            f"{folder} is damaged ({error.path.name} {error.what}); delete it to start afresh"
        ) from error
    except ConfigError as error:
        raise WeightsError(f"{folder} is damaged ({error}); delete it to start afresh") from error
    return Checkpoint(position, model, optimizer, best_weights)


def _position(content: Plain) -> Position:
    """Read where training stands, of what state.json holds. Raises ConfigError with all that is wrong with it."""
    missing = [each.name for each in fields(Position) if each.name not in content]
    if missing:
        raise ConfigError(f"state.json: {', '.join(missing)} missing")
    history = content.pop("history")
    rows = history if isinstance(history, list) else [None]
    if not all(isinstance(row, dict) and all(type(value) in (int, float) for value in row.values()) for row in rows):
        raise ConfigError("state.json: history: expected a list of epochs, each of names and numbers")
    if any(row.keys() != history[0].keys() for row in history):
        raise ConfigError("state.json: history: epochs have different names")
    position = from_plain(Position, content, "state.json")
    if not position.best_epoch <= len(history):
        raise ConfigError(f"state.json: best_epoch is {position.best_epoch}, but history has {len(history)} epochs")
    position.history = history  # its whole numbers stay so
    return position


def _optimizer(path: Path) -> dict[str, Any]:
    """Read the state dicts in optimizer.pt. Raises BadFile if there are none, or not all that are needed."""
    content = read_torch(path)
    if not isinstance(content, dict):
        raise BadFile(path, f"holds a {type(content).__name__}, no state dicts", "write it again")
    lacking = [name for name in ("optimizer", "scaler") if not isinstance(content.get(name), dict)]
    if not lacking:
        needed = {"state": dict, "param_groups": list}
        inner = content["optimizer"]
        lacking = [f"{name} of the optimizer" for name in needed if not isinstance(inner.get(name), needed[name])]
    if lacking:
        raise BadFile(path, f"lacks {', '.join(lacking)}", "write it again")
    return content


def _types(group: Mapping[str, Any]) -> set[tuple[object, ...]]:
    """Name the options of a group of parameters with their types; switches with how they are set."""
    return {
        (name, value if isinstance(value, bool) else tuple(map(type, value if isinstance(value, tuple) else [value])))
        for name, value in group.items()
    }


def _is_state_of(parameter: torch.Tensor, state: Mapping[str, object]) -> bool:
    """Tell whether this is what Adam keeps of a parameter: how many steps it made, and two moments."""
    shapes = {name: value.shape for name, value in state.items() if isinstance(value, torch.Tensor)}
    moment = parameter.shape
    return not state or shapes == {"step": torch.Size(()), "exp_avg": moment, "exp_avg_sq": moment}


def exists(folder: Path) -> bool:
    """Tell whether `load` would find a checkpoint at `folder`."""
    return folder.exists() or replaced(folder).exists()


def cpu_copy(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Give a state dict's own copy on the CPU, safe from later steps."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in state.items()}


def _contiguous(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Make tensors plain contiguous and unshared, as safetensors wants them (channels_last weights are not)."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
