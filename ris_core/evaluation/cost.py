"""What a system costs wherever it runs: parameters and floating-point operations of one answer.

How long an answer takes depends on the machine: `python -m benchmarks.waiting` measures that.
"""

from __future__ import annotations

import statistics
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
from ris_core.models.contract import MapSystem


class Costly(Answering, Protocol):
    """A predictor whose model can be looked into."""

    @property
    def model(self) -> nn.Module: ...


def cost(predictor: Costly, rgb: np.ndarray, expressions: Sequence[str]) -> dict[str, float | int]:
    """Count what answers about `rgb`, uint8 (H, W, 3), to `expressions` take. Sets the predictor's image.

    parameters, trained_parameters: elements of all of the model's tensors, and of those that training changes (0 of a
        zero-shot one); a shared one counts once. What a predictor keeps beside its model (SAM, for proposals) is not among
        them.
    gflop_image, gflop_expression: 1e9 operations, two per multiply-add, of `set_image` and of `predict` with one
        expression (the mean over all). PyTorch's matrix products, convolutions and attention count, the rest does not.

    Raises DataError if there is no expression.
    """
    if isinstance(expressions, str) or not len(expressions):
        raise DataError(f"cost needs a list of at least one expression to ask; got {expressions!r}")
    image, expression = _operations(predictor, rgb, expressions)
    return {
        "parameters": _elements(predictor.model.parameters()),
        "trained_parameters": trained_parameters(predictor.model),
        "gflop_image": image / 1e9,
        "gflop_expression": expression / 1e9,
    }


def trained_parameters(model: nn.Module) -> int:
    """Count the elements of the tensors that training changes; 0 of a model that is not trained."""
    return _elements(parameter for _, parameter in model.trained()) if isinstance(model, MapSystem) else 0


def _elements(parameters: Iterator[nn.Parameter]) -> int:
    return sum({id(parameter): parameter.numel() for parameter in parameters}.values())


def _operations(predictor: Answering, rgb: np.ndarray, expressions: Sequence[str]) -> tuple[float, float]:
    """Count operations of `set_image`, and of `predict` with one expression, mean over all."""
    with _countable():
        image = count_operations(partial(predictor.set_image, rgb))
        asked = [count_operations(partial(predictor.predict, [text])) for text in expressions]
    return float(image), statistics.fmean(asked)


def count_operations(function: Callable[[], object]) -> int:
    """Count floating-point operations of one call, two per multiply-add. Exact only for kernels that the counter knows."""
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
