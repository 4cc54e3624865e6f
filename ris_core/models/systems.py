"""The registry of systems, and the folder in which a trained model travels.

    model.safetensors    all weights
    model.json           system, its configuration, its CLIP's architecture, and where it came from (`info`)

A fifth system is one module with `build(clip, config)` and one line here.
"""

from __future__ import annotations

import importlib
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ris_core.errors import ConfigError, WeightsError
from ris_core.models.clip import build_clip, read_clip_config

FORMAT = 1
SYSTEMS = {"cris": ("ris_core.models.cris", "CRIS", "CRISConfig")}  # name -> module, class, configuration


def _parts(system: str) -> tuple[Any, Any]:
    """A system's class, which has `build(clip, config)`, and its configuration class."""
    if system not in SYSTEMS:
        raise ConfigError(f"unknown system '{system}'; there are {', '.join(SYSTEMS)}")
    module, model, config = SYSTEMS[system]
    loaded = importlib.import_module(module)
    return getattr(loaded, model), getattr(loaded, config)


def build_model(system: str, config: Any, clip: nn.Module) -> nn.Module:
    """A system with fresh layers on a given CLIP. Raises ConfigError for an unknown name."""
    return _parts(system)[0].build(clip, config)


def export_model(
    folder: Path, system: str, weights: dict[str, torch.Tensor], config: Any, clip: Path, info: dict[str, Any]
) -> None:
    """Write a model folder; `clip` is the folder of the CLIP it was built on (only its architecture is copied).

    Each file appears whole or not at all.
    """
    content = {
        "format": FORMAT,
        "system": system,
        "config": asdict(config),
        "clip": read_clip_config(clip)["architecture"],
        "info": info,
    }
    partial = folder / "model.partial"
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, str(partial))
    os.replace(partial, folder / "model.safetensors")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(partial, folder / "model.json")


def load_model(folder: str | Path, device: str | torch.device = "cpu") -> tuple[nn.Module, dict[str, Any]]:
    """The model of a folder, in evaluation mode, and its `info` (with 'system' added).

    Raises WeightsError if files are missing, damaged, of another format, or do not fit the configuration beside them.
    """
    folder = Path(folder)
    missing = [name for name in ("model.json", "model.safetensors") if not (folder / name).exists()]
    if missing:
        raise WeightsError(f"{folder} holds no model: {', '.join(missing)} missing; train one, or pass its folder")
    try:
        content = json.loads((folder / "model.json").read_text())
    except ValueError as error:
        raise WeightsError(f"{folder}/model.json is damaged ({error}); export the model again") from error
    if content.get("format") != FORMAT:
        raise WeightsError(f"{folder}/model.json has format {content.get('format')!r}, this code reads {FORMAT}")
    _, config_class = _parts(content["system"])
    try:
        config = config_class(**content["config"])
    except TypeError as error:
        raise WeightsError(f"{folder}/model.json is of another version of {content['system']} ({error})") from error
    model = build_model(content["system"], config, build_clip(content["clip"]))
    try:
        model.load_state_dict(load_file(str(folder / "model.safetensors")))
    except (RuntimeError, SafetensorError) as error:
        raise WeightsError(f"{folder}/model.safetensors does not fit the model.json beside it: {error}") from error
    return model.to(device).eval(), {**content["info"], "system": content["system"]}
