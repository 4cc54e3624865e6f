"""Where tensors live and how precisely they are multiplied."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext

import torch

from ris_core.errors import ConfigError

PRECISIONS = ("auto", "fp32", "bf16", "fp16")


def best_device() -> str:
    """Give this process' GPU (`LOCAL_RANK`) where CUDA works, else the CPU."""
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"


def resolved_precision(name: str, device: torch.device) -> str:
    """Give `fp32`, `bf16` or `fp16`; `auto` is bf16 on GPUs that have it, else fp32. Raises ConfigError for fp16 on a CPU."""
    if name == "auto":
        return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    if name == "fp16" and device.type != "cuda":
        raise ConfigError("precision fp16 needs a GPU; use auto, which is fp32 on a CPU")
    return name


def autocast(name: str, device: torch.device) -> AbstractContextManager[object]:
    """Give what a forward pass runs in, for a name of `PRECISIONS`. Raises ConfigError for fp16 on a CPU."""
    found = resolved_precision(name, device)
    if found == "fp32":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16 if found == "bf16" else torch.float16)
