"""The small CLIP: batches without false negatives, a loss that falls, scores beside the chance of guessing."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from open_clip.loss import ClipLoss
from tiny_world import ARCHITECTURE, Tiny
from torch import nn

from ris_core.data.images import load_image
from ris_core.data.letterbox import letterbox_image, letterbox_mask
from ris_core.data.text import encode
from ris_core.errors import ConfigError, DataError
from ris_core.models.clip import build_clip, normalise
from ris_core.training import pretrain
from ris_core.training.pretrain import (
    Captions,
    ClipParams,
    Tokens,
    Views,
    begin_local,
    cells_of,
    dense_map,
    draw,
    encode_phrases,
    encode_scenes,
    measure,
    patch_loss,
    pretrain_clip,
    read_captions,
)

CPU = torch.device("cpu")
SIZE: int = ARCHITECTURE["vision_cfg"]["image_size"]
PARAMS = ClipParams(steps=12, scenes_per_step=8, lr=3e-3, warmup_steps=2)
VIT: dict[str, Any] = {
    **ARCHITECTURE,
    "vision_cfg": {
        "image_size": SIZE,
        "patch_size": 16,
        "layers": 1,
        "width": 32,
        "head_width": 16,
        "pool_type": "avg",
    },
}
NAMES = {"retrieval@1", "phrase_to_object", "patch_accuracy", "patch_object"}


@pytest.fixture(scope="module")
def captions(tiny: Tiny) -> Captions:
    return read_captions(tiny.raw, tiny.captions, SIZE)


@pytest.fixture
def clip() -> nn.Module:
    torch.manual_seed(0)
    return build_clip(ARCHITECTURE)


@pytest.fixture
def vit() -> nn.Module:
    torch.manual_seed(0)
    return build_clip(VIT)


def test_captions_are_read_with_their_letterboxed_regions(captions: Captions, tiny: Tiny) -> None:
    content = json.loads(tiny.captions.read_text())
    folder = tiny.raw / "images/mscoco/images/train2014"
    assert captions.pixels.shape == (24, 3, SIZE, SIZE)
    assert captions.pixels.dtype == torch.uint8
    for i, image in enumerate(content["images"]):
        pixels = letterbox_image(load_image(folder / image["file_name"]), SIZE)
        assert (captions.pixels[i].permute(1, 2, 0).numpy() == pixels).all()
    regions = [a for a in content["annotations"] if "bbox" in a]
    assert captions.region_text == [a["caption"] for a in regions]
    assert len(captions.scene_text) == len(content["annotations"]) - len(regions)
    by_id = {image["id"]: image for image in content["images"]}
    for region, box, place in zip(regions, captions.region_box, captions.region_image, strict=True):
        image = by_id[region["image_id"]]
        assert content["images"][place] == image
        x, y, w, h = region["bbox"]
        mask = np.zeros((image["height"], image["width"]), np.uint8)
        mask[round(y) : round(y + h), round(x) : round(x + w)] = 1
        rows, columns = np.nonzero(letterbox_mask(mask, SIZE) > 127)
        assert box.tolist() == pytest.approx([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1], abs=1.6)


def test_a_missing_file_says_where_captions_come_from(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"captions\.json does not exist: the small CLIP learns from a dataset with"):
        read_captions(tmp_path, tmp_path / "captions.json", SIZE)


def test_captions_of_one_kind_are_not_enough(tiny: Tiny, tmp_path: Path) -> None:
    content = json.loads(tiny.captions.read_text())
    content["annotations"] = [a for a in content["annotations"] if "bbox" not in a][:5]
    path = tmp_path / "captions.json"
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match="needs captions of whole images and of regions; has 5 and 0"):
        read_captions(tiny.raw, path, SIZE)


def test_a_subset_keeps_captions_of_its_images_only(captions: Captions) -> None:
    part = captions.subset(np.array([3, 7]))
    assert set(part.scene_image) == set(part.region_image) == {3, 7}
    pairs = zip(captions.region_text, captions.region_image, strict=True)
    assert part.region_text == [text for text, image in pairs if image in (3, 7)]
    assert len(part.region_box) == len(part.region_text)
    assert part.pixels is captions.pixels


def test_nothing_in_a_batch_counts_against_itself(captions: Captions) -> None:
    """Equal captions, two captions of one image or of one region would all be false negatives."""
    assert max(Counter(captions.region_text).values()) > 1, "there is something to drop"
    for step in range(5):
        scenes, regions = draw(captions, PARAMS, step)
        assert 2 <= len(scenes) <= PARAMS.scenes_per_step
        assert len({captions.scene_text[i] for i in scenes}) == len(scenes)
        assert len(set(captions.scene_image[scenes])) == len(scenes)
        assert len({captions.region_text[i] for i in regions}) == len(regions)
        boxes = {(captions.region_image[i], *captions.region_box[i].tolist()) for i in regions}
        assert len(boxes) == len(regions)
        assert set(captions.region_image[regions]) <= set(captions.scene_image[scenes])
        assert len(regions) > len(scenes)


def test_equal_captions_of_different_images_are_dropped(captions: Captions) -> None:
    same = replace(captions, scene_text=["a scene"] * len(captions.scene_text))
    assert len(draw(same, PARAMS, 0)[0]) == 1


def test_more_scenes_than_there_are_is_all_of_them(captions: Captions) -> None:
    scenes, _ = draw(captions, replace(PARAMS, scenes_per_step=500), 0)
    assert len(scenes) <= 24
    assert len(scenes) > 12


def test_a_step_is_a_function_of_seed_and_number(captions: Captions) -> None:
    def drawn(step: int, seed: int = 0) -> list[list[int]]:
        return [indices.tolist() for indices in draw(captions, replace(PARAMS, seed=seed), step)]

    first = drawn(5)
    drawn(0)
    assert drawn(5) == first
    assert drawn(6) != first
    assert drawn(5, seed=1) != first


def test_tokens_are_the_captions_cut_to_the_longest(clip: nn.Module) -> None:
    texts = ["red star", "the tiny blue ring", "x " * 60]
    tokens = Tokens(texts, clip, CPU)
    short = tokens[np.array([1, 0])]
    assert [[token for token in row if token] for row in short.tolist()] == [encode(texts[1]), encode(texts[0])]
    assert short.shape[1] == len(encode(texts[1]))
    assert tokens[np.array([2])].shape == (1, 32), "no longer than the context"


def test_the_dense_map_of_a_vit_is_that_of_open_clip(captions: Captions, vit: nn.Module) -> None:
    images = normalise(captions.pixels[:3])
    pooled, patches = dense_map(vit, images)
    found = vit.visual.forward_intermediates(images, indices=1, output_fmt="NLC", normalize_intermediates=True)
    expected = found["image_intermediates"][0] @ vit.visual.proj
    torch.testing.assert_close(patches.flatten(2).transpose(1, 2), expected)
    torch.testing.assert_close(pooled, vit.encode_image(images))
    torch.testing.assert_close(pooled, patches.mean(dim=(2, 3)))  # what this architecture pools by


def test_the_dense_map_of_a_resnet_is_on_its_last_grid(captions: Captions, clip: nn.Module) -> None:
    pooled, patches = dense_map(clip.eval(), normalise(captions.pixels[:3]))
    torch.testing.assert_close(pooled, clip.encode_image(normalise(captions.pixels[:3])))
    assert patches.shape == (3, 32, SIZE // 32, SIZE // 32)


def test_a_new_attention_pool_begins_with_places_that_attend_to_themselves() -> None:
    torch.manual_seed(0)
    pool = build_clip("tiny_rn").visual.attnpool

    def own_share() -> float:
        """What a place's attention gives to itself in place of equal shares, as a mean."""
        x = torch.rand(8, 16, pool.positional_embedding.shape[1]) + pool.positional_embedding[1:]
        query, key = (
            part(x).unflatten(-1, (pool.num_heads, -1)).transpose(1, 2) for part in (pool.q_proj, pool.k_proj)
        )
        weights = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(-1)
        return 16 * weights.diagonal(dim1=-2, dim2=-1).mean().item()

    assert own_share() == pytest.approx(1, abs=0.1)
    begin_local(pool)
    assert own_share() > 1.5


