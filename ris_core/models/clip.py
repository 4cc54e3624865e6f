"""CLIP on open_clip's own classes: building, loading weights with checks, saving, and the features other models read.

An architecture is a JSON config in open_clip's format: one of ours in `ris_core/models/configs`, one of open_clip's by
name ("RN50-quickgelu"), or a dict. No class of open_clip is changed or copied.
"""

from __future__ import annotations

import difflib
import json
import math
import os
from collections.abc import Mapping
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from ris_core.errors import ConfigError, WeightsError, list_problems, short
from ris_core.files import replaced_file, write_json
from ris_core.weights import load_strictly, read_json, read_safetensors, read_state

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
_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")  # of weights files, most often
_ARCHITECTURE_KEYS = {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "init_logit_scale"}

Architecture = str | Mapping[str, Any]


def embedded_architectures() -> list[str]:
    """Give the names of the architectures that come with this project."""
    return sorted(path.stem for path in _CONFIG_FOLDER.glob("*.json"))


def resolve_architecture(architecture: Architecture) -> dict[str, Any]:
    """Give an open_clip model config as a dict, from the name of one or from a dict.

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
    """Build an open_clip CLIP with random weights (float32). Runs under `torch.device("meta")` too.

    Raises ConfigError if the architecture cannot be built, see `resolve_architecture`.
    """
    from open_clip.model import CLIP

    config = resolve_architecture(architecture)
    try:
        return CLIP(**config)
    except Exception as error:  # open_clip checks no value: wrong ones make it raise errors of many kinds
        raise ConfigError(f"no CLIP can be built of {config}: {error or type(error).__name__}") from error


def load_clip(architecture: Architecture, weights: str | Path | None = None, image_size: int | None = None) -> CLIP:
    """Load a CLIP in float32 on the CPU, with its weights checked against the architecture.

    Args:
        architecture: see `resolve_architecture`.
        weights: None for random ones; a pretrained tag of open_clip ("openai"), fetched or found in its cache; a
            folder written by `save_clip`; or a file, see `ris_core.weights.read_state`: OpenAI's TorchScript archive,
            safetensors, or a state dict of `torch.save`, also in a whole checkpoint. `~` is the home folder.
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
    path = Path(os.path.expanduser(weights))
    if str(weights) in _tags(tag_name):
        state = _read_pretrained(tag_name, str(weights), config)
    elif os.path.isdir(path):
        _check_activation(config, bool(read_clip_config(path)["architecture"].get("quick_gelu", False)), str(path))
        state = _read_saved(path)
    elif os.path.lexists(path):
        state, from_openai = _read_file(path)
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


def save_clip(clip: CLIP, folder: str | Path, architecture: Architecture, extra: Mapping[str, Any]) -> None:
    """Write `clip.safetensors` and `clip.json` (architecture, extra, checksum of the weights) into a folder.

    The architecture is written with the image size that the model has, which `load_clip` may have changed. Each file
    appears whole or not at all, and the config comes last and names the weights' checksum, so that a new file beside an
    old one cannot pass for a pair.
    """
    folder = Path(folder)
    config_of_clip = resolve_architecture(architecture)
    config_of_clip["vision_cfg"]["image_size"] = input_size(clip)
    with replaced_file(folder / WEIGHTS_FILE) as temporary:
        save_file({key: value.detach().cpu().contiguous() for key, value in clip.state_dict().items()}, temporary)
        checksum = sha256(temporary.read_bytes()).hexdigest()
    content = {"architecture": config_of_clip, "extra": dict(extra), "weights_sha256": checksum}
    write_json(folder / CONFIG_FILE, content)


def read_clip_config(folder: str | Path) -> dict[str, Any]:
    """Read what `save_clip` wrote beside the weights: {"architecture", "weights_sha256", "extra"}.

    Raises:
        WeightsError: the folder holds no saved CLIP, or its description is damaged: all that is wrong is listed.
    """
    folder = Path(os.path.expanduser(folder))
    path = folder / CONFIG_FILE
    if not os.path.lexists(path):
        files = sorted(each.name for each in folder.glob("*") if each.suffix in _SUFFIXES)
        hint = f", or give a file in it ({', '.join(files)})" if files else ""
        raise WeightsError(f"no saved CLIP in {folder}: {CONFIG_FILE} is missing; run the stage that writes it{hint}")
    content = read_json(path)
    problems = _wrong(content, architecture=dict, weights_sha256=str, extra=dict)
    if not problems:
        given = {"quick_gelu": False, **content["architecture"]}
        problems = _wrong(given, embed_dim=int, vision_cfg=dict, text_cfg=dict, quick_gelu=bool)
        if not problems and not {"width", "timm_model_name"} & set(given["vision_cfg"]):
            problems = ["vision_cfg: width missing"]  # open_clip's default is a ViT's, with which a ResNet takes 20 GB
    if problems:
        raise WeightsError(list_problems(f"{path} is damaged", problems, "Run the stage that writes it again."))
    return content


