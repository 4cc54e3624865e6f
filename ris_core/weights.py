"""Readers of files that hold a model, whoever made them. What a file is, its content decides, not its name.

Each reader gives what a file holds, or raises a WeightsError that says what the file is instead and what to do. No code in a
file is run: what `torch.save` wrote goes through torch's restricted unpickler, which knows tensors and plain values only.
"""

from __future__ import annotations

import json
import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from ris_core.contents import AGAIN, KEYS, BadFile, first_bytes, kind_of, pickled, pointer, reason, resaving, some
from ris_core.errors import WeightsError, list_problems
from ris_core.options import Plain

CAUSAL_MASK = "attn_mask"  # the buffer of CLIP's text that rightly holds -inf; every model makes its own
WRAPPERS = ("module.", "model.")  # what DataParallel and Lightning put before every name
COMPILED = "_orig_mod"  # the part of a name that torch.compile puts before what it compiled
AVERAGED = "n_averaged"  # the counter that torch's AveragedModel keeps beside its weights
FLOATS = {torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2}
INTEGERS = {torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool}

EARLIER = "take weights from before they went wrong, or download them again"


def read_json(path: Path) -> Plain:
    """Read the object in a JSON file. Raises BadFile if it is missing, damaged or holds something else."""
    again = "write its folder again"
    head = first_bytes(path)
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        what, remedy = pointer(head) or (f"is damaged, cut short or no JSON at all ({reason(error)})", again)
        raise BadFile(path, what, remedy) from None
    if not isinstance(content, dict):
        raise BadFile(path, f"is damaged: it holds a {type(content).__name__}, not names and values", again)
    return content


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of a safetensors file, under its own names. Raises BadFile if it is anything else or not usable."""
    if (kind := kind_of(path)) != "safetensors":
        raise BadFile(path, f"cannot be read as safetensors: it is {kind}", "give the file that belongs here")
    state = _load_safetensors(path)
    if flaws := _flaws(state):
        raise BadFile(path, f"holds weights that cannot be used: {some(flaws)}", EARLIER)
    return state


def read_torch(path: Path) -> object:
    """Read what torch.save wrote: tensors and plain values. Raises BadFile if it is anything else, or needs more than those."""
    if (kind := kind_of(path)) != "a file of torch.save":
        raise BadFile(path, f"cannot be read as a file of torch.save: it is {kind}", "give the file that belongs here")
    return _load_torch(path)


def read_state(path: str | Path) -> dict[str, torch.Tensor]:
    """Read the state dict in a weights file: safetensors, TorchScript (as OpenAI's), or what torch.save wrote; see `state_of`.

    Raises WeightsError if it is anything else, or not usable.
    """
    path = Path(os.path.expanduser(path))
    kind = kind_of(path)
    if kind == "safetensors":
        return state_of(_load_safetensors(path), str(path))
    if kind == "a file of torch.save":
        return state_of(_load_torch(path), str(path))
    try:
        module = torch.jit.load(path, map_location="cpu")
    except Exception as error:  # whatever a damaged file makes a decoder raise
        raise BadFile(path, f"is a TorchScript archive that cannot be opened ({reason(error)})", AGAIN) from error
    return state_of(module.state_dict(), str(path))


def state_of(content: object, source: str) -> dict[str, torch.Tensor]:
    """Find the state dict in what a file held: itself, or in a whole checkpoint; without what wrappers put before its names.

    Raises WeightsError, which begins with `source`, if there is none, or if weights are not finite numbers.
    """
    for _ in range(3):  # {"model": {"state_dict": ...}} is met; a checkpoint that holds itself ends here, too
        if isinstance(content, Mapping):
            content = next((content[key] for key in KEYS if isinstance(content.get(key), Mapping)), content)
    state = _tensors(content)
    if not isinstance(content, Mapping) or not state or len(state) < len(content):
        raise WeightsError(f"{source} holds no state dict: {_instead(content)}")
    if flaws := _flaws(state):
        raise WeightsError(list_problems(f"{source} holds weights that cannot be used", flaws, EARLIER))
    return unwrapped(state)


def unwrapped(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Leave out what wrappers put before every name, in any order and number, and an average's counter."""
    found = {name: tensor for name, tensor in state.items() if name != AVERAGED}
    plain = {".".join(part for part in name.split(".") if part != COMPILED): tensor for name, tensor in found.items()}
    if len(plain) == len(found):
        found = plain
    while found and (prefix := next((each for each in WRAPPERS if all(name.startswith(each) for name in found)), "")):
        found = {name.removeprefix(prefix): tensor for name, tensor in found.items()}
    return found


def load_strictly(model: nn.Module, state: Mapping[str, torch.Tensor], title: str) -> None:
    """Load a state dict that must match in every key and shape; precision is converted.

    Raises:
        WeightsError: lists every missing key, unexpected key and differing shape or kind of number at once, under the title.
    """
    expected = model.state_dict()
    state = {key: value for key, value in state.items() if key in expected or not key.endswith(CAUSAL_MASK)}
    problems = [f"missing: {key} {list(expected[key].shape)}" for key in expected if key not in state]
    problems += [f"not part of the model: {key} {list(state[key].shape)}" for key in state if key not in expected]
    problems += [
        f"shape of {key}: {list(state[key].shape)} in the weights, {list(expected[key].shape)} in the model"
        for key in expected
        if key in state and state[key].shape != expected[key].shape
    ]
    problems += [
        f"type of {key}: {state[key].dtype} in the weights, {expected[key].dtype} in the model"
        for key in expected
        if key in state and expected[key].is_floating_point() and not state[key].is_floating_point()
    ]
    if problems:
        raise WeightsError(list_problems(title, problems, "Give the architecture these weights were made with."))
    model.load_state_dict(state)


def _load_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except Exception as error:  # whatever a damaged file makes a decoder raise
        what = f"is cut short or damaged: not readable as safetensors ({reason(error)})"
        raise BadFile(path, what, AGAIN) from error


def _load_torch(path: Path) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged file makes a decoder raise
        raise _refusal(path, error) from None  # in the chain there would be torch's advice to run what is in the file


def _refusal(path: Path, error: Exception) -> BadFile:
    """Tell why a file of torch.save is not read, and what to do."""
    written = pickled(path)
    if needed := re.findall(r"GLOBAL ([\w.]+)", str(error)):
        what = f"needs more than tensors and plain values ({needed[0]}), and could run any code: it is not opened here"
        return BadFile(path, what, resaving(written))
    if isinstance(error, pickle.UnpicklingError) and written[:2] not in (b"\x80\x02", b"\x80\x03"):
        return BadFile(path, "is damaged, or was written with another pickle protocol than torch's", resaving(written))
    return BadFile(path, f"is cut short or damaged ({reason(error)})", AGAIN)


def _tensors(content: object) -> dict[str, torch.Tensor]:
    """Give all tensors with names in a mapping, if it is one."""
    items = content.items() if isinstance(content, Mapping) else ()
    return {name: value.detach() for name, value in items if isinstance(name, str) and isinstance(value, torch.Tensor)}


def _instead(content: object) -> str:
    """Tell what there is in place of a state dict, and what to do."""
    expected = f"expected names and tensors, by themselves or under {', '.join(KEYS)}; found"
    if not isinstance(content, Mapping):
        return f"{expected} a {type(content).__name__}"
    tensors = _tensors(content)
    others = [f"{name!r} ({type(value).__name__})" for name, value in content.items() if name not in tensors]
    nested = {name: value for name, value in content.items() if isinstance(value, Mapping)}
    within = next((name for name, value in nested.items() if value and len(_tensors(value)) == len(value)), None)
    remedy = f'; if {within!r} is it: `torch.save(checkpoint[{within!r}], "weights.pt")`' if within is not None else ""
    return f"{expected} {some(others) or 'nothing'}{remedy}"


def _flaws(state: Mapping[str, torch.Tensor]) -> list[str]:
    """Tell what keeps tensors from being weights, each as a line that begins with the tensor's name."""
    found = ((name, _flaw(name, tensor)) for name, tensor in state.items())
    return [f"{name} {flaw}" for name, flaw in found if flaw]


def _flaw(name: str, tensor: torch.Tensor) -> str:
    if tensor.is_meta:
        return "has a shape but no values"
    if tensor.layout != torch.strided or tensor.dtype not in FLOATS | INTEGERS:
        return f"is no plain tensor of real numbers ({tensor.layout}, {tensor.dtype})"
    if tensor.dtype in INTEGERS or name.endswith(CAUSAL_MASK):
        return ""
    wrong = int((~torch.isfinite(tensor.float())).sum())
    return f"is not finite in {wrong} of {tensor.numel()} values" if wrong else ""
