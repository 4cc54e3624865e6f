"""The small CLIP: batches without false negatives, a loss that falls, scores beside the chance of guessing."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from open_clip.loss import ClipLoss
from tiny_world import ARCHITECTURE, Tiny
from torch import nn

from ris_core.config import ClipParams
from ris_core.data.letterbox import letterbox_image, letterbox_mask
from ris_core.data.shards import load_image
from ris_core.data.text import encode
from ris_core.errors import DataError
from ris_core.models.clip import build_clip, normalise
from ris_core.training import pretrain
from ris_core.training.pretrain import (
    Captions,
    Tokens,
    draw,
    encode_phrases,
    encode_scenes,
    measure,
    pretrain_clip,
    read_captions,
)

CPU = torch.device("cpu")
SIZE: int = ARCHITECTURE["vision_cfg"]["image_size"]
PARAMS = ClipParams(steps=12, scenes_per_step=8, lr=3e-3, warmup_steps=2)


@pytest.fixture(scope="module")
def captions(tiny: Tiny) -> Captions:
    return read_captions(tiny.raw, tiny.captions, SIZE)


@pytest.fixture
def clip() -> nn.Module:
    torch.manual_seed(0)
    return build_clip(ARCHITECTURE)


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


def test_scenes_are_encoded_as_open_clip_does_and_regions_where_they_are(captions: Captions, clip: nn.Module) -> None:
    clip.eval()
    scenes, regions = draw(captions, PARAMS, 0)
    with torch.inference_mode():
        seen, cut = encode_scenes(clip, captions, scenes, regions)
        pixels = normalise(captions.pixels[captions.scene_image[scenes]])
        assert torch.allclose(seen, clip.encode_image(pixels, normalize=True), atol=1e-5)
        assert cut.shape == (len(regions), 32)
        assert torch.allclose(cut.norm(dim=1), torch.ones(len(regions)), atol=1e-5)
        # One at a time, each region finds its own image.
        for i, region in enumerate(regions[:4]):
            own = scenes[captions.scene_image[scenes] == captions.region_image[region]]
            alone = encode_scenes(clip, captions, own, np.array([region]))[1]
            assert torch.allclose(alone[0], cut[i], atol=1e-4)


def test_phrases_are_encoded_as_open_clip_does(clip: nn.Module) -> None:
    short = torch.tensor([[49406, 736, 2117, 49407, 0], [49406, 2117, 49407, 0, 0]])
    expected = clip.encode_text(nn.functional.pad(short, (0, 27)), normalize=True)
    assert torch.allclose(encode_phrases(clip, short), expected, atol=1e-5)


def loss_over(clip: nn.Module, captions: Captions) -> float:
    clip.eval()
    scene_tokens, region_tokens = Tokens(captions.scene_text, clip, CPU), Tokens(captions.region_text, clip, CPU)
    losses = []
    with torch.inference_mode():
        for step in range(3):
            scenes, regions = draw(captions, PARAMS, step)
            seen, cut = encode_scenes(clip, captions, scenes, regions)
            losses.append(ClipLoss()(seen, encode_phrases(clip, scene_tokens[scenes]), torch.tensor(10.0)).item())
            losses.append(ClipLoss()(cut, encode_phrases(clip, region_tokens[regions]), torch.tensor(10.0)).item())
    return float(np.mean(losses))


def test_a_few_steps_lower_the_loss_and_are_deterministic(captions: Captions, clip: nn.Module) -> None:
    before = loss_over(clip, captions)
    start = {name: value.clone() for name, value in clip.state_dict().items()}
    scores = pretrain_clip(clip, captions, PARAMS, CPU)
    assert loss_over(clip, captions) < before - 0.1
    assert set(scores) == {"retrieval@1", "retrieval@1_chance", "phrase_to_object", "phrase_to_object_chance"}
    again = build_clip(ARCHITECTURE)
    again.load_state_dict(start)
    torch.manual_seed(5)
    assert pretrain_clip(again, captions, PARAMS, CPU) == scores
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in clip.state_dict().items())


def test_words_that_never_occur_are_left_alone(captions: Captions, clip: nn.Module) -> None:
    before = clip.token_embedding.weight.detach().clone()
    pretrain_clip(clip, captions, replace(PARAMS, steps=2), CPU)
    used = {token for text in captions.scene_text + captions.region_text for token in encode(text)} | {0}
    moved = (clip.token_embedding.weight != before).any(1).nonzero().flatten().tolist()
    assert moved
    assert set(moved) <= used
    assert not clip.token_embedding.sparse


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


def test_chance_levels(captions: Captions, clip: nn.Module) -> None:
    scores = measure(clip, captions, CPU)
    shares = []  # by brute force: of an image's different boxes, those that carry the phrase
    for text, image in zip(captions.region_text, captions.region_image, strict=True):
        rows = [r for r in range(len(captions.region_text)) if captions.region_image[r] == image]
        boxes = {tuple(captions.region_box[r].tolist()) for r in rows}
        right = {tuple(captions.region_box[r].tolist()) for r in rows if captions.region_text[r] == text}
        shares.append(len(right) / len(boxes))
    assert scores["phrase_to_object_chance"] == pytest.approx(np.mean(shares))
    assert scores["retrieval@1_chance"] == pytest.approx(1 / 24)
    assert 0 <= scores["phrase_to_object"] <= 1


@pytest.mark.parametrize("wrong", [False, True])
def test_one_who_knows_scores_full_and_one_who_errs_scores_nothing(
    wrong: bool, clip: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images with a red and a blue half; vectors are looked up from the truth, or from its opposite."""
    names = ("one", "two", "three", "four", "five")
    count = len(names)
    data = Captions(
        torch.zeros(count, 3, SIZE, SIZE, dtype=torch.uint8),
        np.arange(count),
        [f"scene number {name}" for name in names],
        np.repeat(np.arange(count), 2),
        np.array([[0, 0, 32, 64], [32, 0, 64, 64]] * count, np.float32),
        ["red", "blue"] * count,
    )

    def seen(
        clip: nn.Module, data: Captions, scenes: np.ndarray, regions: np.ndarray
    ) -> tuple[torch.Tensor, torch.Tensor]:
        colours = torch.tensor([(data.region_text[r] == "red") != wrong for r in regions])
        places = (data.scene_image[scenes] + wrong) % count
        return torch.eye(8)[places], torch.eye(8)[6 + colours.long()]

    def said(clip: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
        texts = [[token for token in row if token] for row in tokens.tolist()]
        known = {tuple(encode(text)): i for i, text in enumerate(data.scene_text)}
        known |= {tuple(encode("blue")): 6, tuple(encode("red")): 7}
        return torch.eye(8)[[known[tuple(text)] for text in texts]]

    monkeypatch.setattr(pretrain, "encode_scenes", seen)
    monkeypatch.setattr(pretrain, "encode_phrases", said)
    scores = measure(clip, data, CPU)
    assert scores["phrase_to_object"] == scores["retrieval@1"] == (0.0 if wrong else 1.0)
    assert (scores["phrase_to_object_chance"], scores["retrieval@1_chance"]) == (0.5, 0.2)
