"""CLIP: architectures, every form of weights with its checks, saving, and the features read from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip.model import CLIP
from safetensors.torch import save_file
from torch import nn

from ris_core.errors import ConfigError, WeightsError
from ris_core.models.clip import (
    IMAGE_MEAN,
    IMAGE_STD,
    build_clip,
    embedded_architectures,
    encode_words,
    input_size,
    load_clip,
    load_saved_clip,
    normalise,
    read_clip_config,
    resnet_feature_maps,
    resolve_architecture,
    save_clip,
    vit_patch_map,
)

SMALL: dict[str, Any] = {
    "embed_dim": 24,
    "quick_gelu": True,
    "vision_cfg": {"layers": [1, 1, 1, 1], "width": 4, "image_size": 64},
    "text_cfg": {"context_length": 12, "vocab_size": 96, "width": 32, "heads": 2, "layers": 2},
}
SMALL_VIT: dict[str, Any] = {  # the grids of ViT-B/16, at a small width
    **SMALL,
    "vision_cfg": {"layers": 2, "width": 16, "head_width": 8, "patch_size": 16, "image_size": 224},
}


@pytest.fixture(scope="module")
def vit() -> CLIP:
    torch.manual_seed(0)
    return build_clip(SMALL_VIT).eval()


@pytest.fixture(scope="module")
def clip() -> CLIP:
    torch.manual_seed(0)
    return build_clip(SMALL).eval()


def same(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


# Architectures


def test_ours_and_those_of_open_clip_are_found_by_name() -> None:
    assert {"tiny_rn", "tiny_vit"} <= set(embedded_architectures())
    assert resolve_architecture("tiny_rn")["quick_gelu"] is True
    assert resolve_architecture("RN50-quickgelu") == open_clip.get_model_config("RN50-quickgelu")


def test_every_embedded_architecture_can_be_built() -> None:
    for name in embedded_architectures():
        with torch.device("meta"):
            model = build_clip(name)
        assert model.vocab_size == 49408


def test_an_unknown_architecture_is_answered_with_close_names() -> None:
    with pytest.raises(ConfigError, match=r"unknown CLIP architecture 'RN50-quikgelu'.*tiny_rn.*RN50-quickgelu"):
        resolve_architecture("RN50-quikgelu")


def test_an_architecture_that_is_not_a_plain_clip_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"missing \['vision_cfg'\], not understood \['custom_text'\]"):
        resolve_architecture({"embed_dim": 8, "text_cfg": {}, "custom_text": True})


# Weights


class Archive(nn.Module):
    """Holds a state dict in the form of OpenAI's files: a scripted module with three numbers beside the weights."""

    def __init__(self, state: dict[str, torch.Tensor], numbers: dict[str, int]) -> None:
        super().__init__()
        for key, value in {**state, **{name: torch.tensor(number) for name, number in numbers.items()}}.items():
            *path, name = key.split(".")
            module: nn.Module = self
            for part in path:
                if not hasattr(module, part):
                    module.add_module(part, nn.Module())
                module = module.get_submodule(part)
            module.register_buffer(name, value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def write(clip: CLIP, form: str, folder: Path) -> Path:
    state = clip.state_dict()
    if form == "safetensors":
        path = folder / "weights.safetensors"
        save_file(state, path)
    elif form == "torchscript":
        path = folder / "RN50.pt"
        numbers = {"input_resolution": 64, "context_length": 12, "vocab_size": 96}
        torch.jit.script(Archive(state, numbers)).save(path)
    elif form == "state dict":
        path = folder / "weights.pt"
        torch.save(state, path)
    else:
        path = folder / "checkpoint.pth"
        torch.save({"epoch": 3, "state_dict": {f"module.{key}": value for key, value in state.items()}}, path)
    return path


@pytest.mark.parametrize("form", ["safetensors", "torchscript", "state dict", "checkpoint"])
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_every_form_of_weights_gives_the_same_model(clip: CLIP, tmp_path: Path, form: str) -> None:
    assert same(load_clip(SMALL, write(clip, form, tmp_path)), clip)


def test_half_precision_files_load_as_float32(clip: CLIP, tmp_path: Path) -> None:
    path = tmp_path / "half.safetensors"
    halves = {key: value.half() if value.is_floating_point() else value for key, value in clip.state_dict().items()}
    save_file(halves, path)
    loaded = load_clip(SMALL, path)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert torch.equal(loaded.text_projection, clip.text_projection.half().float())


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_openai_files_need_quick_gelu(clip: CLIP, tmp_path: Path) -> None:
    path = write(clip, "torchscript", tmp_path)
    with pytest.raises(WeightsError, match=r"trained with QuickGELU, but the architecture computes GELU.*-quickgelu"):
        load_clip({**SMALL, "quick_gelu": False}, path)


def test_tags_are_checked_for_their_activation_before_anything_is_fetched() -> None:
    with pytest.raises(WeightsError, match=r"RN50:openai was trained with QuickGELU.*ending in -quickgelu"):
        load_clip("RN50", "openai")
    with pytest.raises(WeightsError, match=r"laion2b_s34b_b79k was trained with GELU.*without -quickgelu"):
        load_clip("ViT-B-32-quickgelu", "laion2b_s34b_b79k")


def test_a_tag_loads_the_file_it_stands_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from open_clip import pretrained

    tiny = build_clip("tiny_rn")
    path = tmp_path / "tiny.safetensors"
    save_file(tiny.state_dict(), path)
    settings = {"file": str(path), "mean": IMAGE_MEAN, "std": IMAGE_STD, "quick_gelu": True}
    monkeypatch.setitem(pretrained._PRETRAINED, "tiny_rn", {"ours": settings})
    assert same(load_clip("tiny_rn", "ours"), tiny)
    settings["mean"] = (0.5, 0.5, 0.5)
    with pytest.raises(WeightsError, match="expects another image normalisation"):
        load_clip("tiny_rn", "ours")


def test_a_tag_that_cannot_be_fetched_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: Any, **__: Any) -> str:
        raise OSError("offline mode is enabled")

    monkeypatch.setattr("open_clip.pretrained.hf_hub_download", no_network)
    with pytest.raises(
        WeightsError, match=r"(?s)not in the local cache.*offline mode is enabled.*HF_HUB_OFFLINE.*path"
    ):
        load_clip("RN50-quickgelu", "openai")