def test_other_towers_have_no_dense_map(clip: nn.Module) -> None:
    clip.visual = nn.Identity()
    with pytest.raises(ConfigError, match="no dense map of a Identity: take CLIP's own ResNet or ViT"):
        dense_map(clip, torch.zeros(1, 3, SIZE, SIZE))


@pytest.mark.parametrize("tower", ["clip", "vit"])
def test_scenes_are_encoded_as_open_clip_does_and_regions_where_they_are(
    captions: Captions, tower: str, request: pytest.FixtureRequest
) -> None:
    clip = request.getfixturevalue(tower).eval()
    scenes, regions = draw(captions, PARAMS, 0)
    with torch.inference_mode():
        seen, cut, patches, owner = encode_scenes(clip, captions, scenes, regions)
        pixels = normalise(captions.pixels[captions.scene_image[scenes]])
        assert torch.allclose(seen, clip.encode_image(pixels, normalize=True), atol=1e-5)
        assert cut.shape == (len(regions), 32)
        assert torch.allclose(cut.norm(dim=1), torch.ones(len(regions)), atol=1e-5)
        assert torch.allclose(patches.norm(dim=1), torch.ones(1), atol=1e-5)
        images = np.unique(captions.scene_image[scenes])
        assert (images[owner] == captions.region_image[regions]).all()
        # One at a time, each region finds its own image.
        for i, region in enumerate(regions[:4]):
            own = scenes[captions.scene_image[scenes] == captions.region_image[region]]
            alone = encode_scenes(clip, captions, own, np.array([region])).regions
            assert torch.allclose(alone[0], cut[i], atol=1e-4)


