"""Checkpoints of one training: each a folder of weights in safetensors, optimiser state, and a readable `state.json`.

    <epoch>-<step>/last.safetensors      the weights to go on from
    <epoch>-<step>/average.safetensors   their running average, where there is one
    <epoch>-<step>/best.safetensors      the weights with the best validation score so far (absent before the first validation)
    <epoch>-<step>/optimizer.pt          optimiser and gradient scaler (torch, read with weights_only=True)
    <epoch>-<step>/state.json            position (epoch, next step), best score, history, and the SHA-256 of every file

The schedule, the sampler and the random numbers of a step are functions of that position, so these files are all that is
needed to go on exactly. Weights that training does not change are in none of them: they come from what it started with.
Of a training that has ended only the best weights and the position stay, see `Checkpoints.conclude`.
`state.json` is written last and holds its own checksum, so a checkpoint is found whole or found damaged, on a disk and in a
bucket alike.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as safetensors_bytes
from torch import nn
from torch.optim import Optimizer

from ris_core.contents import BadFile, first_bytes, reason
from ris_core.errors import ClusterError, ConfigError, WeightsError
from ris_core.files import file_sha256
from ris_core.options import Plain, from_plain, option
from ris_core.storage import Storage
from ris_core.weights import read_json, read_safetensors, read_torch

FORMAT = 2
KEPT = 2  # the newest, and one to fall back on
STATE, OPTIMIZER = "state.json", "optimizer.pt"
NAME = re.compile(r"\d{5,}-\d{7,}")  # of a checkpoint's folder; others are left alone


Weights = dict[str, torch.Tensor]


@dataclass
class Position:
    """Where training stands: `step` is the next step of `epoch`; `history` has one row per finished epoch.

    `points` are all metrics that were logged on the way, each row with its `step`.
    """

    epoch: int = option(0, minimum=0)
    step: int = option(0, minimum=0)
    loss_sum: float = 0.0
    best_score: float = float("-inf")
    best_epoch: int = option(-1, minimum=-1)
    history: list[dict[str, float]] = field(default_factory=list)
    points: list[dict[str, float]] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Name it so that later ones sort behind."""
        return f"{self.epoch:05d}-{self.step:07d}"


@dataclass
class Checkpoint:
    """The state of a training. Tensors are on the CPU after loading; of weights only those are here that training changes.

    optimizer: state dicts of the optimiser ("optimizer") and of the gradient scaler ("scaler"), and of how many steps the
    average is made ("averaged").
    """

    position: Position
    model: Weights
    optimizer: dict[str, Any]
    average: Weights | None = None
    best: Weights | None = None

    @property
    def is_concluded(self) -> bool:
        """Tell whether it is what `Checkpoints.conclude` leaves, from which no training goes on."""
        return not self.optimizer

    def restore(self, optimizer: Optimizer, scaler: torch.amp.GradScaler) -> None:
        """Give optimiser (Adam or AdamW) and gradient scaler their states back.

        Raises WeightsError if they are not those of this model and these options.
        """
        groups = [_types(group) for group in optimizer.param_groups]
        try:
            optimizer.load_state_dict(self.optimizer["optimizer"])
            scaler.load_state_dict(self.optimizer["scaler"])
            fits = all(before <= _types(group) for before, group in zip(groups, optimizer.param_groups, strict=True))
            problem = "" if fits else "its groups of parameters have other options"
            if not all(_is_state_of(parameter, state) for parameter, state in optimizer.state.items()):
                problem = "its moments have other shapes than the parameters"
        except Exception as error:  # torch checks little of what it is given
            problem = reason(error)
        if problem:
            raise WeightsError(
                f"{OPTIMIZER} in the checkpoint of this run does not fit its model and options ({problem}); delete the "
                "checkpoint to start afresh"
            )