def load_saved_clip(folder: str | Path) -> CLIP:
    """Load the CLIP that `save_clip` wrote into a folder, in the architecture recorded there.

    Raises:
        WeightsError: there is none, or it is damaged.
    """
    try:
        return load_clip(read_clip_config(folder)["architecture"], folder)
    except ConfigError as error:
        raise WeightsError(f"{Path(folder) / CONFIG_FILE} is damaged: {error}") from error


def input_size(clip: CLIP) -> int:
    """Give the side in pixels of the square images that a CLIP reads.

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
    """Turn uint8 RGB (B, 3, H, W) into float32 as CLIP expects it, on the same device and in the same memory format."""
    mean, std = _normalisation(images.device)
    return (images - mean).div_(std)  # the bytes become floats on the way, and there is one copy of them


def resnet_feature_maps(
    visual: ModifiedResNet, images: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Give C3 (layer2, 1/8), C4 (layer3, 1/16) and the raw layer4 map (1/32) of normalised images (B, 3, H, W)."""
    c3 = visual.layer2(visual.layer1(visual.stem(images)))
    c4 = visual.layer3(c3)
    return c3, c4, visual.layer4(c4)


def vit_patch_map(visual: VisionTransformer, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Give image features (B, E) and the map of all patches (B, E, g, g) of normalised images (B, 3, H, W), from one pass.

    The map is what the shared space says of every patch: the final layer norm and the projection, made for the pooled
    feature, at each patch token instead. Nothing is L2-normalised.
    """
    found = visual.forward_intermediates(images, indices=1, normalize_intermediates=True)
    return found["image_features"], torch.einsum("bchw,ce->behw", found["image_intermediates"][0], visual.proj)


def encode_words(clip: CLIP, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Give word features and sentence state of tokens (N, L) int64 with L at most the context length.

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
    """Give the config with another input size. Raises ConfigError where the visual tower cannot take it."""
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
    """Check the activation: nothing in a weight tells it, and the wrong one silently spoils every feature."""
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
    return _read_file(path)[0]


def _read_saved(folder: Path) -> dict[str, torch.Tensor]:
    config, path = read_clip_config(folder), folder / WEIGHTS_FILE
    if not os.path.lexists(path):
        raise WeightsError(f"{folder} has a {CONFIG_FILE} but no {WEIGHTS_FILE}; run the stage that writes it again")
    state = read_safetensors(path)
    if sha256(path.read_bytes()).hexdigest() != config["weights_sha256"]:
        raise WeightsError(f"{path} is not the file {CONFIG_FILE} was written for (checksums differ); write both again")
    return state


def _read_file(path: Path) -> tuple[dict[str, torch.Tensor], bool]:
    """Read the tensors of a weights file, and whether it is OpenAI's own format (then always QuickGELU)."""
    state = read_state(path)
    if any(key.startswith(("text_model.", "vision_model.")) for key in state):
        raise WeightsError(
            f"{path} has the names that Hugging Face's transformers gives CLIP's weights (text_model..., vision_model...): "
            "give open_clip's or OpenAI's weights of the same model, by their tag such as openai or as a file"
        )
    from_openai = any(key in state for key in _OPENAI_EXTRAS)
    return {key: value for key, value in state.items() if key not in _OPENAI_EXTRAS}, from_openai


def _wrong(content: Mapping[str, Any], **kinds: type) -> list[str]:
    """Tell what is missing or of another type than named, as lines."""
    problems = [f"{name}: missing" for name in kinds if name not in content]
    return problems + [
        f"{name}: expected {kind.__name__}, found {short(content[name])}"
        for name, kind in kinds.items()
        if name in content and type(content[name]) is not kind
    ]