def test_phrases_are_encoded_as_open_clip_does(clip: nn.Module) -> None:
    short = torch.tensor([[49406, 736, 2117, 49407, 0], [49406, 2117, 49407, 0, 0]])
    expected = clip.encode_text(nn.functional.pad(short, (0, 27)), normalize=True)
    assert torch.allclose(encode_phrases(clip, short), expected, atol=1e-5)


def test_cells_of_a_box_have_their_middle_inside_it() -> None:
    boxes = np.array([[0, 0, 0.5, 1], [0.13, 0.6, 0.9, 0.9], [0.3, 0.55, 0.35, 0.6], [0.99, 0, 1, 1]], np.float32)
    cells = cells_of(boxes, (2, 4)).reshape(4, 2, 4).int().tolist()
    assert cells[0] == [[1, 1, 0, 0], [1, 1, 0, 0]]
    assert cells[1] == [[0, 0, 0, 0], [0, 1, 1, 1]]
    assert cells[2] == [[0, 0, 0, 0], [0, 1, 0, 0]], "too small for any: the cell under its middle"
    assert cells[3] == [[0, 0, 0, 1], [0, 0, 0, 1]]


def test_the_patch_loss_is_the_share_that_the_region_gets() -> None:
    patches = nn.functional.normalize(torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    phrases = nn.functional.normalize(torch.randn(3, 8, generator=torch.Generator().manual_seed(1)), dim=1)
    boxes = np.array([[0, 0, 0.5, 0.5], [0.5, 0, 1, 1], [0, 0, 1, 1]], np.float32)
    owner = torch.tensor([1, 0, 0])
    views = Views(torch.empty(0), torch.empty(0), patches, owner)
    loss = patch_loss(views, phrases, boxes, torch.tensor(5.0))
    shares = []
    for phrase, image, cells in zip(phrases, owner, cells_of(boxes, (4, 4)), strict=True):
        answer = torch.softmax(5 * phrase @ patches[image].flatten(1), 0)
        shares.append(answer[cells].sum())
    torch.testing.assert_close(loss, -torch.stack(shares).log().mean())
    assert shares[2].item() == pytest.approx(1)


def loss_over(clip: nn.Module, captions: Captions) -> np.ndarray:
    """Mean losses of scenes, regions and patches."""
    clip.eval()
    scene_tokens, region_tokens = Tokens(captions.scene_text, clip, CPU), Tokens(captions.region_text, clip, CPU)
    losses, scale = [], torch.tensor(10.0)
    with torch.inference_mode():
        for step in range(3):
            scenes, regions = draw(captions, PARAMS, step)
            views, phrases = (
                encode_scenes(clip, captions, scenes, regions),
                encode_phrases(clip, region_tokens[regions]),
            )
            of_scenes = ClipLoss()(views.scenes, encode_phrases(clip, scene_tokens[scenes]), scale)
            of_patches = patch_loss(views, phrases, captions.region_box[regions] / SIZE, scale)
            losses.append([of_scenes.item(), ClipLoss()(views.regions, phrases, scale).item(), of_patches.item()])
    return np.mean(losses, axis=0)


@pytest.mark.parametrize(("architecture", "patches"), [(ARCHITECTURE, 0.0), (VIT, 1.0)])
def test_a_few_steps_lower_the_loss_and_are_deterministic(
    captions: Captions, architecture: dict[str, Any], patches: float
) -> None:
    params = replace(PARAMS, patch_loss=patches)
    torch.manual_seed(0)
    clip = build_clip(architecture)
    before = loss_over(clip, captions)
    start = {name: value.clone() for name, value in clip.state_dict().items()}
    scores = pretrain_clip(clip, captions, params, CPU)
    lower = before - loss_over(clip, captions)
    assert lower[:2].sum() > 0.2
    assert lower[2] > 0.2 or not patches
    assert set(scores) == NAMES | {f"{name}_chance" for name in NAMES}
    again = build_clip(architecture)
    again.load_state_dict(start)
    torch.manual_seed(5)
    assert pretrain_clip(again, captions, params, CPU) == scores
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in clip.state_dict().items())