class Checkpoints:
    """The checkpoints of one run, in a folder or bucket that one process writes and any may read."""

    def __init__(self, storage: Storage):
        self.storage = storage
        self._damaged: set[str] = set()
        self._writer: ThreadPoolExecutor | None = None
        self._writing: Future[None] | None = None

    def names(self) -> list[str]:
        """List checkpoints that were written to their end, oldest first."""
        ended = [name.removesuffix(f"/{STATE}") for name in self.storage.names() if name.endswith(f"/{STATE}")]
        return [name for name in ended if NAME.fullmatch(name) and name not in self._damaged]

    def load(self, tell: bool = True) -> Checkpoint | None:
        """Load the newest whole checkpoint; None where there is none. Says on stderr which damaged ones it passed over."""
        for name in reversed(self.names()):
            try:
                return self.read(name)
            except WeightsError as error:
                self._damaged.add(name)
                told = str(error)
            left = self.names()
            going = f"going on from {left[-1]}" if left else "no whole one is left: starting afresh"
            if tell:
                print(f"warning: {told}; {going}", file=sys.stderr)
        return None

    def read(self, name: str) -> Checkpoint:
        """Read one checkpoint. Raises WeightsError if a file is missing or damaged, or the format is another one."""
        place = f"{self.storage.place}/{name}"
        try:
            position, files = self._state(name)
            state = {kind: self._weights(name, files, kind) for kind in ("last", "average", "best")}
            optimizer: dict[str, Any] = {}
            if OPTIMIZER in files:  # it goes with the last weights, `_files` sees to that
                with self._checked(name, OPTIMIZER, files) as path:
                    optimizer = _optimizer(path)
        except FileNotFoundError as error:
            raise WeightsError(f"the checkpoint {place} is not whole ({error})") from error
        except BadFile as error:
            raise WeightsError(f"the checkpoint {place} is damaged ({error.path.name} {error.what})") from error
        except ConfigError as error:
            raise WeightsError(f"the checkpoint {place} is damaged ({error})") from error
        if (position.best_epoch > 0) != (state["best"] is not None):
            raise WeightsError(f"the checkpoint {place} is damaged ({STATE}: files do not go with the position)")
        return Checkpoint(position, state["last"] or {}, optimizer, state["average"], state["best"])

    def position(self) -> Position | None:
        """Tell where the newest checkpoint stands, without its weights; None where there is none that can be read."""
        for name in reversed(self.names()):
            try:
                return self._state(name)[0]
            except (BadFile, ConfigError, FileNotFoundError):
                continue
        return None

    def save(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint beside `KEPT` - 1 older ones; others go, and what was not written to its end.

        Raises ClusterError if it cannot be written; the older ones are still there then.
        """
        name = checkpoint.position.name
        try:
            self._make_room(name)
            files: dict[str, list[str]] = {}
            for kind, weights in (
                ("last", checkpoint.model),
                ("average", checkpoint.average),
                ("best", checkpoint.best),
            ):
                if weights is not None:
                    self._put(name, f"{kind}.safetensors", safetensors_bytes(weights), files)
            buffer = io.BytesIO()
            torch.save(checkpoint.optimizer, buffer)
            self._put(name, OPTIMIZER, buffer.getvalue(), files)
            self._write_state(name, checkpoint.position, files)
        except ClusterError as error:
            raise ClusterError(f"no checkpoint could be written: {error}; {self._give_up(name)}") from error
        self._damaged.discard(name)

    def conclude(self) -> None:
        """Keep of a training that has ended the best weights and the position: nothing goes on from it any more.

        What is left is a checkpoint without `model` and `optimizer`, a fifth of one with Adam's moments, and the only one.
        """
        name = self.names()[-1]
        position, files = self._state(name)
        best = {kind: entry for kind, entry in files.items() if kind == "best.safetensors"}
        if files != best and best:
            self._write_state(name, position, best)
        stored = {f"{name}/{file}" for file, _ in best.values()} | {f"{name}/{STATE}"}
        for each in self.storage.names():
            if NAME.fullmatch(each.split("/")[0]) and each not in stored and best:
                self.storage.delete(each)

    def save_beside(self, checkpoint: Checkpoint) -> None:
        """Write like `save` while training goes on; nothing of `checkpoint` may change any more. Waits for the one before.

        Raises what kept the one before from being written.
        """
        self.wait()
        self._writer = self._writer or ThreadPoolExecutor(1, "checkpoint")
        self._writing = self._writer.submit(self.save, checkpoint)

    def wait(self) -> None:
        """Wait until what `save_beside` writes is written. Raises what kept it from that."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def _write_state(self, name: str, position: Position, files: dict[str, list[str]]) -> None:
        content = {"format": FORMAT, **asdict(position), "files": files}
        text = json.dumps({**content, "sha256": _seal(content)}, indent=1)
        self.storage.write(f"{name}/{STATE}", text.encode())

    def _make_room(self, name: str) -> None:
        """Remove what is not to stand beside the checkpoint of that name: older ones, and halves, one of its own among them."""
        whole = self.names()
        kept = {*[each for each in whole if each != name][1 - KEPT :], name}.intersection(whole)
        for folder in self.storage.folders():
            if NAME.fullmatch(folder) and folder not in kept:
                self.storage.delete_folder(folder)

    def _give_up(self, name: str) -> str:
        """Remove the half of a checkpoint, if that can be; tells where the next start goes on."""
        try:
            self.storage.delete_folder(name)
            left = self.names()
        except ClusterError:
            return "the next start goes on from the newest one that is whole"
        return f"the next start goes on from {left[-1]}" if left else "the next start begins afresh"

    def _put(self, name: str, file: str, content: bytes, files: dict[str, list[str]]) -> None:
        """Write a file and note its checksum; one with the same content is named instead (an average is often the best)."""
        found = hashlib.sha256(content).hexdigest()
        same = next((other for other, digest in files.values() if digest == found), None)
        files[file] = [same or file, found]
        if same is None:
            self.storage.write(f"{name}/{file}", content)

    def _state(self, name: str) -> tuple[Position, dict[str, list[str]]]:
        with self.storage.local(f"{name}/{STATE}") as path:
            content = read_json(path)
        seal = content.pop("sha256", None)
        if content.pop("format", None) != FORMAT:
            raise ConfigError(f"{STATE}: another format than {FORMAT}")
        if seal != _seal({"format": FORMAT, **content}):
            raise ConfigError(f"{STATE}: it is not as it was written")
        files = _files(content)
        return _position(content), files

    def _weights(self, name: str, files: dict[str, list[str]], kind: str) -> Weights | None:
        if f"{kind}.safetensors" not in files:
            return None
        with self._checked(name, f"{kind}.safetensors", files) as path:
            return read_safetensors(path)

    @contextmanager
    def _checked(self, name: str, file: str, files: dict[str, list[str]]) -> Iterator[Path]:
        """Give a local file of a checkpoint, whose bytes are those that were written; else raise BadFile."""
        stored, digest = files[file]
        with self.storage.local(f"{name}/{stored}") as path:
            first_bytes(path)  # raises BadFile if there is no file to be read
            if file_sha256(path) != digest:
                raise BadFile(path, "is not as it was written: other bytes, or cut", "")
            yield path


def _seal(content: Plain) -> str:
    """Give the checksum of what state.json holds beside it."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _files(content: Plain) -> dict[str, list[str]]:
    """Take the names and checksums of files out of what state.json holds. Raises ConfigError if they are not there."""
    files = content.pop("files", None)
    entries = [*files.values()] if isinstance(files, dict) else [None]
    if not all(isinstance(each, list) and len(each) == 2 and all(isinstance(x, str) for x in each) for each in entries):
        raise ConfigError(f"{STATE}: files missing, or not a name and a checksum each")
    needed = {"last.safetensors", OPTIMIZER} if set(files) != {"best.safetensors"} else set()  # of one that has ended
    if missing := needed - set(files):
        raise ConfigError(f"{STATE}: files: {', '.join(sorted(missing))} missing")
    return files


def _position(content: Plain) -> Position:
    """Read where training stands, of what state.json holds. Raises ConfigError with all that is wrong with it."""
    missing = [each.name for each in fields(Position) if each.name not in content]
    if missing:
        raise ConfigError(f"state.json: {', '.join(missing)} missing")
    history, points = content.pop("history"), content.pop("points")
    rows = [*history, *points] if isinstance(history, list) and isinstance(points, list) else [None]
    if not all(isinstance(row, dict) and all(type(value) in (int, float) for value in row.values()) for row in rows):
        raise ConfigError("state.json: history, points: expected lists of rows, each of names and numbers")
    if any(row.keys() != history[0].keys() for row in history):
        raise ConfigError("state.json: history: epochs have different names")
    position = from_plain(Position, content, "state.json")
    if not position.best_epoch <= len(history):
        raise ConfigError(f"state.json: best_epoch is {position.best_epoch}, but history has {len(history)} epochs")
    position.history, position.points = history, points  # their whole numbers stay so
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


def changing(model: nn.Module) -> Weights:
    """Give the entries of a state dict that training changes: all but frozen parameters. Tensors are the model's own."""
    frozen = {name for name, value in model.named_parameters(remove_duplicate=False) if not value.requires_grad}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in frozen}


def completed(weights: Weights, model: nn.Module) -> Weights:
    """Give a whole state dict: what a checkpoint holds, and the frozen rest of a model like the one it was made of."""
    changed = changing(model)
    return {name: tensor for name, tensor in model.state_dict().items() if name not in changed} | weights


def cpu_copy(state: Mapping[str, torch.Tensor]) -> Weights:
    """Give a state dict's own copy on the CPU, safe from later steps; contiguous, as safetensors wants it."""
    return {name: _copied(tensor).contiguous() for name, tensor in state.items()}


def plain_copy(state: Any) -> Any:
    """Copy nested state, an optimiser's say, with all of its tensors to the CPU, safe from later steps."""
    if isinstance(state, torch.Tensor):
        return _copied(state)
    if isinstance(state, dict):
        return {name: plain_copy(value) for name, value in state.items()}
    return [plain_copy(value) for value in state] if isinstance(state, list) else state


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True)
