"""RISCLIP has no official code or weights to compare with: these are the properties that a right one must have."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel

from ris_core.errors import ConfigError, WeightsError
from ris_core.models.clip import build_clip, load_clip
from ris_core.models.contract import MapSystem
from ris_core.models.losses import LossParams, segmentation_loss
from ris_core.models.risclip.frozen_clip import FrozenClip
from ris_core.models.risclip.system import (
    RISCLIP,
    ImageFeatures,
    RISCLIPConfig,
    RISCLIPLocator,
    output_stride,
    patch_target,
)
from ris_core.training.optim import make_optimizer
from ris_core.training.params import TrainParams

SIZE, PATCH, GRID = 32, 8, 4
START, END = 62, 63
CONFIG = RISCLIPConfig(
    cfe_layers=2,
    cfe_dim=32,
    cfe_heads=4,
    adapter_dim=8,
    ske_blocks=2,
    ske_heads=4,
    ske_mlp_ratio=2.0,
    decoder_channels=(16, 8),
    skip_layers=(1, 3),
)
FOCAL_AND_DICE = LossParams(bce_weight=0.0, focal_weight=1.75, dice_weight=1.0)
TOKENS = torch.tensor([[START, 5, END, 0, 0, 0], [START, 9, 7, 8, END, 0], [START, 5, 6, END, 0, 0]])
IMAGES = torch.randn(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
DEPTHS = [(6, 6), (8, 4), (4, 3), (3, 5)]


def tiny_clip(image_layers: int = 4, text_layers: int = 3, **visual: Any) -> Any:
    torch.manual_seed(0)
    vision = {"image_size": SIZE, "layers": image_layers, "width": 48, "patch_size": PATCH, "head_width": 16}
    text = {"context_length": 12, "vocab_size": END + 1, "width": 32, "heads": 2, "layers": text_layers}
    return build_clip({"embed_dim": 32, "quick_gelu": True, "vision_cfg": {**vision, **visual}, "text_cfg": text})


def locator(clip: Any = None, **options: Any) -> RISCLIPLocator:
    return RISCLIPLocator(clip or tiny_clip(), replace(CONFIG, **options))


def risclip(clip: Any = None, **options: Any) -> RISCLIP:
    return RISCLIP(clip or tiny_clip(), replace(CONFIG, **options))


def stirred(model: Any) -> Any:
    """The model as after some training: no branch is a no-op any more."""
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "clip." not in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=random))
    return model


def disc_targets(size: int = SIZE // 2) -> torch.Tensor:
    """uint8 (3, 1, size, size): a square in another corner for each expression."""
    masks = torch.zeros(3, 1, size, size, dtype=torch.uint8)
    half = size // 2
    for n, (row, column) in enumerate([(0, 0), (0, half), (half, half)]):
        masks[n, 0, row : row + half, column : column + half] = 255
    return masks


def clip_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if "clip." in name}


def upsampled(logits: torch.Tensor, size: int) -> torch.Tensor:
    return F.interpolate(logits, (size, size), mode="bilinear", align_corners=False)


def cosine_map(image: torch.Tensor, sentence: torch.Tensor) -> torch.Tensor:
    return F.cosine_similarity(image[:, 1:], sentence[:, None], dim=-1).unflatten(1, (1, GRID, GRID))


# At the start


@pytest.mark.parametrize("depths", DEPTHS)
@pytest.mark.parametrize("adapters", ["late", "v1_full"])
def test_the_first_map_is_clips_own(depths: tuple[int, int], adapters: str) -> None:
    clip = tiny_clip(*depths).eval()
    model = locator(clip, adapters=adapters, logit_scale_init=0.0, logit_bias_init=0.0)  # logits are the cosines
    rows, end = torch.arange(3), TOKENS.argmax(-1)
    length = TOKENS.shape[1]
    with torch.no_grad():
        text = clip.token_embedding(TOKENS) + clip.positional_embedding[:length]
        text = clip.ln_final(clip.transformer(text, attn_mask=clip.attn_mask[:length, :length]))
        image = clip.visual.ln_post(clip.visual.transformer(clip.visual._embeds(IMAGES))) @ clip.visual.proj
        want = cosine_map(image, (text @ clip.text_projection)[rows, end])
        assert torch.equal(model(IMAGES, TOKENS), want)

        padded = F.pad(TOKENS, (0, clip.context_length - length))
        found = clip.visual.forward_intermediates(
            IMAGES, indices=1, output_fmt="NLC", normalize_intermediates=True, output_extra_tokens=True
        )
        tokens = [found["image_intermediates_prefix"][0], found["image_intermediates"][0]]
        public = cosine_map(torch.cat(tokens, dim=1) @ clip.visual.proj, clip.encode_text(padded))
        torch.testing.assert_close(want, public, atol=1e-6, rtol=0)
    torch.testing.assert_close(model(IMAGES, TOKENS), want, atol=1e-6, rtol=0)  # with autograd, by other kernels


def test_the_private_part_of_open_clip_is_what_we_think() -> None:
    clip = tiny_clip(1)
    frozen = FrozenClip(clip, value_only=False)
    found = clip.visual.forward_intermediates(IMAGES, indices=1, output_fmt="NLC")["image_intermediates"][0]
    torch.testing.assert_close(clip.visual.transformer(frozen.embed_image(IMAGES))[:, 1:], found, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("patch", "channels", "stride"), [(8, (16, 8), 2), (8, (16,), 4), (16, (8, 8, 8, 8), 1), (14, (16, 8, 8, 8), 1)]
)
def test_the_first_mask_is_the_map_upsampled(patch: int, channels: tuple[int, ...], stride: int) -> None:
    size = 4 * patch
    options: dict[str, Any] = {"decoder_channels": channels, "skip_layers": tuple(range(1, 1 + len(channels)))}
    model = risclip(tiny_clip(image_size=size, patch_size=patch), **options)
    assert model.stride == model.locator.stride == stride
    images = torch.randn(3, 3, size, size)
    features = model.encode_image(images)
    logits, where = model.segment(features, TOKENS), model.locate(features, TOKENS)
    assert where.shape == (3, 1, GRID, GRID)
    assert torch.equal(logits, upsampled(where, size // stride))
    assert torch.equal(model.locator.segment(features, TOKENS), logits)
    assert torch.equal(model(images, TOKENS), logits)
    assert torch.equal(model.locator(images, TOKENS), where)


def test_strides_of_the_published_sizes() -> None:
    found = {(patch, stages): output_stride(patch, stages) for patch, stages in [(16, 4), (8, 1), (14, 4), (8, 4)]}
    assert found == {(16, 4): 1, (8, 1): 4, (14, 4): 1, (8, 4): 1}


# What is trained, and what is not


def train_steps(model: Any, steps: int, lr: float = 1e-3) -> tuple[list[float], set[str]]:
    """Losses before every AdamW step and after the last, and the names of all that ever had a gradient."""
    optimizer = make_optimizer(model.train(), TrainParams(optimizer="adamw", lr=lr, backbone_lr_multiplier=0.1))
    losses, alive = [], set()
    for _ in range(steps + 1):
        optimizer.zero_grad()
        loss = model.loss(model(IMAGES, TOKENS), disc_targets(), FOCAL_AND_DICE)
        loss.backward()
        alive |= {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
        losses.append(loss.item())
        if len(losses) <= steps:
            optimizer.step()
    return losses, alive


SYSTEMS: dict[str, Any] = {
    "locator": locator,
    "locator with adapters everywhere": lambda clip=None: locator(clip, adapters="v1_full"),
    "locator of values": lambda clip=None: locator(clip, dense="value"),
    "locator without CFE": lambda clip=None: locator(clip, cfe_layers=0),
    "locator without SKE": lambda clip=None: locator(clip, ske_blocks=0),
    "decoder": risclip,
    "joint": lambda clip=None: risclip(clip, joint=True),
    "joint with adapters everywhere": lambda clip=None: risclip(clip, joint=True, adapters="v1_full"),
}


@pytest.mark.parametrize("name", SYSTEMS)
def test_all_that_is_trained_learns_and_clip_stays(name: str) -> None:
    model = SYSTEMS[name](tiny_clip(6, 3))
    before = {key: tensor.clone() for key, tensor in clip_tensors(model).items()}
    locator_before = copy.deepcopy(getattr(model, "locator", model).state_dict())
    losses, alive = train_steps(model, 2)
    assert losses[2] < losses[0]
    trainable = {key for key, p in model.named_parameters() if p.requires_grad}
    assert alive == trainable, f"no gradient: {sorted(trainable - alive)}"
    groups = make_optimizer(model, TrainParams()).param_groups
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    for key, tensor in clip_tensors(model).items():
        assert tensor.grad is None, key
        assert torch.equal(tensor, before[key]), key
    if name == "decoder":
        assert trainable == {key for key, _ in model.named_parameters() if key.startswith("decoder.")}
        assert all(torch.equal(locator_before[key], value) for key, value in model.locator.state_dict().items())


def test_zero_is_exactly_the_last_layer_of_every_branch() -> None:
    zero = {key for key, p in risclip().named_parameters() if "clip." not in key and not p.any() and "weight" in key}
    want = {f"locator.cfe.{n}.{way}_out.1.weight" for n in (0, 1) for way in ("image", "text")}
    want |= {
        f"locator.ske.{n}.{modality}.{part}.weight"
        for n in (0, 1)
        for modality in ("image", "text")
        for part in ("cross_attention.out", "self_attention.out", "mlp.3")
    }
    want |= {
        f"locator.{tower}_adapters.{n}.{place}.up.weight"
        for tower in ("image", "text")
        for n in (0, 1)
        for place in ("after_attention", "after_mlp")
    }
    assert zero == want | {"decoder.head.weight"}


def test_training_modes() -> None:
    model = risclip().train()
    assert model.decoder.training
    assert not any(module.training for module in model.locator.modules())
    joint = risclip(joint=True).train()
    assert joint.locator.cfe.training
    assert not any(module.training for module in joint.locator.clip.modules())
    assert not joint.eval().locator.cfe.training


def test_groups_of_the_optimiser() -> None:
    def rates(model: MapSystem, **options: Any) -> list[tuple[str, float]]:
        groups = make_optimizer(model, TrainParams(optimizer="adam", lr=1e-3, **options)).param_groups
        return [(group["name"], group["lr"]) for group in groups]

    slow: dict[str, Any] = {"backbone_lr_multiplier": 0.5, "positional_embeddings": "backbone"}
    assert rates(locator(), **slow) == [("head", 1e-3)]
    assert rates(risclip()) == [("head", 1e-3)]
    assert rates(risclip(joint=True), backbone_lr_multiplier=0.25) == [("backbone", 2.5e-4), ("head", 1e-3)]


@pytest.mark.parametrize("size", ["ViT-B-16-quickgelu", "ViT-L-14-quickgelu"])
def test_full_size(size: str) -> None:
    large = size.startswith("ViT-L")
    config = RISCLIPConfig(ske_heads=12, skip_layers=(6, 12, 18, 24)) if large else RISCLIPConfig()
    pixels, patch = (560, 14) if large else (640, 16)
    with torch.device("meta"):
        model = RISCLIP(load_clip(size, image_size=pixels), replace(config, joint=True))
        features = model.encode_image(torch.empty(1, 3, pixels, pixels))
        where, skips = model.locator.locate_with_skips(features, torch.zeros(1, 22, dtype=torch.int64))
        logits = model.decoder(where, skips)
    assert where.shape == (1, 1, 40, 40)
    assert features.tokens.shape == (1, 1 + (pixels // patch) ** 2, 1024 if large else 768)
    assert logits.shape == (1, 1, pixels, pixels)

    def millions(*modules: nn.Module) -> float:
        return sum(p.numel() for module in modules for p in module.parameters() if p.requires_grad) / 1e6

    adapters = millions(model.locator.image_adapters, model.locator.text_adapters)
    got = [millions(model.locator.cfe), adapters, millions(model.locator.ske), millions(model.decoder)]
    assert got == pytest.approx([23.7, 2.8, 113.4, 2.45] if large else [20.5, 2.0, 50.5, 2.33], abs=0.05)
    assert millions(model) == pytest.approx(142.3 if large else 75.3, abs=0.05)
    assert millions(model) == pytest.approx(sum(got), abs=1e-4)


# One result, however it is asked for


@pytest.fixture(scope="module")
def trained() -> RISCLIP:
    """Shared by tests that only read it."""
    return stirred(risclip(tiny_clip(6, 3), skip_layers=(2, 6))).eval()


def test_branches_of_the_trained_model_do_something(trained: RISCLIP) -> None:
    with torch.no_grad():
        features = trained.encode_image(IMAGES)
        logits, where = trained.segment(features, TOKENS), trained.locate(features, TOKENS)
        untrained = risclip(tiny_clip(6, 3), skip_layers=(2, 6))
        assert (where - untrained.locate(untrained.encode_image(IMAGES), TOKENS)).abs().max() > 0.1
        assert (logits - upsampled(where, 16)).abs().max() > 0.1
        assert (trained.locate(features, TOKENS[[1, 2, 0]]) - where).abs().max() > 1e-3


def test_several_expressions_of_an_image_equal_one_by_one(trained: RISCLIP) -> None:
    tokens, index = TOKENS[[0, 1, 2, 1]], torch.tensor([1, 0, 1, 1])
    with torch.no_grad():
        features = trained.encode_image(IMAGES[:2])
        assert features.tokens.shape[0] == 2
        assert [skip.shape[0] for skip in features.skips] == [2]  # of two skip layers, one lies before the text
        together = trained.segment(features, tokens, index)
        lengths = (tokens.argmax(-1) + 1).tolist()
        apart = [trained(IMAGES[i, None], tokens[n, None, : lengths[n]]) for n, i in enumerate(index.tolist())]
        torch.testing.assert_close(together, torch.cat(apart), atol=1e-5, rtol=0)
        assert torch.equal(trained(IMAGES[:2], tokens, index), together)


def test_nothing_after_the_end_mark_matters(trained: RISCLIP) -> None:
    with torch.no_grad():
        want = trained(IMAGES, TOKENS)
        for tokens in (TOKENS[:, :5], F.pad(TOKENS, (0, 6))):  # the longest sentence; the whole context
            torch.testing.assert_close(trained(IMAGES, tokens), want, atol=1e-5, rtol=0)
        noise = torch.where(torch.arange(6) > TOKENS.argmax(-1, keepdim=True), 17, TOKENS)
        torch.testing.assert_close(trained(IMAGES, noise), want, atol=1e-5, rtol=0)
        word_changed = TOKENS.clone()
        word_changed[:, 1] = 20
        assert (trained(IMAGES, word_changed) - want).abs().amax(dim=(1, 2, 3)).min() > 1e-4


def test_the_prefix_may_be_kept_in_half_precision(trained: RISCLIP) -> None:
    with torch.no_grad():
        features = trained.encode_image(IMAGES)
        halved = ImageFeatures(features.tokens.half().float(), tuple(skip.half().float() for skip in features.skips))
        got, want = trained.segment(halved, TOKENS), trained.segment(features, TOKENS)
    assert 0 < (got - want).abs().max() < 1e-2


@pytest.mark.parametrize("wanted", ["locator", "risclip"])
def test_bf16_autocast_stays_close_and_answers_in_float32(trained: RISCLIP, wanted: str) -> None:
    model = trained if wanted == "risclip" else trained.locator
    with torch.no_grad():
        want = model(IMAGES, TOKENS)
        with torch.autocast("cpu", torch.bfloat16):
            got = model(IMAGES, TOKENS)
    assert got.dtype == torch.float32
    assert (got - want).square().mean().sqrt() < 0.1 * want.std()


def test_only_what_is_trained_records_gradients() -> None:
    late, full = locator(), locator(adapters="v1_full")
    assert not late.encode_image(IMAGES.clone().requires_grad_()).tokens.requires_grad
    assert full.encode_image(IMAGES).tokens.requires_grad
    second = stirred(risclip(adapters="v1_full"))
    features = second.encode_image(IMAGES)
    assert not features.tokens.requires_grad
    assert not second.locate(features, TOKENS).requires_grad
    assert second.segment(features, TOKENS).requires_grad
    with torch.inference_mode():  # prediction in the same process leaves nothing behind that stops training
        late(IMAGES, TOKENS)
    late(IMAGES, TOKENS).sum().backward()


# Ablations and options


def test_ablations_lack_the_parts_they_switch_off() -> None:
    whole = {key.split(".")[0] for key in locator().state_dict()}
    assert whole == {"cfe", "ske", "image_adapters", "text_adapters", "logit_scale", "logit_bias"}
    lacking = {
        "cfe_layers": (0, {"cfe", "image_adapters", "text_adapters"}),
        "ske_blocks": (0, {"ske"}),
        "adapters": ("none", {"image_adapters", "text_adapters"}),
    }
    for option, (value, parts) in lacking.items():
        model = locator(**{option: value})
        assert {key.split(".")[0] for key in model.state_dict()} == whole - parts
        assert model(IMAGES, TOKENS).shape == (3, 1, GRID, GRID)
    bare = risclip(cfe_layers=0, ske_blocks=0)
    assert set(bare.locator.state_dict()) == {"logit_scale", "logit_bias"}
    assert bare(IMAGES, TOKENS).shape == (3, 1, 16, 16)
    assert len(bare.encode_image(IMAGES).skips) == 2  # the whole image tower needs no text


@pytest.mark.parametrize(("adapters", "image", "text"), [("late", 2, 2), ("v1_full", 4, 3), ("none", 0, 0)])
def test_presets_of_the_adapters(adapters: str, image: int, text: int) -> None:
    model = locator(adapters=adapters)
    assert (len(model.image_adapters), len(model.text_adapters)) == (image, text)


def test_adapters_stand_after_attention_and_after_the_mlp() -> None:
    """Against the equations of a block, with adapters that do something."""
    model = stirred(locator(tiny_clip(3, 2), cfe_layers=0, adapters="v1_full", ske_blocks=0))
    x = model.clip.embed_image(IMAGES)
    for block, adapters in zip(model.clip.clip.visual.transformer.resblocks, model.image_adapters, strict=True):
        for part, place in ((block.attention, "after_attention"), (block.mlp, "after_mlp")):
            x = x + part((block.ln_1 if place == "after_attention" else block.ln_2)(x))
            adapter = adapters.get_submodule(place)
            x = x + adapter.up(F.relu(adapter.down(x)))
    torch.testing.assert_close(model.encode_image(IMAGES).tokens, x, atol=1e-5, rtol=0)


def test_both_directions_of_a_cfe_read_what_came_in() -> None:
    cfe = stirred(locator()).cfe[0]
    image, text, keep = torch.randn(2, 5, 48), torch.randn(2, 6, 32), torch.ones(2, 6, dtype=torch.bool)
    new_image, new_text = cfe(image, text, keep)
    shared_image, shared_text = cfe.image_in(image), cfe.text_in(text)
    want = text + cfe.text_out(cfe.text_attention(shared_text, shared_image))
    assert torch.equal(new_text, want)
    assert torch.equal(new_image, image + cfe.image_out(cfe.image_attention(shared_image, shared_text)))
    reference = nn.MultiheadAttention(32, 4, batch_first=True)
    attention = cfe.image_attention
    weights = {
        "in_proj_weight": torch.cat([attention.query.weight, attention.key_value.weight]),
        "in_proj_bias": torch.cat([attention.query.bias, attention.key_value.bias]),
        "out_proj.weight": attention.out.weight,
        "out_proj.bias": attention.out.bias,
    }
    reference.load_state_dict(weights)
    keep[1, 3:] = False
    want = reference(shared_image, shared_text, shared_text, key_padding_mask=~keep)[0]
    torch.testing.assert_close(attention(shared_image, shared_text, keep), want, atol=1e-5, rtol=0)


def test_keys_are_the_words_up_to_the_end_mark(trained: RISCLIP) -> None:
    seen: list[torch.Tensor] = []
    parts = [*trained.locator.cfe, *trained.locator.ske]
    handles = [part.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[2])) for part in parts]
    trained(IMAGES, TOKENS)
    for handle in handles:
        handle.remove()
    want = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0]], dtype=torch.bool)
    assert len(seen) == 4
    assert all(torch.equal(keep, want) for keep in seen)


def test_the_decoder_uses_the_deepest_features_first_and_no_class_token(trained: RISCLIP) -> None:
    """The stages written out plainly, with the head after the last doubling."""
    decoder = trained.decoder
    where, skips = trained.locator.locate_with_skips(trained.encode_image(IMAGES), TOKENS)
    assert len(skips) == 2
    x = where
    for lateral, stage, tokens in zip(decoder.laterals, decoder.stages, (skips[1], skips[0]), strict=True):
        patches = tokens[:, 1:].transpose(1, 2).unflatten(2, (GRID, GRID))
        side = upsampled(F.conv2d(patches, lateral.weight[:, :, None, None], lateral.bias), x.shape[-1])
        x = upsampled(stage(torch.cat([x, side], dim=1)), 2 * x.shape[-1])
    torch.testing.assert_close(decoder(where, skips), decoder.head(x) + upsampled(where, 16), atol=1e-5, rtol=0)


def test_dense_values_let_every_patch_see_only_itself_in_the_last_block() -> None:
    clip = tiny_clip(1, 1).eval()
    options: dict[str, Any] = {"cfe_layers": 0, "skip_layers": (1,), "decoder_channels": (8,)}
    model = locator(clip, dense="value", **options)
    block = clip.visual.transformer.resblocks[0]
    x = clip.visual._embeds(IMAGES)
    alone = block.ln_1(x).reshape(-1, 1, 48)  # every token a sequence of its own
    x = x + block.attention(alone).view_as(x)
    x = x + block.mlp(block.ln_2(x))
    torch.testing.assert_close(model.encode_image(IMAGES).tokens, x, atol=1e-5, rtol=0)
    assert (locator(clip, **options).encode_image(IMAGES).tokens - x).abs().max() > 1e-3

    deeper = tiny_clip(3, 1)
    before = locator(deeper, cfe_layers=0, skip_layers=(2, 3)).encode_image(IMAGES).skips
    after = locator(deeper, cfe_layers=0, skip_layers=(2, 3), dense="value").encode_image(IMAGES).skips
    assert torch.equal(before[0], after[0])  # all blocks but the last are as they were
    assert not torch.equal(before[1], after[1])


# State


def test_state_dicts_hold_nothing_of_clip() -> None:
    model = stirred(risclip())
    state = model.state_dict()
    assert state
    assert not [key for key in state if "clip" in key]
    assert set(state) == {key for key, _ in model.named_parameters() if "clip." not in key}
    assert not FrozenClip(tiny_clip(), value_only=False).state_dict()

    fresh = risclip()
    clip_before = {key: tensor.clone() for key, tensor in clip_tensors(fresh).items()}
    fresh.load_state_dict(state)
    assert torch.equal(fresh(IMAGES, TOKENS), model(IMAGES, TOKENS))
    assert all(torch.equal(tensor, clip_before[key]) for key, tensor in clip_tensors(fresh).items())
    assert not any(tensor.requires_grad for tensor in clip_tensors(fresh).values())


def test_state_dicts_that_do_not_fit_are_refused() -> None:
    model = risclip()
    state = model.state_dict()
    with pytest.raises(RuntimeError, match=r"Unexpected key.*locator.clip.clip.text_projection"):
        model.load_state_dict({**state, "locator.clip.clip.text_projection": torch.zeros(32, 32)})
    del state["locator.logit_scale"]
    with pytest.raises(RuntimeError, match=r"Missing key.*\"locator.logit_scale\"\.\s*$"):
        model.load_state_dict(state)


def test_the_second_stage_adopts_the_first() -> None:
    first, second = stirred(locator()), risclip()
    second.adopt(first.state_dict())
    features = second.encode_image(IMAGES)
    torch.testing.assert_close(second.locate(features, TOKENS), first(IMAGES, TOKENS), atol=1e-5, rtol=0)
    assert not any(p.requires_grad for p in second.locator.parameters())
    with pytest.raises(WeightsError, match=r"first stage does not fit(?s:.*)missing: image_adapters\.0"):
        second.adopt(locator(cfe_layers=0).state_dict())


def test_copies_share_the_clip() -> None:
    model = stirred(risclip(joint=True))
    clone = copy.deepcopy(model)
    assert clone.locator.clip is model.locator.clip
    assert clone.locator.cfe[0].image_in[1].weight is not model.locator.cfe[0].image_in[1].weight
    assert not [key for key in clone.state_dict() if "clip" in key]
    clone.load_state_dict(model.state_dict())

    average = AveragedModel(model, use_buffers=True)
    average.update_parameters(model)
    assert average.module.locator.clip is model.locator.clip
    assert not [key for key in average.state_dict() if "clip" in key]
    average.load_state_dict(average.state_dict())


# Losses


def test_patch_targets() -> None:
    masks = torch.zeros(5, 1, 16, 16)
    masks[0, 0, :4, :4] = 1  # one cell
    masks[1, 0, :4, :2] = 1  # half a cell
    masks[2, 0, 9, 9] = masks[2, 0, 9, 10] = masks[2, 0, 3, 3] = 1  # vanishes: cell (2, 2) holds most of it
    masks[3, 0, :8, :5] = 1  # two cells, and a quarter of two more
    want = torch.zeros(5, 1, 4, 4)  # the last mask is empty, and stays so
    for n, row, column in [(0, 0, 0), (1, 0, 0), (2, 2, 2), (3, 0, 0), (3, 1, 0)]:
        want[n, 0, row, column] = 1
    assert torch.equal(patch_target(masks, 4), want)
    assert torch.equal(patch_target((masks * 255).byte(), 4), want)
    assert torch.equal(patch_target(masks[:1].repeat(1, 1, 35, 35), 40).unique(), torch.tensor([0.0, 1.0]))


def test_losses_are_those_of_the_map_and_of_the_mask() -> None:
    first, second, target = locator(), risclip(), disc_targets()
    where, logits = first(IMAGES, TOKENS), second(IMAGES, TOKENS)
    want = segmentation_loss(where, patch_target(target, GRID), FOCAL_AND_DICE)
    assert torch.equal(first.loss(where, target, FOCAL_AND_DICE), want)
    assert torch.equal(second.loss(logits, target, FOCAL_AND_DICE), segmentation_loss(logits, target, FOCAL_AND_DICE))


# What is refused


def test_all_contradictions_of_a_configuration_are_listed() -> None:
    with pytest.raises(ConfigError) as error:
        RISCLIPConfig(
            cfe_layers=-1, cfe_heads=7, adapters="some", adapter_dim=0, ske_mlp_ratio=0, dense="all",
            logit_scale_init=5.0, decoder_channels=(12,), skip_layers=(3, 2),
        )  # fmt: skip
    message = str(error.value)
    for part in (
        "10 problems",
        "cfe_layers is -1",
        "cfe_heads is 7: it must divide cfe_dim 512",
        "adapters is 'some': use late or v1_full or none",
        "adapter_dim is 0",
        "ske_mlp_ratio is 0",
        "dense is 'all'",
        "logit_scale_init is 5.0",
        "multiples of 8",
        "as many layers as decoder_channels has stages, 1",
        "ascending order",
    ):
        assert part in message


def test_lists_become_tuples() -> None:
    channels: Any = [16, 8]
    skips: Any = [1, 2]
    config = RISCLIPConfig(decoder_channels=channels, skip_layers=skips)
    assert (config.decoder_channels, config.skip_layers) == ((16, 8), (1, 2))


def test_a_clip_that_does_not_fit_is_refused_with_all_reasons() -> None:
    with pytest.raises(ConfigError) as error:
        locator(tiny_clip(4, 3, image_size=36), cfe_layers=4, skip_layers=(1, 5), ske_heads=5)
    message = str(error.value)
    for part in (
        "4 problems",
        "cfe_layers is 4, but its towers have 4 and 3 layers: use 3 or less",
        "skip_layers is (1, 5), but its image tower has 4 layers",
        "ske_heads is 5: it must divide the width of the shared space, 32",
        "36x36 pixels: use square ones, a multiple of its patch size 8",
    ):
        assert part in message
    with pytest.raises(ConfigError, match="transformer blocks are not CLIP's own"):
        risclip(tiny_clip(qk_norm=True))
    with pytest.raises(ConfigError, match="ModifiedResNet: take a ViT CLIP"):
        risclip(tiny_clip(layers=[1, 1, 1, 1], width=8, image_size=64, head_width=8))


def test_inputs_that_do_not_fit_are_refused() -> None:
    model = risclip()
    with pytest.raises(ConfigError, match="images of 32x40 pixels, but this CLIP's position embedding is for 32x32"):
        model.encode_image(torch.zeros(1, 3, 32, 40))
    with pytest.raises(ConfigError, match="13 tokens a sentence, but this CLIP reads at most 12"):
        model(IMAGES, torch.ones(3, 13, dtype=torch.int64))