def test_words_that_never_occur_are_left_alone(captions: Captions, clip: nn.Module) -> None:
    before = clip.token_embedding.weight.detach().clone()
    pretrain_clip(clip, captions, replace(PARAMS, steps=2), CPU)
    used = {token for text in captions.scene_text + captions.region_text for token in encode(text)} | {0}
    moved = (clip.token_embedding.weight != before).any(1).nonzero().flatten().tolist()
    assert moved
    assert set(moved) <= used
    assert not clip.token_embedding.sparse


def test_without_a_weight_scenes_teach_nothing(captions: Captions, clip: nn.Module) -> None:
    before = clip.token_embedding.weight.detach().clone()
    pretrain_clip(clip, captions, replace(PARAMS, steps=2, scene_loss=0.0), CPU)
    moved = set((clip.token_embedding.weight != before).any(1).nonzero().flatten().tolist())
    of_regions = {token for text in captions.region_text for token in encode(text)} | {0}
    assert moved
    assert moved <= of_regions
    assert {token for text in captions.scene_text for token in encode(text)} - of_regions, (
        "scenes have words of their own"
    )


def test_scores_are_measured_on_images_that_were_not_trained_on(
    captions: Captions, clip: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[set[int]] = []
    measured: list[set[int]] = []

    def watched_draw(data: Captions, params: ClipParams, step: int) -> tuple[np.ndarray, np.ndarray]:
        trained.append(set(data.scene_image) | set(data.region_image))
        return draw(data, params, step)

    def watched_measure(clip: nn.Module, data: Captions, device: torch.device) -> dict[str, float]:
        measured.append(set(data.scene_image) | set(data.region_image))
        return {}

    monkeypatch.setattr(pretrain, "draw", watched_draw)
    monkeypatch.setattr(pretrain, "measure", watched_measure)
    monkeypatch.setattr(pretrain, "RETRIEVAL_AMONG", 6)
    pretrain_clip(clip, captions, replace(PARAMS, steps=1), CPU)
    assert not trained[0] & measured[0]
    assert (len(trained[0]), len(measured[0])) == (18, 6)


def places(text: str) -> bool:
    words = "left right top bottom middle center above over below under beneath leftmost rightmost highest lowest"
    ranks = "first second third fourth fifth"
    return any(word in f"{words} {ranks}".split() for word in text.split())


def test_chance_levels(captions: Captions, clip: nn.Module) -> None:
    scores = measure(clip, captions, CPU)
    shares = []  # by brute force: of an image's different boxes, those that carry the phrase
    for text, image in zip(captions.region_text, captions.region_image, strict=True):
        rows = [r for r in range(len(captions.region_text)) if captions.region_image[r] == image]
        boxes = {tuple(captions.region_box[r].tolist()) for r in rows}
        right = {tuple(captions.region_box[r].tolist()) for r in rows if captions.region_text[r] == text}
        shares.append(len(right) / len(boxes))
    assert scores["phrase_to_object_chance"] == pytest.approx(np.mean(shares))
    named = [share for share, text in zip(shares, captions.region_text, strict=True) if not places(text)]
    assert len(named) < len(shares), "some captions have words of place"
    assert scores["patch_object_chance"] == pytest.approx(np.mean(named))
    assert scores["retrieval@1_chance"] == pytest.approx(1 / 24)
    assert 0 <= scores["phrase_to_object"] <= 1


@pytest.mark.parametrize("wrong", [False, True])
def test_one_who_knows_scores_full_and_one_who_errs_scores_nothing(
    wrong: bool, clip: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images with a red left and a blue lower right; vectors are looked up from the truth, or from its opposite."""
    names = ("one", "two", "three", "four", "five")
    count, red, blue = len(names), 6, 7
    data = Captions(
        torch.zeros(count, 3, SIZE, SIZE, dtype=torch.uint8),
        np.arange(count),
        [f"scene number {name}" for name in names],
        np.repeat(np.arange(count), 2),
        np.array([[0, 0, 32, 64], [32, 32, 64, 64]] * count, np.float32),
        ["red", "blue"] * count,
    )

    def seen(clip: nn.Module, data: Captions, scenes: np.ndarray, regions: np.ndarray) -> Views:
        colours = torch.tensor([(data.region_text[r] == "red") != wrong for r in regions])
        places = (data.scene_image[scenes] + wrong) % count
        grid = torch.zeros(4, 4, dtype=torch.int64)  # the vector of the first scene stands for the background
        grid[:, :2], grid[2:, 2:] = (blue, red) if wrong else (red, blue)
        patches = torch.eye(8)[grid].permute(2, 0, 1).expand(len(scenes), -1, -1, -1)
        owner = torch.from_numpy(data.region_image[regions] - data.scene_image[scenes].min())
        return Views(torch.eye(8)[places], torch.eye(8)[torch.where(colours, red, blue)], patches, owner)

    def said(clip: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
        texts = [[token for token in row if token] for row in tokens.tolist()]
        known = {tuple(encode(text)): i for i, text in enumerate(data.scene_text)}
        known |= {tuple(encode("blue")): blue, tuple(encode("red")): red}
        return torch.eye(8)[[known[tuple(text)] for text in texts]]

    monkeypatch.setattr(pretrain, "encode_scenes", seen)
    monkeypatch.setattr(pretrain, "encode_phrases", said)
    monkeypatch.setattr(pretrain, "MEASURED_AT_ONCE", 2)
    scores = measure(clip, data, CPU)
    chances = {"retrieval@1": 0.2, "phrase_to_object": 0.5, "patch_accuracy": (8 + 4) / 2 / 16, "patch_object": 0.5}
    assert chances.keys() == NAMES
    for name, chance in chances.items():
        assert scores[name] == (0.0 if wrong else 1.0), name
        assert scores[f"{name}_chance"] == pytest.approx(chance), name


def test_patches_are_measured_by_all_captions_where_each_has_words_of_place(captions: Captions, vit: nn.Module) -> None:
    everywhere = replace(captions, region_text=[f"{text} on the left" for text in captions.region_text])
    scores = measure(vit, everywhere, CPU)
    assert scores["patch_object_chance"] == scores["phrase_to_object_chance"]