def test_weights_that_are_not_there_are_named() -> None:
    with pytest.raises(WeightsError, match=r"no CLIP weights 'nowhere/RN50.pt'.*no such file or folder"):
        load_clip(SMALL, "nowhere/RN50.pt")
    with pytest.raises(WeightsError, match=r"'opennai'.*a tag of RN50-quickgelu \(its tags: openai, yfcc15m, cc12m\)"):
        load_clip("RN50-quickgelu", "opennai")


def test_all_misfits_are_listed_at_once(clip: CLIP, tmp_path: Path) -> None:
    state = dict(clip.state_dict())
    del state["ln_final.bias"]
    state["visual.extra"] = torch.zeros(2)
    state["text_projection"] = torch.zeros(32, 7)
    path = tmp_path / "wrong.safetensors"
    save_file(state, path)
    with pytest.raises(WeightsError) as error:
        load_clip(SMALL, path)
    message = str(error.value)
    assert "3 problems" in message
    assert "missing: ln_final.bias [32]" in message
    assert "not part of the model: visual.extra [2]" in message
    assert "text_projection: [32, 7] in the weights, [32, 24] in the model" in message


@pytest.mark.parametrize("name", ["page.pt", "page.safetensors"])
def test_a_file_that_is_no_weights_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text("<html>404</html>")
    with pytest.raises(WeightsError, match=r"page\.\w+ is a saved web page, not weights: it begins '<html>404"):
        load_clip(SMALL, path)
    path.write_bytes(b"\x01\x02\x03")
    with pytest.raises(
        WeightsError, match=r"page\.\w+ is not readable as safetensors, a TorchScript archive or a state dict"
    ):
        load_clip(SMALL, path)


