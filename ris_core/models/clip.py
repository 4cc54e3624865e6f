"""CLIP on open_clip's own classes: building, loading weights with checks, saving, and the features other models read.

An architecture is a JSON config in open_clip's format: one of ours in `ris_core/models/configs`, one of open_clip's by
name ("RN50-quickgelu"), or a dict. No class of open_clip is changed or copied.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import pickle
import zipfile
from collections.abc import Mapping
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ris_core.errors import ConfigError, WeightsError, list_problems

if TYPE_CHECKING:
    from open_clip.model import CLIP
    from open_clip.modified_resnet import ModifiedResNet
    from open_clip.transformer import VisionTransformer

IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)  # RGB in 0..1, OpenAI's CLIP
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
WEIGHTS_FILE = "clip.safetensors"
CONFIG_FILE = "clip.json"

_CONFIG_FOLDER = Path(__file__).parent / "configs"
_OPENAI_EXTRAS = ("input_resolution", "context_length", "vocab_size")  # numbers in OpenAI's archives, not weights
_ARCHITECTURE_KEYS = {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "init_logit_scale"}

Architecture = str | Mapping[str, Any]


def embedded_architectures() -> list[str]:
    """Names of the architectures that come with this project."""
    return sorted(path.stem for path in _CONFIG_FOLDER.glob("*.json"))


def resolve_architecture(architecture: Architecture) -> dict[str, Any]:
    """An open_clip model config as a dict, from the name of one or from a dict.

    Raises:
        ConfigError: the name is unknown, or the config asks for towers other than CLIP's own.
    """
    import open_clip

    if isinstance(architecture, str):
        path = _CONFIG_FOLDER / f"{architecture}.json"
        if path.is_file():
            config = json.loads(path.read_text())
        elif architecture in open_clip.list_models():
            config = open_clip.get_model_config(architecture)
        else:
            names = [*embedded_architectures(), *open_clip.list_models()]
            close = difflib.get_close_matches(architecture, names, n=4, cutoff=0.4)
            raise ConfigError(
                f"unknown CLIP architecture {architecture!r}; ours are {', '.join(embedded_architectures())}, "
                f"open_clip's closest are {', '.join(close) or 'none'}"
            )
    else:
        config = json.loads(json.dumps(dict(architecture)))  # a deep copy, and proof that it can be saved as JSON
    unknown = sorted(set(config) - _ARCHITECTURE_KEYS)
    missing = sorted({"embed_dim", "vision_cfg", "text_cfg"} - set(config))
    if unknown or missing:
        raise ConfigError(
            f"CLIP architecture {architecture!r} does not describe a plain CLIP: "
            f"missing {missing or 'nothing'}, not understood {unknown or 'nothing'}"
        )
    return config


def build_clip(architecture: Architecture) -> CLIP:
    """An open_clip CLIP with random weights (float32). Runs under `torch.device("meta")` too."""
    from open_clip.model import CLIP

    return CLIP(**resolve_architecture(architecture))


def load_clip(architecture: Architecture, weights: str | Path | None = None, image_size: int | None = None) -> CLIP:
    """A CLIP in float32 on the CPU, with its weights checked against the architecture.

    Args:
        architecture: see `resolve_architecture`.
        weights: None for random ones; a pretrained tag of open_clip ("openai"), fetched or found in its cache; a
            folder written by `save_clip`; or a file: OpenAI's TorchScript archive, safetensors, or a state dict of
            `torch.save` (also under the key "state_dict", also with the prefix "module.").
        image_size: another side of the square input, in pixels, than the architecture's own; only for a ViT. Position
            embeddings of the patches are resized by open_clip's `resize_pos_embed` (bicubic, antialiased, as its
            `force_image_size` does), the class token's stays.

    Raises:
        ConfigError: see `resolve_architecture`; or the tower cannot take images of that size.
        WeightsError: nothing there, unreadable, another activation (OpenAI's weights need QuickGELU, hence a
            "-quickgelu" architecture), or tensors that do not fit: all of them are listed.
    """
    config = resolve_architecture(architecture)
    wanted = config if image_size is None else _at_image_size(config, image_size)
    if weights is None:
        return build_clip(wanted)
    name = architecture if isinstance(architecture, str) else "the given architecture"
    tag_name = name.removesuffix("-quickgelu")
    path = Path(weights)
    if str(weights) in _tags(tag_name):
        state = _read_pretrained(tag_name, str(weights), config)
    elif path.is_dir():
        _check_activation(config, bool(read_clip_config(path)["architecture"].get("quick_gelu", False)), str(path))
        state = _read_saved(path)
    elif path.is_file():
        state, from_openai = _read_state_file(path)
        if from_openai:
            _check_activation(config, True, f"{path} (OpenAI's format)")
    else:
        tags = ", ".join(_tags(tag_name)) or "none"
        raise WeightsError(
            f"no CLIP weights {str(weights)!r}: no such file or folder, nor a tag of {name} (its tags: {tags})"
        )
    clip = build_clip(config)
    load_strictly(clip, state, f"{weights} does not fit {name}")
    if wanted == config:
        return clip
    from open_clip.model import resize_pos_embed

    resized, state = build_clip(wanted), clip.state_dict()
    resize_pos_embed(state, resized)  # takes its entry of the state dict and puts the resized one in its place
    resized.load_state_dict(state)
    return resized


def load_strictly(model: nn.Module, state: Mapping[str, torch.Tensor], title: str) -> None:
    """Load a state dict that must match in every key and shape; precision is converted.

    Raises:
        WeightsError: lists every missing key, unexpected key and differing shape at once, under the title.
    """
    expected = model.state_dict()
    problems = [f"missing: {key} {list(expected[key].shape)}" for key in expected if key not in state]
    problems += [f"not part of the model: {key} {list(state[key].shape)}" for key in state if key not in expected]
    problems += [
        f"shape of {key}: {list(state[key].shape)} in the weights, {list(expected[key].shape)} in the model"
        for key in expected
        if key in state and state[key].shape != expected[key].shape
    ]
    if problems:
        raise WeightsError(list_problems(title, problems, "Give the architecture these weights were made with."))
    model.load_state_dict(dict(state))


def save_clip(clip: CLIP, folder: str | Path, architecture: Architecture, extra: Mapping[str, Any]) -> None:
    """Write `clip.safetensors` and `clip.json` (architecture, extra, checksum of the weights) into a folder.

    The architecture is written with the image size that the model has, which `load_clip` may have changed. Each file
    appears whole or not at all, and the config comes last and names the weights' checksum, so that a new file beside an
    old one cannot pass for a pair.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights, config = folder / WEIGHTS_FILE, folder / CONFIG_FILE
    partial = weights.with_suffix(".partial")
    save_file({key: value.detach().cpu().contiguous() for key, value in clip.state_dict().items()}, partial)
    config_of_clip = resolve_architecture(architecture)
    config_of_clip["vision_cfg"]["image_size"] = input_size(clip)
    content = {
        "architecture": config_of_clip,
        "weights_sha256": sha256(partial.read_bytes()).hexdigest(),
        "extra": dict(extra),
    }
    os.replace(partial, weights)
    partial = config.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    os.replace(partial, config)


