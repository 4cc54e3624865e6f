"""What to do with what was fetched: the lines of params.yaml that choose a recipe, and the command that runs it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ris_core.data.refer.reader import DatasetName


@dataclass(frozen=True)
class Recipe:
    """A preset of params.yaml, the system that it is for, and the section and weights of its CLIP, which LTS does not read."""

    preset: str
    system: str
    section: str
    weights: str | None

    def of(self, name: DatasetName) -> str:
        """Give the preset's name for a dataset: that of RefCOCOg's long sentences, where there is one."""
        return f"{self.preset}_g" if name.folder == "refcocog" and self.system != "risclip" else self.preset


RECIPES = (
    Recipe("cris", "cris", "rn", "RN50"),
    Recipe("cris_paper", "cris", "rn", "RN50"),
    Recipe("cris_r101", "cris", "rn", "RN101"),
    Recipe("risclip_b", "risclip", "vit", "ViT-B-16"),
    Recipe("risclip_l", "risclip", "vit", "ViT-L-14"),
    Recipe("global_local", "global_local", "vit", "ViT-B-32"),
    Recipe("global_local_rn50", "global_local", "rn", "RN50"),
    Recipe("lts", "lts", "rn", None),
)


def settings(recipe: Recipe, name: DatasetName, weights: Path | None) -> list[str]:
    """Give the lines of params.yaml that choose a recipe for a dataset, with a file of CLIP's weights if there is one."""
    preset = recipe.of(name)
    lines = [
        f"preset: {'mine' if weights else preset}",
        f"datasets: [{name.name}]",
        f"systems: [{recipe.system}]",
        f"clips: [{recipe.section}]",
    ]
    if weights:
        lines += [
            "presets:",
            f"  mine: {{base: {preset}, clip_{recipe.section}: {{weights: {json.dumps(str(weights))}}}}}",
        ]
    return lines


def next_steps(name: DatasetName, dataset: Path, expected: Path, weights: Sequence[Path]) -> list[str]:
    """Tell how to go on, as lines: with the first recipe that reads one of the weights, or the first of all.

    `dataset` is the folder that was made, `expected` the one that stages read.
    """
    usable = [(recipe, path) for path in weights for recipe in RECIPES if recipe.weights == path.stem]
    recipe, path = usable[0] if usable else (RECIPES[0], None)
    lines = []
    if dataset.resolve() != expected.resolve():
        lines += ["next, link the dataset to where stages look for it:"]
        lines += [f"  mkdir -p {expected.parent} && ln -s {shlex.quote(str(dataset.resolve()))} {expected}"]
    lines += ["next, in params.yaml:", *(f"  {line}" for line in settings(recipe, name, path))]
    if path:
        lines[-2:] = ["  presets: # one more of them", lines[-1]]
    choice = [other for other, _ in usable] or RECIPES
    others = ", ".join(other.of(name) for other in choice if other is not recipe)
    lines += (
        [f"  (other presets: {others}, each with its `systems` and `clips`: docs/real-data.md, Recipes)"]
        if others
        else []
    )
    if not path and recipe.weights:
        lines += [
            f"  (its weights of CLIP come with the stage pretrain_clip, or from here with --clip {recipe.weights})"
        ]
    return [*lines, "then: make repro"]