def test_a_pickle_of_code_is_never_run(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save(nn.Linear(2, 2), path)
    with pytest.raises(WeightsError, match=r"torch\.nn\.modules\.linear\.Linear.* is not opened here"):
        load_clip(SMALL, path)


def test_a_file_of_other_things_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "numbers.pt"
    torch.save({"accuracy": 0.5}, path)
    with pytest.raises(WeightsError, match="holds no state dict"):
        load_clip(SMALL, path)


def test_a_whole_training_checkpoint_loads(clip: CLIP, tmp_path: Path) -> None:
    path = tmp_path / "epoch_3.pt"
    optimizer = torch.optim.AdamW(clip.parameters())
    state = {f"module.{key}": value for key, value in clip.state_dict().items()}
    torch.save(
        {"epoch": 3, "name": "run", "state_dict": state, "optimizer": optimizer.state_dict(), "scaler": {}}, path
    )
    assert same(load_clip(SMALL, path), clip)


def test_all_tensors_of_a_model_load_with_its_causal_mask(clip: CLIP, tmp_path: Path) -> None:
    tensors = dict(clip.named_parameters()) | dict(clip.named_buffers())
    assert torch.isneginf(tensors["attn_mask"]).any()
    torch.save(tensors, tmp_path / "all.pt")
    assert same(load_clip(SMALL, tmp_path / "all.pt"), clip)


def test_the_home_folder_may_be_written_short(clip: CLIP, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    save_clip(clip, tmp_path / "clip", SMALL, {})
    assert same(load_clip(SMALL, f"~/{write(clip, 'state dict', tmp_path).name}"), clip)
    assert same(load_clip(SMALL, "~/clip"), clip)
    assert same(load_saved_clip("~/clip"), clip)
    with pytest.raises(WeightsError, match=r"no CLIP weights '~/nowhere\.pt': no such file or folder"):
        load_clip(SMALL, "~/nowhere.pt")


def test_the_names_of_transformers_are_recognised(clip: CLIP, tmp_path: Path) -> None:
    state = {"logit_scale": torch.ones(()), "vision_model.post_layernorm.weight": torch.ones(3)}
    state["text_model.encoder.layers.0.layer_norm1.weight"] = torch.ones(3)
    save_file(state, tmp_path / "model.safetensors")
    torch.save({"state_dict": {f"model.{key}": value for key, value in state.items()}}, tmp_path / "pytorch_model.bin")
    for name in ("model.safetensors", "pytorch_model.bin"):
        with pytest.raises(WeightsError, match=rf"{name} has the names that .*transformers gives.*give open_clip's"):
            load_clip(SMALL, tmp_path / name)


def test_a_folder_that_no_clip_was_saved_in_names_the_weights_files_there(clip: CLIP, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"no saved CLIP in .*clip\.json is missing; run the stage that writes it$"):
        load_clip(SMALL, tmp_path)
    write(clip, "state dict", tmp_path)
    (tmp_path / "README.md").touch()
    with pytest.raises(WeightsError, match=r"writes it, or give a file in it \(weights\.pt\)$"):
        load_clip(SMALL, tmp_path)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("sizes", [{"width": "4"}, {"width": 0}, {"layers": [1]}, {"wide": 4}, {"width": None}])
def test_an_architecture_that_cannot_be_built_is_told(sizes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="no CLIP can be built of"):
        build_clip({**SMALL, "vision_cfg": {**SMALL["vision_cfg"], **sizes}})


# Saving


def test_a_saved_clip_comes_back_with_its_architecture(clip: CLIP, tmp_path: Path) -> None:
    save_clip(clip, tmp_path / "clip", SMALL, {"retrieval": 0.4})
    assert same(load_saved_clip(tmp_path / "clip"), clip)
    assert same(load_clip(SMALL, tmp_path / "clip"), clip)
    assert read_clip_config(tmp_path / "clip")["extra"] == {"retrieval": 0.4}
    assert sorted(path.name for path in (tmp_path / "clip").iterdir()) == ["clip.json", "clip.safetensors"]


def test_saving_twice_gives_the_same_bytes(clip: CLIP, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        save_clip(clip, tmp_path / folder, SMALL, {})
    for name in ("clip.json", "clip.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_half_a_saved_clip_is_never_taken_for_a_whole_one(clip: CLIP, tmp_path: Path) -> None:
    save_clip(clip, tmp_path, SMALL, {})
    weights = tmp_path / "clip.safetensors"
    torch.manual_seed(1)
    save_file(build_clip(SMALL).state_dict(), weights)  # newer weights under an older clip.json
    with pytest.raises(WeightsError, match="checksums differ"):
        load_saved_clip(tmp_path)
    weights.unlink()
    with pytest.raises(WeightsError, match=r"has a clip\.json but no clip\.safetensors"):
        load_saved_clip(tmp_path)
    (tmp_path / "clip.json").unlink()
    with pytest.raises(WeightsError, match=r"no saved CLIP in .*clip\.json is missing"):
        load_saved_clip(tmp_path)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"architecture": None}, "architecture: expected dict, found None"),
        ({"architecture": "RN50"}, "architecture: expected dict, found 'RN50'"),
        ({"architecture": {}}, "embed_dim: missing\n  - vision_cfg: missing\n  - text_cfg: missing"),
        ({"architecture": {**SMALL, "embed_dim": "24"}}, "embed_dim: expected int, found '24'"),
        ({"architecture": {**SMALL, "embed_dim": True}}, "embed_dim: expected int, found True"),
        ({"architecture": {**SMALL, "vision_cfg": []}}, r"vision_cfg: expected dict, found \[\]"),
        ({"architecture": {**SMALL, "quick_gelu": "no"}}, "quick_gelu: expected bool, found 'no'"),
        ({"architecture": {**SMALL, "vision_cfg": {"layers": [1, 1, 1, 1]}}}, "vision_cfg: width missing"),
        ({"weights_sha256": 5, "extra": []}, r"weights_sha256: expected str, found 5\n  - extra: expected dict"),
        (
            {"architecture": {**SMALL, "custom_text": True}},
            r"clip\.json is damaged: .*not understood \['custom_text'\]",
        ),
        ({"architecture": {**SMALL, "text_cfg": {"width": "x"}}}, r"clip\.json is damaged: no CLIP can be built of"),
        ({"architecture": {**SMALL, "embed_dim": 0}}, r"clip\.json is damaged|does not fit"),
    ],
)
def test_a_changed_description_of_a_clip_is_told(
    change: dict[str, Any], problem: str, clip: CLIP, tmp_path: Path
) -> None:
    save_clip(clip, tmp_path, SMALL, {})
    content = json.loads((tmp_path / "clip.json").read_text())
    (tmp_path / "clip.json").write_text(json.dumps({**content, **change}))
    with pytest.raises(WeightsError, match=problem):
        load_saved_clip(tmp_path)
    for key in content:
        (tmp_path / "clip.json").write_text(json.dumps({name: content[name] for name in content if name != key}))
        with pytest.raises(WeightsError, match=rf"clip\.json is damaged \(1 problem\):\n  - {key}: missing"):
            read_clip_config(tmp_path)


