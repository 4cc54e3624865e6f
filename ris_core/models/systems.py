"""The registry of systems, and the folder in which a model travels.

    model.safetensors    the weights that training changes
    model.json           system, its configuration, and where it came from (`info`)
    clip/                clip.json, the architecture of the CLIP it stands on; for a system that keeps CLIP frozen also
                         clip.safetensors, whose checksum clip.json names

A system is a module of this package that names its class `SYSTEM`; the module's name is the system's, here, in
params.yaml and in the registry of models. The class has

    config_class                                       a frozen dataclass, the section `model` of the system's parameters
    build(clip, config)                                classmethod: fresh layers on a CLIP
    stride                                             input pixels per cell of its mask logits
    context_length                                     the most tokens a sentence may have
    encode_image(images)                               what needs no text, once per image
    segment(features, tokens, image_index)             mask logits (N, 1, S/stride, S/stride)
    forward(images, tokens, image_index) -> output     one training step's forward pass
    loss(output, target, params)                       of that output
    param_groups(lr, backbone_lr_multiplier, pos_embed_group)

and may have

    locates = True, locate(features, tokens, image_index)   a coarse map (N, 1, g, g) to look at, scored beside the masks
    first_stage, adopt(state)                          the class of a part trained before the rest; takes over its weights
    frozen_clip = True                                 its state dict leaves CLIP's weights out
    notice                                             a text that goes with every registered version

A zero-shot system (`trains = False`) chooses among mask proposals instead: beside config_class and build it has

    encode_proposals(image, masks) -> features         what needs no text, once per image; image and masks at full size
    score(features, expressions)                       (N, P) scores of an image's P proposals
    facts()                                            what else a score depends on, to be recorded beside it
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from ris_core import models
from ris_core.errors import ConfigError, WeightsError
from ris_core.models.clip import CONFIG_FILE, WEIGHTS_FILE, build_clip, load_saved_clip, read_clip_config

FORMAT = 2
CLIP_FOLDER = "clip"


@cache
def systems() -> dict[str, Any]:
    """All systems, classes by name."""
    names = sorted(module.name for module in iter_modules(models.__path__))
    modules = {name: importlib.import_module(f"ris_core.models.{name}") for name in names if name != "systems"}
    return {name: module.SYSTEM for name, module in modules.items() if hasattr(module, "SYSTEM")}


def system_class(system: str) -> Any:
    """The class of a system, as described above. Raises ConfigError for an unknown name."""
    if system not in systems():
        raise ConfigError(f"there is no system '{system}'; there are {', '.join(systems())}")
    return systems()[system]


def trains(system: str) -> bool:
    """Whether a system is trained at all; a zero-shot one chooses among proposals."""
    return bool(getattr(system_class(system), "trains", True))


def without_fetching(config: Any) -> Any:
    """The configuration of a model whose weights are all in its folder: a backbone of timm needs none of its own."""
    return replace(config, pretrained=False) if getattr(config, "pretrained", False) else config


def locates(model: nn.Module) -> bool:
    """Whether a model has a coarse map beside its masks."""
    return bool(getattr(model, "locates", False))


def upsampled_map(model: Any, inputs: tuple[Any, torch.Tensor, torch.Tensor], image_size: int) -> torch.Tensor:
    """The coarse logits of `locate(*inputs)` at the size of mask logits: its cells mean areas, those of a mask points."""
    logits = model.locate(*inputs).float()
    size = image_size // int(model.stride)
    return F.interpolate(logits, (size, size), mode="bilinear", align_corners=False)


def keeps_clip(system: str) -> bool:
    """Whether a system leaves CLIP as it is, and its weights out of its own."""
    return bool(getattr(system_class(system), "frozen_clip", False))


def has_first_stage(system: str) -> bool:
    """Whether a part of a system is trained before the rest."""
    return hasattr(system_class(system), "first_stage")


def build_model(system: str, config: Any, clip: nn.Module) -> nn.Module:
    """A system with fresh layers on a given CLIP. Raises ConfigError for an unknown name."""
    return system_class(system).build(clip, config)


def export_model(
    folder: Path, system: str, weights: dict[str, torch.Tensor], config: Any, clip: Path, info: dict[str, Any]
) -> None:
    """Write a model folder; `clip` is the folder of the CLIP it was built on (`clip/` of another model's folder does).

    Each file appears whole or not at all, model.json last.
    """
    (folder / CLIP_FOLDER).mkdir(parents=True, exist_ok=True)
    partial = folder / "model.partial"
    for name in (WEIGHTS_FILE, CONFIG_FILE) if keeps_clip(system) else (CONFIG_FILE,):
        shutil.copy(clip / name, partial)
        os.replace(partial, folder / CLIP_FOLDER / name)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, str(partial))
    os.replace(partial, folder / "model.safetensors")
    content = {"format": FORMAT, "system": system, "config": asdict(without_fetching(config)), "info": info}
    partial.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(partial, folder / "model.json")


def read_model_info(folder: str | Path) -> dict[str, Any]:
    """{"system", "config", "info"} of a model folder, without its weights.

    Raises WeightsError if files are missing, damaged or of another format.
    """
    folder = Path(folder)
    missing = [name for name in ("model.json", "model.safetensors") if not (folder / name).exists()]
    if missing:
        raise WeightsError(f"{folder} holds no model: {', '.join(missing)} missing; train one, or pass its folder")
    try:
        content = json.loads((folder / "model.json").read_text())
    except ValueError as error:
        raise WeightsError(f"{folder}/model.json is damaged ({error}); export the model again") from error
    if content.pop("format", None) != FORMAT:
        raise WeightsError(f"{folder}/model.json has another format than {FORMAT}, the one read here; export it again")
    return content


def load_model(folder: str | Path, device: str | torch.device = "cpu") -> tuple[nn.Module, dict[str, Any]]:
    """The model of a folder, in evaluation mode, and its `info` (with 'system' added).

    Raises WeightsError if files are missing, damaged, of another format, or do not fit the configuration beside them.
    """
    folder = Path(folder)
    content = read_model_info(folder)
    system = system_class(content["system"])
    try:
        config = system.config_class(**content["config"])
    except TypeError as error:
        raise WeightsError(f"{folder}/model.json is of another version of {content['system']} ({error})") from error
    clip = folder / CLIP_FOLDER
    frozen = keeps_clip(content["system"])
    base = load_saved_clip(clip) if frozen else build_clip(read_clip_config(clip)["architecture"])
    model = system.build(base, config)
    try:
        model.load_state_dict(load_file(str(folder / "model.safetensors")))
    except (RuntimeError, SafetensorError) as error:
        raise WeightsError(f"{folder}/model.safetensors does not fit the model.json beside it: {error}") from error
    return model.to(device).eval(), {**content["info"], "system": content["system"]}
