"""CRIS against arrays made by the unmodified official code, at tolerances a little above that code's own noise."""

from __future__ import annotations

import copy
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ris_core.errors import ConfigError, WeightsError
from ris_core.models.clip import build_clip, encode_words, resnet_feature_maps, resolve_architecture
from ris_core.models.cris.layers import spatial_attention_pool, with_coordinates
from ris_core.models.cris.system import CRIS, CRISConfig, infer_dimensions
from ris_core.models.layers import dynamic_conv3x3, position_line, position_map
from ris_core.training.optim import make_optimizer
from ris_core.training.params import TrainParams

GOLDEN = Path(__file__).parents[3] / "golden"
ARRAYS = np.load(GOLDEN / "cris_tiny_A.npz")
OFFICIAL = {key.removeprefix("sd/"): torch.from_numpy(ARRAYS[key]) for key in ARRAYS.files if key.startswith("sd/")}
OFFICIAL_GROUP = {"backbone": "backbone", "positions": "head", "head": "head"}  # of each role
CPU = torch.device("cpu")


def golden(name: str) -> torch.Tensor:
    return torch.from_numpy(ARRAYS[name])


def official_model() -> CRIS:
    """The fixture's model as the paper trains it: nothing frozen; the fixture was made without dropout."""
    model = CRIS.from_official_state_dict(OFFICIAL, num_heads=4, dropout=0.0)
    model.backbone.logit_scale.requires_grad_(True)
    return model


@pytest.fixture(scope="module")
def model() -> CRIS:
    """Shared by tests that only read it."""
    return official_model().eval()


def loss_of(logits: torch.Tensor) -> torch.Tensor:
    return F.binary_cross_entropy_with_logits(logits, golden("mask_down"))


# Parity with the official code


def test_logits_in_evaluation(model: CRIS) -> None:
    with torch.no_grad():
        logits = model(golden("image"), golden("word"))
        torch.testing.assert_close(logits, golden("logits_eval"), atol=1e-4, rtol=0)
        in_channels_last = golden("image").contiguous(memory_format=torch.channels_last)
        again = copy.deepcopy(model).to(memory_format=torch.channels_last)(in_channels_last, golden("word"))  # type: ignore[call-overload]
        torch.testing.assert_close(again, golden("logits_eval"), atol=1e-4, rtol=0)


def test_intermediates(model: CRIS) -> None:
    with torch.no_grad():
        c3, c4, last = resnet_feature_maps(model.backbone.visual, golden("image"))
        c5 = spatial_attention_pool(model.backbone.visual.attnpool, last)
        words, state = encode_words(model.backbone, golden("word"))
        fused = model.neck(model.encode_image(golden("image")), state)
        decoded = model.decoder(fused, words, golden("word") != 0)
    got = {"vis_c3": c3, "vis_c4": c4, "vis_c5": c5, "word_feat": words, "state": state, "neck_out": fused}
    for name, tensor in {**got, "decoder_out": decoded.flatten(2)}.items():
        torch.testing.assert_close(tensor[:1], golden(f"inter/{name}"), atol=1e-4, rtol=1e-4, msg=f"{name} differs")
    torch.testing.assert_close(position_map(128, 8, 8, CPU), golden("inter/vis_pos"), atol=1e-6, rtol=0)
    torch.testing.assert_close(position_line(128, 12, CPU), golden("inter/txt_pos"), atol=1e-6, rtol=0)


