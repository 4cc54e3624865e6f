"""The form of the authors' CRIS checkpoints (DerrickWang005/CRIS.pytorch): from such a file to a model folder, and back.

Their training script saves {epoch, cur_iou, best_iou, prec, state_dict, optimizer, scheduler} of a model in DataParallel,
whose names begin with "module.". Such a file tells every dimension of its model but three things, which are the recipe's:
the size of images, the most tokens of a sentence, and the heads of the decoder.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch

from ris_core import files
from ris_core.contents import kind_of
from ris_core.data.text import END_ID
from ris_core.errors import ConfigError, WeightsError, list_problems
from ris_core.models.clip import CONFIG_FILE, read_clip_config
from ris_core.models.cris.system import CRIS, CRISConfig, infer_dimensions
from ris_core.models.registry import CLIP_FOLDER, Description, ModelInfo, export_model, load_model
from ris_core.options import Plain
from ris_core.weights import read_state, read_torch, state_of

SYSTEM = "cris"
PREFIX = "module."
SIDE = 32  # the sides of images are multiples of it
HEAD_WIDTH = 64  # of each head of CLIP: the official code takes their number from that
# What other state dicts have among their names.
OTHERS = {
    "visual.conv1.weight": "it is a CLIP, which CRIS is trained from: give it to a training, as clip_rn.weights",
    "text_model.final_layer_norm.weight": "it is a CLIP of Hugging Face's transformers",
    "segmenter.": "it is a model of LTS",
    "locator.": "it is a model of RISCLIP",
}


def read_checkpoint(path: Path) -> tuple[dict[str, torch.Tensor], Plain]:
    """Read a file's state dict, without "module.", and what it tells of its training: `epoch` and `val_mIoU`, if it does.

    Raises WeightsError for a file that holds no state dict, that of another model, or numbers that are not finite.
    """
    content: object = None
    if kind_of(path) == "a file of torch.save":
        content = read_torch(path)
        state = state_of(content, str(path))
    else:
        state = read_state(path)
    if not any(name.startswith("neck.") for name in state):
        other = next((what for name, what in OTHERS.items() if any(key.startswith(name) for key in state)), None)
        told = other or f"its names are {', '.join(sorted({key.split('.')[0] for key in state})[:8])}"
        raise WeightsError(
            f"{path} is no checkpoint of CRIS (backbone., neck., decoder., proj.): {told}; give what the authors' training wrote"
        )
    told_by = content if isinstance(content, Mapping) else {}
    epoch, score = told_by.get("epoch"), told_by.get("cur_iou")
    known: Plain = {"epoch": epoch} if type(epoch) is int else {}
    if type(score) is float and 0 <= score <= 1:
        known["val_mIoU"] = score
    return state, known


def make_folder(
    state: Mapping[str, torch.Tensor], out: Path, num_heads: int, info: ModelInfo
) -> tuple[CRIS, Description]:
    """Write the model folder `out`, which appears whole or not at all; the model as it is read back from it.

    Raises ConfigError for images or sentences of a size that this model cannot read, WeightsError if the state dict is not
    CRIS', with all that is missing, unknown or misshapen.
    """
    model = CRIS.from_official_state_dict(state, num_heads)
    architecture, _ = infer_dimensions(state)
    problems = [f"--image-size {info.image_size}: use a multiple of {SIDE}"] if info.image_size % SIDE else []
    if info.word_len is not None and info.word_len > model.context_length:
        problems.append(f"--word-len {info.word_len}: this model reads at most {model.context_length} tokens")
    if problems:
        raise ConfigError(list_problems("This checkpoint cannot be used so", problems))
    with files.replaced_folder(out) as folder, tempfile.TemporaryDirectory() as clip:
        # Of the CLIP that was trained on only its architecture is known.
        files.write_json(Path(clip) / CONFIG_FILE, {"architecture": architecture, "extra": {}, "weights_sha256": ""})
        export_model(folder, SYSTEM, model.state_dict(), model.config, Path(clip), info)
        read_back, described = load_model(folder)
    assert isinstance(read_back, CRIS)
    return read_back, described


def speaks(model: CRIS) -> bool:
    """Tell whether a model knows the words that CLIP's tokenizer gives."""
    return bool(model.backbone.vocab_size > END_ID)


def checkpoint_of(state: Mapping[str, torch.Tensor], info: ModelInfo) -> Plain:
    """Give what the official code reads of a checkpoint to test it; to train on it would need an optimiser's state, too."""
    return {
        "epoch": info.epoch or 0,
        "cur_iou": info.val_mIoU or 0.0,
        "best_iou": info.val_mIoU or 0.0,
        "state_dict": {f"{PREFIX}{name}": tensor for name, tensor in state.items()},
    }


def read_folder(folder: Path) -> tuple[CRIS, ModelInfo]:
    """Load a model folder that has an official counterpart.

    Raises WeightsError if it is damaged, of another system, or of a shape that the official code would read otherwise.
    """
    model, described = load_model(folder)
    if not isinstance(model, CRIS):
        raise WeightsError(f"{folder} is a model of {described.system}: only CRIS has official checkpoints")
    found, _ = infer_dimensions(model.state_dict())
    problems = []
    if model.config.coord_levels != "aggregate":
        problems.append(f"coord_levels is {model.config.coord_levels}: the official model has coordinates once")
    given = read_clip_config(folder / CLIP_FOLDER)["architecture"]
    if given.get("quick_gelu") is not True:
        problems.append("its CLIP computes GELU: the official one computes QuickGELU")
    for tower, default in (("vision_cfg", {"head_width": HEAD_WIDTH}), ("text_cfg", {})):
        has, read = {**default, **given[tower]}, {**default, **found[tower]}
        problems += [
            f"{tower}.{key} of its CLIP is {has[key]}: the official code would read {read[key]} from the weights"
            for key in read
            if key in has and has[key] != read[key]
        ]
    if problems:
        raise WeightsError(list_problems(f"{folder} has no official counterpart", problems))
    return model, described.info


def recipe(model: CRIS, info: ModelInfo) -> Plain:
    """Give the values of the section TRAIN with which the official code builds this model."""
    config: CRISConfig = model.config
    width, embed_dim = model.backbone.visual.attnpool.c_proj.in_features, model.backbone.visual.output_dim
    return {
        "input_size": info.image_size,
        "word_len": info.word_len,
        "word_dim": embed_dim,
        "vis_dim": config.vis_dim,
        "fpn_in": [width // 4, width // 2, embed_dim],
        "fpn_out": list(config.fpn_out),
        "num_layers": config.num_layers,
        "num_head": config.num_heads,
        "dim_ffn": config.ffn_dim,
        "dropout": config.dropout,
    }