@pytest.mark.parametrize("name", ["clip.json", "clip.safetensors"])
def test_a_damaged_file_of_a_saved_clip_is_told(name: str, clip: CLIP, tmp_path: Path) -> None:
    save_clip(clip, tmp_path, SMALL, {})
    whole = (tmp_path / name).read_bytes()
    for content in (b"", whole[: len(whole) // 2], b"access denied", b"version https://git-lfs.github.com/spec/v1\n"):
        (tmp_path / name).write_bytes(content)
        for load in (load_saved_clip, lambda folder: load_clip(SMALL, folder)):
            with pytest.raises(WeightsError, match=rf"^{tmp_path}/{name} is "):
                load(tmp_path)
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    with pytest.raises(WeightsError, match=rf"^{tmp_path}/{name} is a folder"):
        load_saved_clip(tmp_path)


def test_a_saved_clip_of_another_activation_is_refused(clip: CLIP, tmp_path: Path) -> None:
    save_clip(clip, tmp_path, {**SMALL, "quick_gelu": False}, {})
    with pytest.raises(WeightsError, match="trained with GELU"):
        load_clip(SMALL, tmp_path)


def test_the_architecture_survives_json(tmp_path: Path, clip: CLIP) -> None:
    save_clip(clip, tmp_path, SMALL, {})
    assert json.loads((tmp_path / "clip.json").read_text())["architecture"] == SMALL


# Other input sizes


def test_a_vit_at_another_size_is_what_open_clip_makes_of_it(vit: CLIP, tmp_path: Path) -> None:
    from open_clip.model import resize_pos_embed

    path = write(vit, "state dict", tmp_path)
    state = dict(vit.state_dict())
    sized = {**SMALL_VIT, "vision_cfg": {**SMALL_VIT["vision_cfg"], "image_size": 640}}
    expected = build_clip(sized)
    resize_pos_embed(state, expected)
    expected.load_state_dict(state)
    resized = load_clip(SMALL_VIT, path, image_size=640)
    assert same(resized, expected)
    assert resized.visual.positional_embedding.shape == (1 + 40 * 40, 16)
    assert torch.equal(resized.visual.positional_embedding[0], vit.visual.positional_embedding[0]), "the class token's"
    assert resized.visual.grid_size == (40, 40)
    assert input_size(resized) == 640
    # As `force_image_size` of open_clip: bicubic and antialiased.
    grid = vit.visual.positional_embedding[1:].T.unflatten(1, (14, 14))[None]
    smaller = load_clip(SMALL_VIT, path, image_size=96).visual.positional_embedding[1:]
    by_hand = nn.functional.interpolate(grid, (6, 6), mode="bicubic", antialias=True)[0].flatten(1).T
    torch.testing.assert_close(smaller, by_hand)


def test_the_own_size_changes_nothing(vit: CLIP, clip: CLIP, tmp_path: Path) -> None:
    assert same(load_clip(SMALL_VIT, write(vit, "state dict", tmp_path), image_size=224), vit)
    assert input_size(load_clip(SMALL_VIT)) == 224
    assert input_size(clip) == 64


def test_random_weights_are_built_at_the_other_size() -> None:
    assert load_clip(SMALL_VIT, image_size=96).visual.positional_embedding.shape == (1 + 6 * 6, 16)


def test_a_resized_clip_is_saved_with_its_size(vit: CLIP, tmp_path: Path) -> None:
    resized = load_clip(SMALL_VIT, write(vit, "state dict", tmp_path), image_size=96)
    save_clip(resized, tmp_path / "clip", SMALL_VIT, {})
    assert read_clip_config(tmp_path / "clip")["architecture"]["vision_cfg"]["image_size"] == 96
    assert same(load_saved_clip(tmp_path / "clip"), resized)
    assert SMALL_VIT["vision_cfg"]["image_size"] == 224


@pytest.mark.parametrize(("size", "following"), [(100, 112), (0, 16), (-16, 16)])
def test_sizes_are_whole_patches(size: int, following: int) -> None:
    with pytest.raises(
        ConfigError, match=rf"image size {size} is not a multiple of .* 16; the next one is {following}"
    ):
        load_clip(SMALL_VIT, image_size=size)


def test_only_a_vit_can_be_resized() -> None:
    with pytest.raises(
        ConfigError, match=r"image size 96: only a plain ViT.* its own \(64\).* ResNet .*leave the image"
    ):
        load_clip(SMALL, image_size=96)
    timm = {**SMALL, "vision_cfg": {"timm_model_name": "convnext_base", "image_size": 224}}
    with pytest.raises(ConfigError, match=r"this architecture's visual tower is a convnext_base"):
        load_clip(timm, image_size=96)


def test_images_are_square() -> None:
    wide = {**SMALL_VIT, "vision_cfg": {**SMALL_VIT["vision_cfg"], "image_size": [32, 48]}}
    with pytest.raises(ConfigError, match="reads images of 32x48 pixels; only square ones"):
        input_size(build_clip(wide))


# Features


def test_normalised_pixels_are_those_of_clip() -> None:
    images = torch.randint(0, 256, (2, 3, 5, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = torch.tensor(IMAGE_MEAN).view(3, 1, 1), torch.tensor(IMAGE_STD).view(3, 1, 1)
    torch.testing.assert_close(normalise(images), (images / 255 - mean) / std, atol=2e-6, rtol=0)
    assert normalise(images.to(memory_format=torch.channels_last)).is_contiguous(memory_format=torch.channels_last)


def test_feature_maps_lead_to_the_image_embedding(clip: CLIP) -> None:
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        c3, c4, last = resnet_feature_maps(clip.visual, images)
        assert (c3.shape, c4.shape, last.shape) == ((2, 32, 8, 8), (2, 64, 4, 4), (2, 128, 2, 2))
        torch.testing.assert_close(clip.visual.attnpool(last), clip.encode_image(images))


def test_the_map_of_a_vit_is_its_projected_patch_tokens(vit: CLIP) -> None:
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    pooled, patches = vit_patch_map(vit.visual, images)
    assert patches.shape == (2, 24, 14, 14)
    assert patches.requires_grad
    tokens = vit.visual.transformer(vit.visual._embeds(images))
    expected = (vit.visual.ln_post(tokens) @ vit.visual.proj)[:, 1:]  # rows before columns, without the class token
    torch.testing.assert_close(patches.flatten(2).transpose(1, 2), expected)
    torch.testing.assert_close(pooled, vit.encode_image(images))


def test_words_and_state_agree_with_the_whole_text_encoder(clip: CLIP) -> None:
    tokens = torch.zeros(2, 12, dtype=torch.int64)
    tokens[0, :5] = torch.tensor([94, 3, 9, 20, 95])
    tokens[1, :3] = torch.tensor([94, 7, 95])
    with torch.no_grad():
        words, state = encode_words(clip, tokens)
        torch.testing.assert_close(state, clip.encode_text(tokens))
        short_words, short_state = encode_words(clip, tokens[:, :5])
    assert words.shape == (2, 12, 32)
    torch.testing.assert_close(short_words, words[:, :5])
    torch.testing.assert_close(short_state, state)


def test_too_many_tokens_are_refused(clip: CLIP) -> None:
    with pytest.raises(ConfigError, match="13 tokens a sentence, but this CLIP reads at most 12"):
        encode_words(clip, torch.ones(1, 13, dtype=torch.int64))