def test_one_training_step_forward_and_backward() -> None:
    model = official_model().train()
    logits = model(golden("image"), golden("word"))
    torch.testing.assert_close(logits, golden("logits_train"), atol=1e-3, rtol=0)
    assert torch.equal(F.interpolate(golden("mask"), logits.shape[-2:], mode="nearest"), golden("mask_down"))
    loss = loss_of(logits)
    assert loss.item() == pytest.approx(float(ARRAYS["loss_train"]), rel=1e-5)

    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    expected = dict(zip(ARRAYS["param_names"].tolist(), ARRAYS["grad_norm"].tolist(), strict=True))
    assert gradients.keys() == expected.keys()
    assert [name for name, gradient in gradients.items() if gradient is None] == ["backbone.logit_scale"]
    for name, norm in expected.items():
        gradient = gradients[name]
        if gradient is not None and norm > 1e-4:
            assert gradient.norm().item() == pytest.approx(norm, rel=1e-3), name
    full = [key.removeprefix("grad/") for key in ARRAYS.files if key.startswith("grad/")]
    assert len(full) == 5
    for name in full:
        want, got = golden(f"grad/{name}"), gradients[name]
        assert got is not None
        assert (got - want).norm() < 1e-3 * want.norm(), name

    state = model.state_dict()
    for key in (key for key in ARRAYS.files if key.startswith("after_train/")):
        torch.testing.assert_close(state[key.removeprefix("after_train/")], golden(key), atol=1e-5, rtol=1e-5)
    sums = dict(
        zip(ARRAYS["after_train_buffer_names"].tolist(), ARRAYS["after_train_buffer_sums"].tolist(), strict=True)
    )
    assert len(sums) == 114
    for name, total in sums.items():
        assert state[name].double().sum().item() == pytest.approx(total, rel=1e-5, abs=1e-4), name


@pytest.mark.parametrize(("name", "multiplier"), [("lr1e5_1e4", 0.1), ("lr1e4_1e4", 1.0)])
def test_one_adam_step(name: str, multiplier: float) -> None:
    model = official_model().train()
    params = TrainParams(optimizer="adam", lr=1e-4, backbone_lr_multiplier=multiplier, weight_decay=0.0)
    optimizer = make_optimizer(model, params)
    loss_of(model(golden("image"), golden("word"))).backward()
    optimizer.step()
    loss = loss_of(model(golden("image"), golden("word")))
    assert loss.item() == pytest.approx(float(ARRAYS[f"loss_train_after_1_adam_step_{name}"]), abs=1e-4)
    with torch.no_grad():
        logits = model.eval()(golden("image"), golden("word"))
    torch.testing.assert_close(logits, golden(f"logits_eval_after_1_adam_step_{name}"), atol=3e-3, rtol=0)


@pytest.mark.parametrize(
    ("architecture", "keys", "parameters"),
    [("RN50-quickgelu", "cris_r50_keys.txt", 146_849_122), ("RN101-quickgelu", "cris_r101_keys.txt", 161_251_682)],
)
def test_full_size_keys_shapes_and_groups(architecture: str, keys: str, parameters: int) -> None:
    with torch.device("meta"):
        model = CRIS(build_clip(architecture), CRISConfig(freeze_logit_scale=False))
    named = dict(model.named_parameters())
    state = model.state_dict()
    got = {
        key: (list(value.shape), value.dtype, f"{OFFICIAL_GROUP[model.role(key)]}-lr" if key in named else "buffer")
        for key, value in state.items()
    }
    rows = [line.split("\t") for line in (GOLDEN / keys).read_text().splitlines() if not line.startswith("#")]
    assert got == {key: (json.loads(shape), getattr(torch, dtype), kind) for key, shape, dtype, kind in rows}
    assert sum(parameter.numel() for parameter in named.values()) == parameters
    assert Counter(OFFICIAL_GROUP[role] for role, _ in model.trained()) == {"backbone": len(named) - 124, "head": 124}

    found, dims = infer_dimensions(state)
    assert CRISConfig(**dims) == CRISConfig()
    want = resolve_architecture(architecture)
    del want["vision_cfg"]["patch_size"]
    assert found == want


# Official state dicts