def read_clip_config(folder: str | Path) -> dict[str, Any]:
    """What `save_clip` wrote beside the weights: {"architecture", "weights_sha256", "extra"}.

    Raises:
        WeightsError: the folder holds no saved CLIP.
    """
    path = Path(folder) / CONFIG_FILE
    if not path.is_file():
        raise WeightsError(f"no saved CLIP in {folder}: {CONFIG_FILE} is missing; run the stage that writes it")
    return json.loads(path.read_text())


def load_saved_clip(folder: str | Path) -> CLIP:
    """The CLIP that `save_clip` wrote into a folder, in the architecture recorded there."""
    return load_clip(read_clip_config(folder)["architecture"], folder)


def input_size(clip: CLIP) -> int:
    """Side in pixels of the square images that a CLIP reads.

    Raises:
        ConfigError: it reads images that are not square.
    """
    size = clip.visual.image_size  # one number in a ResNet, (height, width) in a ViT
    height, width = size if isinstance(size, tuple | list) else (size, size)
    if height != width:
        raise ConfigError(f"this CLIP reads images of {height}x{width} pixels; only square ones are supported")
    return int(height)


@lru_cache(maxsize=8)
def _normalisation(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    mean, std = torch.tensor(IMAGE_MEAN), torch.tensor(IMAGE_STD)
    return (255 * mean).view(1, 3, 1, 1).to(device), (255 * std).view(1, 3, 1, 1).to(device)


def normalise(images: torch.Tensor) -> torch.Tensor:
    """uint8 RGB (B, 3, H, W) -> float32 as CLIP expects it, on the same device and in the same memory format."""
    mean, std = _normalisation(images.device)
    return (images.float() - mean) / std


def resnet_feature_maps(
    visual: ModifiedResNet, images: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """C3 (layer2, 1/8), C4 (layer3, 1/16) and the raw layer4 map (1/32) of normalised images (B, 3, H, W)."""
    c3 = visual.layer2(visual.layer1(visual.stem(images)))
    c4 = visual.layer3(c3)
    return c3, c4, visual.layer4(c4)


def vit_patch_map(visual: VisionTransformer, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Image features (B, E) and the map of all patches (B, E, g, g) of normalised images (B, 3, H, W), from one pass.

    The map is what the shared space says of every patch: the final layer norm and the projection, made for the pooled
    feature, at each patch token instead. Nothing is L2-normalised.
    """
    found = visual.forward_intermediates(images, indices=1, normalize_intermediates=True)
    return found["image_features"], torch.einsum("bchw,ce->behw", found["image_intermediates"][0], visual.proj)


def encode_words(clip: CLIP, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Word features and sentence state of tokens (N, L) int64 with L at most the context length.

    Positions and causal mask are sliced to L, not resampled. Returns words (N, L, C) = the final layer norm at every
    token, unprojected, and state (N, E) = the words at the end mark (the largest id) times the text projection. Nothing
    is L2-normalised (CRIS, `model/clip.py` of DerrickWang005/CRIS.pytorch).
    """
    length = tokens.shape[1]
    if length > clip.context_length:
        raise ConfigError(
            f"{length} tokens a sentence, but this CLIP reads at most {clip.context_length}; shorten the token length"
        )
    x = clip.token_embedding(tokens) + clip.positional_embedding[:length]
    words = clip.ln_final(clip.transformer(x, attn_mask=clip.attn_mask[:length, :length]))
    at_end = words[torch.arange(len(tokens), device=tokens.device), tokens.argmax(dim=-1)]
    return words, at_end @ clip.text_projection


def _at_image_size(config: Mapping[str, Any], image_size: int) -> dict[str, Any]:
    """The config with another input size. Raises ConfigError where the visual tower cannot take it."""
    from open_clip.model import CLIPVisionCfg

    vision = CLIPVisionCfg(**config["vision_cfg"])  # with open_clip's defaults
    if vision.timm_model_name or isinstance(vision.layers, tuple | list):
        raise ConfigError(
            f"image size {image_size}: only a plain ViT can be resized to another input than its own "
            f"({vision.image_size}), this architecture's visual tower is a "
            f"{vision.timm_model_name or 'ResNet with an attention pool'}; leave the image size out"
        )
    if image_size < 1 or image_size % vision.patch_size:
        above = max(1, math.ceil(image_size / vision.patch_size)) * vision.patch_size
        raise ConfigError(
            f"image size {image_size} is not a multiple of the patch size {vision.patch_size}; the next one is {above}"
        )
    return {**config, "vision_cfg": {**config["vision_cfg"], "image_size": image_size}}


def _tags(name: str) -> list[str]:
    import open_clip

    return open_clip.list_pretrained_tags_by_model(name)


def _check_activation(config: Mapping[str, Any], trained_with_quick_gelu: bool, source: str) -> None:
    """Nothing in a weight tells its activation, and the wrong one silently spoils every feature."""
    if trained_with_quick_gelu == bool(config.get("quick_gelu", False)):
        return
    trained, computed = ("QuickGELU", "GELU") if trained_with_quick_gelu else ("GELU", "QuickGELU")
    remedy = "ending in -quickgelu (or quick_gelu: true)" if trained_with_quick_gelu else "without -quickgelu"
    raise WeightsError(
        f"{source} was trained with {trained}, but the architecture computes {computed}: take the one {remedy}"
    )


def _read_pretrained(name: str, tag: str, config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    from open_clip.pretrained import download_pretrained, get_pretrained_cfg

    settings = get_pretrained_cfg(name, tag)
    source = f"open_clip's {name}:{tag}"
    _check_activation(config, bool(settings.get("quick_gelu", False)), source)
    if tuple(settings["mean"]) != IMAGE_MEAN or tuple(settings["std"]) != IMAGE_STD:
        raise WeightsError(f"{source} expects another image normalisation than OpenAI's, which is not supported")
    try:
        path = Path(download_pretrained(settings))
    except (OSError, RuntimeError) as error:
        raise WeightsError(
            f"{source} is not in the local cache and could not be fetched ({error}). Run once where there is a network "
            "(without HF_HUB_OFFLINE), or download the file elsewhere and give its path"
        ) from error
    return _read_state_file(path)[0]


def _read_saved(folder: Path) -> dict[str, torch.Tensor]:
    config, path = read_clip_config(folder), folder / WEIGHTS_FILE
    if not path.is_file():
        raise WeightsError(f"{folder} has a {CONFIG_FILE} but no {WEIGHTS_FILE}; run the stage that writes it again")
    if sha256(path.read_bytes()).hexdigest() != config["weights_sha256"]:
        raise WeightsError(f"{path} is not the file {CONFIG_FILE} was written for (checksums differ); write both again")
    return _read_state_file(path)[0]


def _read_state_file(path: Path) -> tuple[dict[str, torch.Tensor], bool]:
    """The tensors of a weights file, and whether it is OpenAI's own format (then always QuickGELU)."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path), False
        if _is_torchscript(path):
            content = torch.jit.load(path, map_location="cpu").state_dict()
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise WeightsError(
            f"{path} is not readable as safetensors, a TorchScript archive or a plain state dict ({error})"
        ) from error
    state = content.get("state_dict", content) if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise WeightsError(
            f"{path} holds no state dict: expected a mapping of names to tensors, or one under 'state_dict'"
        )
    state = {key.removeprefix("module."): value for key, value in state.items()}
    from_openai = any(key in state for key in _OPENAI_EXTRAS)
    return {key: value for key, value in state.items() if key not in _OPENAI_EXTRAS}, from_openai


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("constants.pkl") for name in archive.namelist())
