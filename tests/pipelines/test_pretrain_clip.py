"""Stage `pretrain_clip`: each CLIP is trained with its own settings, or made of weights that are given."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from pipelines_world import Workplace

from pipelines import paths, pretrain_clip
from ris_core.models.clip import build_clip, input_size, load_saved_clip, read_clip_config, save_clip

SMALL = {"steps": 1, "scenes_per_step": 4, "warmup_steps": 0}


def test_every_clip_is_trained_with_its_own_settings(workplace: Workplace) -> None:
    workplace.link("raw")
    rn, vit = {**SMALL, "architecture": "tiny_rn"}, {**SMALL, "architecture": "tiny_vit", "image_size": 64}
    workplace.change(clip_rn=rn, clip_vit=vit)
    for name, size, other in (("rn", 128, "vit"), ("vit", 64, "rn")):
        before = workplace.files()
        pretrain_clip.main(name)
        made = {f"data/clip/{name}/clip.json", f"data/clip/{name}/clip.safetensors", f"results/clip/{name}.json"}
        assert workplace.files() - before == made, other
        clip = load_saved_clip(paths.clip(name))
        assert input_size(clip) == size
        scores = json.loads(paths.clip_scores(name).read_text())
        assert {"retrieval@1", "retrieval@1_chance", "phrase_to_object", "phrase_to_object_chance"} <= scores.keys()
        assert read_clip_config(paths.clip(name))["extra"]["weights"] is None
    assert type(load_saved_clip(paths.clip("rn")).visual) is not type(load_saved_clip(paths.clip("vit")).visual)


def test_given_weights_are_taken_as_they_are_at_another_size(workplace: Workplace, tmp_path: Path) -> None:
    torch.manual_seed(7)
    given = build_clip("tiny_vit")
    save_clip(given, tmp_path / "given", "tiny_vit", {})
    weights = str(tmp_path / "given/clip.safetensors")
    workplace.change(clip_vit={"architecture": "tiny_vit", "weights": weights, "image_size": 256})
    pretrain_clip.main("vit")  # no captions are here
    clip = load_saved_clip(paths.clip("vit"))
    assert input_size(clip) == 256
    assert torch.equal(clip.visual.proj, given.visual.proj)
    assert torch.equal(clip.token_embedding.weight, given.token_embedding.weight)
    assert json.loads(paths.clip_scores("vit").read_text()) == {}
    assert read_clip_config(paths.clip("vit"))["extra"] == {"weights": weights}