def test_state_dicts_go_out_as_they_came_in() -> None:
    prefixed = {f"module.{key}": value for key, value in OFFICIAL.items()}
    out = CRIS.from_official_state_dict(prefixed, num_heads=4).official_state_dict()
    assert out.keys() == OFFICIAL.keys()
    assert all(torch.equal(out[key], OFFICIAL[key]) for key in out)


def test_keys_of_another_model_are_refused_with_all_that_is_missing() -> None:
    with pytest.raises(WeightsError) as error:
        CRIS.from_official_state_dict({"backbone.ln_final.weight": torch.zeros(64), "fc.weight": torch.zeros(2, 2)})
    message = str(error.value)
    assert "not a CRIS state dict" in message
    assert "decoder.layers.0.norm1.weight" in message
    assert "neck.f1_v_proj.0.weight" in message
    assert "backbone.ln_final.weight" not in message


def test_misfits_of_a_cris_state_dict_are_listed_at_once() -> None:
    state = dict(OFFICIAL)
    del state["proj.vis.4.bias"]
    state["extra"] = torch.zeros(1)
    state["neck.aggr.0.weight"] = torch.zeros(128, 5, 1, 1)
    with pytest.raises(WeightsError) as error:
        CRIS.from_official_state_dict(state, num_heads=4)
    message = str(error.value)
    assert "3 problems" in message
    assert "missing: proj.vis.4.bias [64]" in message
    assert "not part of the model: extra [1]" in message
    assert "neck.aggr.0.weight: [128, 5, 1, 1] in the weights, [128, 384, 1, 1] in the model" in message


def test_a_state_dict_that_contradicts_itself_is_a_weights_error() -> None:
    state = {**OFFICIAL, "decoder.norm.weight": torch.zeros(96)}
    with pytest.raises(WeightsError, match=r"(?s)contradict each other.*second entry must equal vis_dim 96"):
        CRIS.from_official_state_dict(state, num_heads=4)


# What CRIS is used for


def test_several_expressions_of_an_image_equal_one_by_one(model: CRIS) -> None:
    images = torch.randn(2, 3, 96, 160, generator=torch.Generator().manual_seed(0))  # not square
    tokens, index = golden("word")[[0, 1, 2, 1]], torch.tensor([1, 0, 1, 1])
    with torch.no_grad():
        together = model.segment(model.encode_image(images), tokens, index)
        apart = [model(images[i : i + 1], tokens[n : n + 1]) for n, i in enumerate(index.tolist())]
        assert together.shape == (4, 1, 24, 40)
        torch.testing.assert_close(together, torch.cat(apart), atol=1e-4, rtol=0)
        torch.testing.assert_close(model(images, tokens, index), together, atol=0, rtol=0)


def test_text_cut_to_the_longest_sentence_changes_nothing(model: CRIS) -> None:
    with torch.no_grad():
        short = model(golden("image")[1:], golden("word")[1:, :7])
    torch.testing.assert_close(short, golden("logits_eval")[1:], atol=1e-4, rtol=0)


def test_turning_the_image_does_not_turn_the_answer(model: CRIS) -> None:
    """Height and width are told apart everywhere: a transposed image is not a transposed prediction."""
    image = golden("image")[:1, :, :96]
    with torch.no_grad():
        tall, wide = model(image.transpose(2, 3), golden("word")[:1]), model(image, golden("word")[:1])
    assert tall.shape == wide.transpose(2, 3).shape
    assert (tall - wide.transpose(2, 3)).abs().max() > 0.1


def test_bf16_autocast_stays_close_and_answers_in_float32(model: CRIS) -> None:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = model(golden("image"), golden("word"))
    assert logits.dtype == torch.float32
    assert (logits - golden("logits_eval")).square().mean().sqrt() < 0.1  # std of the logits is 2.6


def tiny(**options: Any) -> CRIS:
    torch.manual_seed(0)
    config: dict[str, Any] = {"vis_dim": 64, "fpn_out": (32, 64, 48), "num_layers": 2, "num_heads": 4, "ffn_dim": 64}
    return CRIS(build_clip("tiny_rn"), CRISConfig(**{**config, **options}))


