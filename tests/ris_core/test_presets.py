"""The recipes of params.yaml: each is complete for its datasets, and builds models of the published size."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ris_core.config import Params, load_params
from ris_core.models.clip import build_clip, resolve_architecture
from ris_core.models.registry import build_model
from ris_core.options import deciding

PARAMS = Path(__file__).parents[2] / "params.yaml"
SHORT = ("refcoco_unc", "refcoco_google", "refcoco+_unc")
LONG = ("refcocog_umd", "refcocog_google")
WORDS = {"cris": (17, 22), "lts": (17, 22), "risclip": (77, 77), "global_local": (None, None)}
# What is trained, in millions: of CRIS as its official code counts it; of RISCLIP the sum of the parts that its paper
# describes; of LTS likewise, with the words of CLIP's tokenizer (49408) instead of 12000. A zero-shot system: the whole
# CLIP, of which nothing is trained.
SIZES = {
    "cris": 146.849,
    "cris_r101": 161.252,
    "cris_paper": 146.849,
    "risclip_b": 75.3,
    "risclip_l": 142.35,
    "lts": 58.41 - 3.6 + 0.0003 * 49408,
    "global_local": 151.277,
    "global_local_rn50": 102.007,
}
TWINS = (
    "cris",
    "cris_r101",
    "cris_paper",
    "lts",
    "global_local",
    "global_local_rn50",
)  # these have one for RefCOCOg's sentences


def recipes() -> list[tuple[str, str]]:
    """Every recipe with every real dataset it is for."""
    pairs = [(name, dataset) for name in SIZES for dataset in SHORT]
    return pairs + [(f"{name}_g" if name in TWINS else name, dataset) for name in SIZES for dataset in LONG]


def chosen(tmp_path: Path, preset: str, dataset: str) -> tuple[Params, str]:
    """params.yaml as its reader would edit it for a recipe; and the recipe's system."""
    content = yaml.safe_load(PARAMS.read_text())
    system = next(name for name in WORDS if preset.startswith(name))
    overlays = list(bases(content["presets"], preset))
    named = (overlay.get(system, {}).get("clip") for overlay in overlays)
    clip = next((name for name in named if name), content[system]["clip"])
    content |= {"preset": preset, "datasets": [dataset], "systems": [system], "clips": [clip]}
    place = tmp_path / "params.yaml"
    place.write_text(yaml.safe_dump(content))
    return load_params(place), system


def bases(presets: dict[str, Any], name: str | None) -> Iterator[dict[str, Any]]:
    """A preset, the one it is laid over, and so on."""
    while name is not None:
        yield presets[name]
        name = presets[name].get("base")


@pytest.mark.parametrize(("preset", "dataset"), recipes())
def test_a_recipe_builds_the_published_model(preset: str, dataset: str, tmp_path: Path) -> None:
    params, system = chosen(tmp_path, preset, dataset)
    section = params.of(system)
    clip_params = params.clip(section.clip)
    architecture = resolve_architecture(clip_params.architecture)
    if clip_params.image_size:
        architecture["vision_cfg"]["image_size"] = clip_params.image_size
    config = section.model
    if system == "lts":
        object.__setattr__(config, "pretrained", False)  # sizes are known without fetching weights
    with torch.device("meta"):
        model = build_model(system, config, build_clip(architecture))
    if system == "risclip":  # both stages: the second leaves the first one's weights as they are
        counted = list(model.state_dict().values())
    else:
        counted = [each for each in model.parameters() if each.requires_grad or system == "global_local"]
    expected = SIZES[preset.removesuffix("_g")]
    assert sum(each.numel() for each in counted) / 1e6 == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize(("preset", "dataset"), recipes())
def test_a_recipe_fits_its_dataset(preset: str, dataset: str, tmp_path: Path) -> None:
    params, system = chosen(tmp_path, preset, dataset)
    section = params.of(system)
    long = dataset in LONG
    if section.train is None:
        assert section.model.alpha == (0.85 if long else 0.95)
        assert params.evaluate.protocols[0] == "global_local"
    else:
        assert section.train.word_len == WORDS[system][long]
        assert section.train.steps_per_epoch is None
        assert section.train.validate_images is None
    assert params.clip(section.clip).weights == (None if system == "lts" else "openai")


@pytest.mark.parametrize("name", TWINS)
def test_a_twin_is_its_recipe_but_for_what_long_sentences_need(name: str, tmp_path: Path) -> None:
    recipe, system = chosen(tmp_path, name, "refcocog_umd")
    twin, _ = chosen(tmp_path, f"{name}_g", "refcocog_umd")
    differing = {key for key, value in leaves(deciding(recipe)).items() if leaves(deciding(twin))[key] != value}
    if system == "global_local":
        assert differing == {"preset", f"{system}.model.alpha"}
    else:  # of the training that they share, and of every system's own, which has it from there
        assert f"{system}.train.word_len" in differing
        assert {key.split(".")[-1] for key in differing} == {"preset", "word_len"}


def leaves(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Single values by their full names."""
    found: dict[str, Any] = {}
    for key, value in content.items():
        found |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def test_every_recipe_is_checked() -> None:
    names = {*SIZES, *(f"{name}_g" for name in TWINS), "default", "long"}
    assert set(yaml.safe_load(PARAMS.read_text())["presets"]) == names
