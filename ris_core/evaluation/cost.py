"""What a system costs: parameters, floating-point operations and waiting time of one answer.

Times mean little away from their machine, so they come with the rate at which the same device multiplies matrices,
measured in the same call, and with the time that a first answer would take at that rate.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ris_core.errors import DataError
from ris_core.evaluation.behaviour import Answering

MATMUL_SIDE = {"cpu": 1024, "cuda": 8192}  # large enough for the full rate, small enough for a blink
MATMUL_ROUNDS = 5


class Costly(Answering, Protocol):
    """A predictor whose model can be looked into."""

    model: nn.Module


def cost(
    predictor: Costly, rgb: np.ndarray, expressions: Sequence[str], repeats: int = 5
) -> dict[str, float | int | str]:
    """Count and time answers about `rgb`, uint8 (H, W, 3), to `expressions`. Sets the predictor's image.

    parameters, trained_parameters: elements of all of the model's tensors, and of those that its `param_groups` hands to
        an optimiser (0 without that method); a shared one counts once. What a predictor keeps beside its model (SAM, for
        proposals) is not among them.
    gflop_image, gflop_expression: 1e9 operations, two per multiply-add, of `set_image` and of `predict` with one
        expression (the mean over all). PyTorch's matrix products, convolutions and attention count, the rest does not.
    ms_first: milliseconds of `set_image` and one expression; ms_next: of one more about the same image. The best of
        `repeats`, which take the expressions in turn, after a warm-up, as other work may go on beside this; both include
        the work around the network.
    device: "cpu, 2 threads", or the GPU's name. gflop_per_s_matmul: its best rate in float32 matrix products.
    floor_ms_first: milliseconds of a first answer's operations at that rate. Not quite a bound on a GPU, where cuDNN may
        run convolutions in TF32.

    Raises DataError if there is no expression or `repeats` is below 1.
    """
    if isinstance(expressions, str) or not len(expressions):
        raise DataError(f"cost needs a list of at least one expression to ask; got {expressions!r}")
    if repeats < 1:
        raise DataError(f"cost cannot take the best of {repeats} repeats: use 1 or more")
    device = _device(predictor.model)
    image, expression = _operations(predictor, rgb, expressions)
    first, following = _waits(predictor, rgb, expressions, repeats, device)
    rate = matmul_rate(device)
    return {
        "parameters": _elements(predictor.model.parameters()),
        "trained_parameters": trained_parameters(predictor.model),
        "gflop_image": image / 1e9,
        "gflop_expression": expression / 1e9,
        "ms_first": 1e3 * min(first),
        "ms_next": 1e3 * min(following),
        "device": device_name(device),
        "gflop_per_s_matmul": rate / 1e9,
        "floor_ms_first": 1e3 * (image + expression) / rate,
    }


def trained_parameters(model: nn.Module) -> int:
    """Elements of the tensors that `model.param_groups` hands to an optimiser; 0 if it has no such method."""
    if not hasattr(model, "param_groups"):
        return 0
    groups = model.param_groups(1.0, 1.0, "head")  # type: ignore[operator]  # the rates do not change which are trained
    return _elements(parameter for group in groups for parameter in group["params"])


def _elements(parameters: Iterator[nn.Parameter]) -> int:
    return sum({id(parameter): parameter.numel() for parameter in parameters}.values())


def _operations(predictor: Answering, rgb: np.ndarray, expressions: Sequence[str]) -> tuple[float, float]:
    """Operations of `set_image`, and of `predict` with one expression, mean over all."""
    with _countable():
        image = count_operations(partial(predictor.set_image, rgb))
        asked = [count_operations(partial(predictor.predict, [text])) for text in expressions]
    return float(image), statistics.fmean(asked)


def count_operations(function: Callable[[], object]) -> int:
    """Floating-point operations of one call, two per multiply-add. Exact only for kernels that the counter knows."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@contextmanager
def _countable() -> Iterator[None]:
    """Do without fused kernels: PyTorch's counter takes those it does not know for free.

    These are attention on a CPU, the fast path of nn.MultiheadAttention and cuDNN's recurrent layers (torch 2.12). Broken
    up, they run the same products, so that the count is also the same on every device. LSTMs on a CPU stay uncounted: no
    system has one.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), torch.backends.cudnn.flags(enabled=False):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _waits(
    predictor: Answering, rgb: np.ndarray, expressions: Sequence[str], repeats: int, device: torch.device
) -> tuple[list[float], list[float]]:
    """Seconds of each first answer and of each further one."""
    first, following = [], []
    for turn in range(repeats + 1):
        one, other = (expressions[(turn + i) % len(expressions)] for i in (0, 1))
        first.append(_seconds(partial(_first_answer, predictor, rgb, one), device))
        following.append(_seconds(partial(predictor.predict, [other]), device))
    return first[1:], following[1:]  # the first turn warms up


def _first_answer(predictor: Answering, rgb: np.ndarray, text: str) -> None:
    predictor.set_image(rgb)
    predictor.predict([text])


def _seconds(function: Callable[[], object], device: torch.device) -> float:
    _finish(device)
    start = time.perf_counter()
    function()
    _finish(device)
    return time.perf_counter() - start


def _finish(device: torch.device) -> None:
    if device.type == "cuda":  # it works on while Python goes ahead
        torch.cuda.synchronize(device)


def matmul_rate(device: torch.device) -> float:
    """Operations per second of a large float32 matrix product: the best of five, as it is to be a floor's measure."""
    side = MATMUL_SIDE["cuda" if device.type == "cuda" else "cpu"]
    one, other = torch.rand(2, side, side, device=device)
    with torch.inference_mode():
        best = min(_seconds(lambda: one @ other, device) for _ in range(MATMUL_ROUNDS))
    return 2 * side**3 / best


def _device(model: nn.Module) -> torch.device:
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


def device_name(device: torch.device) -> str:
    """The device in words: "cpu, 2 threads", or the name of a GPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{device.type}, {threads} thread{'s' if threads != 1 else ''}"