@pytest.mark.parametrize("coord_levels", ["aggregate", "all"])
def test_gradients_reach_all_that_is_trainable(coord_levels: str) -> None:
    model = tiny(coord_levels=coord_levels).train()
    tokens = torch.tensor([[49406, 736, 49407, 0], [49406, 1823, 2149, 49407], [49406, 9, 49407, 0]])
    logits = model(torch.randn(2, 3, 64, 96), tokens, torch.tensor([0, 0, 1]))
    assert logits.shape == (3, 1, 16, 24)
    logits.square().mean().backward()
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert set(dict(model.named_parameters())) - set(trainable) == {"backbone.logit_scale"}
    for name, parameter in trainable.items():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_frozen_parts_are_left_out_of_the_groups() -> None:
    model = tiny(freeze_token_embedding=True)
    params = TrainParams(optimizer="adam", lr=1e-3, backbone_lr_multiplier=0.5)
    groups = {group["name"]: group for group in make_optimizer(model, params).param_groups}
    assert {name: group["lr"] for name, group in groups.items()} == {"backbone": 5e-4, "head": 1e-3}
    grouped = [id(parameter) for group in groups.values() for parameter in group["params"]]
    frozen = {id(model.backbone.token_embedding.weight), id(model.backbone.logit_scale)}
    assert set(grouped) == {id(parameter) for parameter in model.parameters()} - frozen
    assert len(grouped) == len(set(grouped))


def test_positional_embeddings_go_with_the_group_that_is_named() -> None:
    model = tiny()
    embeddings = {id(model.backbone.positional_embedding), id(model.backbone.visual.attnpool.positional_embedding)}
    for choice, other in (("head", "backbone"), ("backbone", "head")):
        optimizer = make_optimizer(model, TrainParams(optimizer="adam", positional_embeddings=choice))
        groups = {g["name"]: {id(p) for p in g["params"]} for g in optimizer.param_groups}
        assert embeddings <= groups[choice]
        assert not embeddings & groups[other]


def test_rounding_to_fp16_touches_what_the_official_builder_rounds() -> None:
    plain, rounded = tiny().state_dict(), tiny(round_fp16=True).state_dict()
    for key in (
        "backbone.visual.conv1.weight",
        "backbone.text_projection",
        "backbone.visual.attnpool.connect.0.weight",
    ):
        assert torch.equal(rounded[key], plain[key].half().float()), key
        assert not torch.equal(rounded[key], plain[key]), key
    for key in ("backbone.positional_embedding", "backbone.token_embedding.weight", "proj.txt.weight"):
        assert torch.equal(rounded[key], plain[key]), key


def test_prediction_before_training_leaves_nothing_behind() -> None:
    """Constants cached while predicting in inference mode serve a training step in the same process."""
    model, images, tokens = tiny(), torch.randn(2, 3, 32, 224), torch.tensor([[49406, 736, 49407]] * 2)
    with torch.inference_mode():
        model.eval()(images, tokens)
    model.train()(images, tokens).sum().backward()
    assert model.neck.get_parameter("coordconv.0.conv1.0.weight").grad is not None


def test_coordinates_at_every_level_are_no_official_model() -> None:
    with pytest.raises(ConfigError, match="no official counterpart"):
        tiny(coord_levels="all").official_state_dict()


# Parts


def test_coordinates_run_along_the_right_axes() -> None:
    out = with_coordinates(torch.zeros(1, 5, 2, 3))
    assert out.shape == (1, 7, 2, 3)
    assert out[0, 5].tolist() == [[-1, 0, 1], [-1, 0, 1]]
    assert out[0, 6].tolist() == [[-1, -1, -1], [1, 1, 1]]


