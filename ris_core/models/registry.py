"""The registry of systems, found by their folders, and the folder in which a model travels.

model.safetensors    the weights that training changes
model.json           system, its configuration, where it came from (`info`), and the checksum of the weights
clip/                clip.json, the architecture of the CLIP it stands on; for a system that keeps CLIP frozen also
                     clip.safetensors, whose checksum clip.json names
"""

from __future__ import annotations

import importlib
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from pkgutil import iter_modules
from typing import TYPE_CHECKING, get_args

import torch
from safetensors.torch import save_file

from ris_core import models
from ris_core.data.letterbox import Mode
from ris_core.errors import ConfigError, WeightsError
from ris_core.files import file_sha256, replaced_file, write_json
from ris_core.models.clip import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    build_clip,
    load_saved_clip,
    read_clip_config,
)
from ris_core.models.contract import MapSystem, ProposalSystem, System, SystemConfig
from ris_core.options import Plain, from_plain, option
from ris_core.weights import load_strictly, read_json, read_safetensors

if TYPE_CHECKING:
    from open_clip.model import CLIP

FORMAT = 4
CLIP_FOLDER = "clip"
WEIGHTS, DESCRIPTION = "model.safetensors", "model.json"


def systems() -> list[str]:
    """List the names of all systems, in alphabetical order: the folders of this package."""
    return sorted(module.name for module in iter_modules(models.__path__) if module.ispkg)


@cache
def system_class(system: str) -> type[System]:
    """Give the class of a system, whose folder alone is imported. Raises ConfigError for an unknown name."""
    if system not in systems():
        raise ConfigError(f"there is no system '{system}'; there are {', '.join(systems())}")
    found = importlib.import_module(f"{models.__name__}.{system}").SYSTEM
    if not (isinstance(found, type) and issubclass(found, MapSystem | ProposalSystem)):
        raise TypeError(f"{models.__name__}.{system}.SYSTEM is {found!r}, not a MapSystem or a ProposalSystem")
    return found


def trains(system: str) -> bool:
    """Tell whether a system is trained; a zero-shot one chooses among proposals. Raises ConfigError for an unknown name."""
    return issubclass(system_class(system), MapSystem)


def first_stage(system: str) -> type[MapSystem] | None:
    """Tell what a system trains before the rest, if anything. Raises ConfigError for an unknown name."""
    found = system_class(system)
    return found.first_stage if issubclass(found, MapSystem) else None


@dataclass(frozen=True)
class ModelInfo:
    """What is known of a model beside its weights and configuration. All of it is the same wherever it was made.

    image_size, resample: how images are letterboxed for it. word_len: the most tokens of a sentence that it reads, once
    it is trained. proposals: the options with which those it chooses among are made, for a zero-shot one.
    """

    image_size: int = field(metadata={"minimum": 1})
    resample: str = option("opencv4", choices=get_args(Mode))
    word_len: int | None = option(None, minimum=3)
    proposals: Plain | None = None
    dataset: str = ""
    data_digest: str = ""
    clip_digest: str = ""
    config_digest: str = ""
    run: str = ""  # name of the run that trained it, in whichever tracking store that was
    first_stage_run: str = ""
    epoch: int | None = None
    val_mIoU: float | None = None  # of that epoch


@dataclass(frozen=True)
class Description:
    """A model without its weights: what model.json says."""

    system: str
    config: SystemConfig
    info: ModelInfo
    weights_sha256: str


def build_model(system: str, config: SystemConfig, clip: CLIP) -> System:
    """Build a system with fresh layers on a given CLIP. Raises ConfigError for an unknown name, or if they do not fit."""
    found = system_class(system)
    if not isinstance(config, found.config_class):
        raise ConfigError(f"{system} takes a {found.config_class.__name__}, got a {type(config).__name__}")
    return found(clip, config)


def export_model(
    folder: Path, system: str, weights: Mapping[str, torch.Tensor], config: SystemConfig, clip: Path, info: ModelInfo
) -> None:
    """Write a model folder; `clip` is the folder of the CLIP it was built on (`clip/` of another model's folder does).

    Each file appears whole or not at all, model.json last.
    """
    for name in (WEIGHTS_FILE, CONFIG_FILE) if system_class(system).keeps_clip else (CONFIG_FILE,):
        with replaced_file(folder / CLIP_FOLDER / name) as temporary:
            shutil.copyfile(clip / name, temporary)
    with replaced_file(folder / WEIGHTS) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, temporary)
    content = {"format": FORMAT, "system": system, "config": asdict(config.saved()), "info": asdict(info)}
    write_json(folder / DESCRIPTION, {**content, "weights_sha256": file_sha256(folder / WEIGHTS)})


def read_description(folder: str | Path) -> Description:
    """Read what a model folder says of its model, without its weights.

    Raises WeightsError if files are missing, damaged or of another format, with all that is wrong in model.json.
    """
    folder = Path(os.path.expanduser(folder))
    missing = [name for name in (DESCRIPTION, WEIGHTS) if not os.path.lexists(folder / name)]
    if missing:
        raise WeightsError(f"{folder} holds no model: {', '.join(missing)} missing; train one, or pass its folder")
    content = read_json(folder / DESCRIPTION)
    if content.get("format") != FORMAT:
        raise WeightsError(
            f"{folder / DESCRIPTION} has another format than {FORMAT}, the one read here; export it again"
        )
    absent = [name for name in ("system", "config", "info", "weights_sha256") if name not in content]
    if absent:
        raise WeightsError(f"{folder / DESCRIPTION} is damaged: {', '.join(absent)} missing; export it again")
    config, info = None, None
    problems: list[str] = []
    try:
        config = from_plain(system_class(str(content["system"])).config_class, content["config"], "config")
    except ConfigError as error:
        problems.append(str(error))
    try:
        info = from_plain(ModelInfo, content["info"], "info")
    except ConfigError as error:
        problems.append(str(error))
    if config is None or info is None:
        raise WeightsError(
            f"{folder / DESCRIPTION} does not describe a model that can be built here: {'; '.join(problems)}; "
            "export it again"
        )
    return Description(str(content["system"]), config, info, str(content["weights_sha256"]))


def load_model(folder: str | Path, device: str | torch.device = "cpu") -> tuple[System, Description]:
    """Load the model of a folder, in evaluation mode, and what its model.json says.

    Raises WeightsError if files are missing, damaged, of another format, or do not fit the configuration beside them.
    """
    folder = Path(os.path.expanduser(folder))
    described = read_description(folder)
    clip = folder / CLIP_FOLDER
    frozen = system_class(described.system).keeps_clip
    try:
        base = load_saved_clip(clip) if frozen else build_clip(read_clip_config(clip)["architecture"])
        model = build_model(described.system, described.config, base)
    except WeightsError:
        raise
    except Exception as error:  # sizes that nothing checks make layers raise errors of many kinds
        told = str(error) or type(error).__name__
        raise WeightsError(f"{folder} does not hold together: {told}; export it again") from error
    weights = read_safetensors(folder / WEIGHTS)
    if file_sha256(folder / WEIGHTS) != described.weights_sha256:
        raise WeightsError(
            f"{folder / WEIGHTS} is not the file {DESCRIPTION} was written for (checksums differ); export both again"
        )
    load_strictly(model, weights, f"{folder / WEIGHTS} does not fit the model.json beside it")
    return model.to(device).eval(), described