def test_positions_encode_the_column_first() -> None:
    places = position_map(8, 2, 3, CPU).view(2, 3, 8)
    line = position_line(4, 3, CPU)
    for row in range(2):
        for column in range(3):
            assert places[row, column].tolist() == [*line[column].tolist(), *line[row].tolist()]


def test_attention_pool_resizes_positions_as_interpolate_does(model: CRIS) -> None:
    pool = model.backbone.visual.attnpool
    features = torch.randn(2, 128, 3, 5, generator=torch.Generator().manual_seed(0))
    grid = pool.positional_embedding[1:].unflatten(0, (3, 3)).permute(2, 0, 1)[None]
    places = F.interpolate(grid, (3, 5), mode="bicubic", align_corners=False)
    x = (features + places).flatten(2).permute(2, 0, 1)
    attended, _ = F.multi_head_attention_forward(
        x, x, x, 128, pool.num_heads, None, torch.cat([pool.q_proj.bias, pool.k_proj.bias, pool.v_proj.bias]),
        None, None, False, 0.0, pool.c_proj.weight, pool.c_proj.bias, need_weights=False, use_separate_proj_weight=True,
        q_proj_weight=pool.q_proj.weight, k_proj_weight=pool.k_proj.weight, v_proj_weight=pool.v_proj.weight,
    )  # fmt: skip
    want = F.relu(attended.permute(1, 2, 0).unflatten(2, (3, 5)) + pool.connect(features))
    torch.testing.assert_close(spatial_attention_pool(pool, features), want, atol=1e-5, rtol=1e-4)


def test_the_dynamic_convolution_equals_a_grouped_one() -> None:
    random = torch.Generator().manual_seed(0)
    shapes = {"x": (3, 16, 5, 7), "kernel": (3, 8, 9), "bias": (3, 1)}
    given = {name: torch.randn(shape, generator=random, requires_grad=True) for name, shape in shapes.items()}
    last = nn.Conv2d(16, 8, 1)
    matrix, shift = last.get_parameter("weight"), last.get_parameter("bias")
    weight, offset = matrix.flatten(1).T @ given["kernel"], shift @ given["kernel"]
    got = dynamic_conv3x3(given["x"], weight, offset, given["bias"])
    grouped = F.conv2d(
        last(given["x"]).reshape(1, 24, 5, 7),
        given["kernel"].unflatten(2, (3, 3)),
        given["bias"][:, 0],
        padding=1,
        groups=3,
    )
    torch.testing.assert_close(got, grouped.transpose(0, 1), atol=1e-5, rtol=1e-5)

    upstream = torch.randn(got.shape, generator=random)
    inputs = [*given.values(), matrix, shift]
    ours = torch.autograd.grad(got, inputs, upstream)
    theirs = torch.autograd.grad(grouped.transpose(0, 1), inputs, upstream)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


# Configuration


def test_all_contradictions_of_a_configuration_are_listed() -> None:
    with pytest.raises(ConfigError) as error:
        CRISConfig(vis_dim=90, fpn_out=(8, 16, 32), num_layers=0, dropout=1.0, coord_levels="some")
    message = str(error.value)
    for part in (
        "second entry must equal vis_dim 90",
        "multiple of 4",
        "num_heads is 8",
        "num_layers is 0",
        "dropout is 1.0",
    ):
        assert part in message
    assert "coord_levels is 'some'" in message


def test_a_clip_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="vis_dim is 512, but the CLIP's text is 64 wide"):
        CRIS(build_clip("tiny_rn"), CRISConfig())
    with (
        torch.device("meta"),
        pytest.raises(ConfigError, match="needs a ResNet CLIP such as RN50-quickgelu, got Vision"),
    ):
        CRIS(build_clip("ViT-B-32-quickgelu"), CRISConfig())


def test_image_sides_must_be_multiples_of_32(model: CRIS) -> None:
    with pytest.raises(ConfigError, match=r"multiples of 32, got \(96, 100\)"):
        model.encode_image(torch.zeros(1, 3, 96, 100))
