"""LTS: there is no reference implementation to compare with, so its parts are checked against what they claim to be."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ris_core.data.text import END_ID, START_ID
from ris_core.errors import ConfigError, WeightsError
from ris_core.models.clip import IMAGE_MEAN, IMAGE_STD, build_clip, encode_words
from ris_core.models.losses import LossParams
from ris_core.models.lts.encoders import GruSentence, TimmBackbone
from ris_core.models.lts.layers import Fusion, Segmenter, box_coordinates
from ris_core.models.lts.prior import (
    Correlation,
    TransformerLocator,
    gaussian_target,
    mask_target,
    penalty_reduced_focal_loss,
)
from ris_core.models.lts.system import LTS, NOTICE, LTSConfig
from ris_core.training.optim import make_optimizer
from ris_core.training.params import TrainParams
from ris_core.weights import load_strictly

SMALL: dict[str, Any] = {
    "backbone": "clip", "embedding_dim": 8, "gru_dim": 12, "fusion_dim": 24, "dim": 16, "locator_dim": 16,
    "locator_heads": 2, "locator_ffn_dim": 16, "head_dim": 8, "aspp_rates": (1, 2),
}  # fmt: skip
CLIP: dict[str, Any] = {
    "embed_dim": 20,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8},
    "text_cfg": {"context_length": 8, "vocab_size": END_ID + 1, "width": 16, "heads": 2, "layers": 1},
}
TOKENS = torch.tensor([[START_ID, 736, END_ID, 0, 0], [START_ID, 1823, 2149, 9, END_ID], [START_ID, 9, 736, END_ID, 0]])
INDEX = torch.tensor([1, 0, 1])
VARIANTS: list[dict[str, Any]] = [
    {},
    {"prior": "transformer", "coordinates": "xy"},
    {"prior": "none", "coordinates": "none"},
    {"prior_stride": 16, "filter_size": 3, "head": "plain"},
    {"prior_target": "gaussian", "pooling": "attention"},
    {"text": "clip", "detach_prior": True},
    {"text": "clip", "freeze_clip_text": True, "prior": "transformer", "prior_stride": 16},
    {"word_vectors": "clip", "freeze_token_embedding": True, "pooling": "last"},
    {"backbone": "resnet10t"},
]


def small(**options: Any) -> LTS:
    torch.manual_seed(0)
    return LTS(build_clip(CLIP), LTSConfig(**{**SMALL, **options}))


def images(count: int = 2, height: int = 64, width: int = 96) -> torch.Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def model() -> LTS:
    """The smallest default, shared by tests that only read it, with batch norms that have seen something."""
    model = small().train()
    with torch.no_grad():
        for _ in range(3):
            model(images(), TOKENS, INDEX)
    return model.eval()


# The whole model


@pytest.mark.parametrize("options", VARIANTS, ids=lambda options: ",".join(map(str, options.values())) or "default")
def test_every_option_gives_masks_priors_and_gradients(options: dict[str, Any]) -> None:
    model = small(**options).train()
    mask, prior = output = model(images(), TOKENS, INDEX)
    assert mask.shape == (3, 1, 16, 24)
    if options.get("prior") == "none":
        assert prior is None
    else:
        side = 4 if options.get("prior_stride") == 16 else 8
        assert prior.shape == (3, 1, side, side * 3 // 2)
    target = torch.zeros(3, 1, 16, 24, dtype=torch.uint8)
    target[:, :, 4:9, 3:8] = 255
    loss = model.loss(output, target, LossParams(dice_weight=1.0))
    assert loss.ndim == 0
    assert loss.dtype == torch.float32
    loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        assert parameter.grad is None or parameter.grad.isfinite().all(), name
    frozen = {name.split(".")[0] for name, parameter in model.named_parameters() if not parameter.requires_grad}
    has_frozen_text = options.get("freeze_clip_text") or options.get("freeze_token_embedding")
    assert frozen == {"backbone"} - ({"backbone"} if "backbone" in options else set()) | (
        {"text"} if has_frozen_text else set()
    )


def test_full_size_parameter_counts() -> None:
    """The counts of the published design with a vocabulary of CLIP's 49,408 ids."""
    with torch.device("meta"):
        model = LTS(None, LTSConfig())
    fusion, segmenter = model.fusion, model.segmenter
    parts = {
        "backbone": (model.backbone, 40_584_928),
        "embedding": (model.text.token_embedding, 49_408 * 300),
        "GRU": (nn.ModuleList([model.text.ahead, model.text.back]), 2_500_608),
        "C5": (fusion.coarse, 1_050_624),
        "sentence and product": (nn.ModuleList([fusion.sentence, fusion.product]), 1_050_624 + 2_048),
        "C4": (fusion.middle, 263_168),
        "merge at 1/16": (fusion.merge_middle, 787_456),
        "C3": (fusion.fine, 66_048),
        "merge at 1/8": (fusion.merge_fine, 394_240),
        "coordinates": (nn.ModuleList([fusion.map, fusion.coordinates, fusion.norm]), 2_397_184),
        "kernel": (model.locator, 524_801),
        "ASPP": (segmenter.context, 4_139_264),
        "transposed convolution": (segmenter.upsample, 1_049_088),
        "logit": (segmenter.logit, 2_305),
    }
    assert {name: count(part) for name, (part, _) in parts.items()} == {name: n for name, (_, n) in parts.items()}
    assert count(model) == sum(n for _, n in parts.values())
    assert model.backbone.channels == (256, 512, 1024)
    assert model.stride == 4
    assert model.context_length > 77  # a GRU has no limit
    assert small(text="clip").context_length == 8


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("options", [{}, {"backbone": "clip", "text": "clip"}, {"prior": "transformer"}])
def test_full_size_shapes(options: dict[str, Any]) -> None:
    with torch.device("meta"):
        clip = build_clip("RN50-quickgelu") if "text" in options else None
        model = LTS(clip, LTSConfig(**options)).train()
        mask, prior = model(torch.zeros(2, 3, 416, 416), torch.zeros(3, 15, dtype=torch.int64), torch.tensor([0, 1, 1]))
        assert mask.shape == (3, 1, 104, 104)
        assert prior.shape == (3, 1, 52, 52)
        assert model.eval()(torch.zeros(1, 3, 128, 128), torch.zeros(1, 15, dtype=torch.int64))[0].shape[-1] == 32


@pytest.mark.parametrize("options", [{}, {"prior": "transformer"}, {"prior_target": "gaussian"}])
def test_one_batch_can_be_learnt(options: dict[str, Any]) -> None:
    """Two objects in one image, told apart by their sentences alone."""
    model = small(**options, coordinates="none").train()
    image = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    tokens, index = (
        torch.tensor([[START_ID, 5, END_ID], [START_ID, 6, END_ID]]).repeat(2, 1),
        torch.tensor([0, 0, 1, 1]),
    )
    target = torch.zeros(4, 1, 16, 16)
    target[0::2, :, 2:6, 2:6] = 1
    target[1::2, :, 9:14, 8:14] = 1
    optimizer = make_optimizer(model, TrainParams(optimizer="adamw", lr=5e-3, backbone_lr_multiplier=1.0))
    losses = []
    for _ in range(45):
        loss = model.loss(model(image, tokens, index), target, LossParams(dice_weight=1.0))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
    with torch.no_grad():
        mask, prior = model(image, tokens, index)
    assert ((mask > 0) == target.bool()).all(dim=(1, 2, 3)).float().mean() > 0.5
    peaks = prior.flatten(1).argmax(dim=1)
    assert model.prior_target(target).flatten(1).gather(1, peaks[:, None]).min() > 0


def test_the_same_seed_gives_the_same_loss() -> None:
    def loss() -> torch.Tensor:
        model = small().train()
        return model.loss(model(images(), TOKENS, INDEX), torch.ones(3, 1, 16, 24), LossParams())

    assert torch.equal(loss(), loss())


def test_state_dicts_go_out_and_in(model: LTS) -> None:
    torch.manual_seed(7)
    other = LTS(build_clip(CLIP), LTSConfig(**json.loads(json.dumps(asdict(model.config)))))
    load_strictly(other, model.state_dict(), "does not fit")
    with torch.no_grad():
        for got, want in zip(other.eval()(images(), TOKENS, INDEX), model(images(), TOKENS, INDEX), strict=True):
            assert torch.equal(got, want)


def test_several_expressions_of_an_image_equal_one_by_one(model: LTS) -> None:
    with torch.no_grad():
        features = model.encode_image(images())
        together, where = model.segment(features, TOKENS, INDEX), model.locate(features, TOKENS, INDEX)
        for n, i in enumerate(INDEX.tolist()):
            mask, prior = model(images()[i : i + 1], TOKENS[n : n + 1])
            torch.testing.assert_close(together[n : n + 1], mask, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(where[n : n + 1], prior, atol=1e-5, rtol=1e-4)
        mask, prior = model(images(), TOKENS, INDEX)
        assert torch.equal(mask, together)
        assert torch.equal(prior, where)


def test_bf16_autocast_stays_close_and_answers_in_float32(model: LTS) -> None:
    for tried in (model, small(prior="transformer", filter_size=3).eval()):
        with torch.no_grad():
            want = tried(images(), TOKENS, INDEX)
            with torch.autocast("cpu", torch.bfloat16):
                got = tried(images(), TOKENS, INDEX)
        for a, b in zip(got, want, strict=True):
            assert a.dtype == torch.float32
            assert (a - b).square().mean().sqrt() < 0.05 * max(b.std().item(), 1)


def test_channels_last_changes_nothing(model: LTS) -> None:
    turned = copy.deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    with torch.no_grad():
        got = turned(images().contiguous(memory_format=torch.channels_last), TOKENS, INDEX)
        for a, b in zip(got, model(images(), TOKENS, INDEX), strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_prediction_before_training_leaves_nothing_behind() -> None:
    """Constants cached while predicting in inference mode serve a training step in the same process."""
    model = small(prior="transformer")
    with torch.inference_mode():
        model.eval()(images(2, 32, 224), TOKENS, INDEX)
    model.train()(images(2, 32, 224), TOKENS, INDEX)[0].sum().backward()


# Groups of parameters


def test_groups_hold_every_trainable_parameter_once() -> None:
    for options, slow in (({}, {"backbone"}), ({"text": "clip", "freeze_token_embedding": True}, {"backbone", "text"})):
        model = small(**options)
        params = TrainParams(optimizer="adam", lr=1e-3, backbone_lr_multiplier=0.5)
        groups = {group["name"]: group for group in make_optimizer(model, params).param_groups}
        assert {name: group["lr"] for name, group in groups.items()} == {"backbone": 5e-4, "head": 1e-3}
        grouped = [id(parameter) for group in groups.values() for parameter in group["params"]]
        assert len(grouped) == len(set(grouped))
        assert set(grouped) == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        assert {names[id(parameter)].split(".")[0] for parameter in groups["backbone"]["params"]} == slow


def test_positional_embeddings_go_with_the_group_that_is_named() -> None:
    model = small(text="clip")
    for choice in ("head", "backbone"):
        optimizer = make_optimizer(model, TrainParams(optimizer="adam", positional_embeddings=choice))
        groups = {g["name"]: {id(p) for p in g["params"]} for g in optimizer.param_groups}
        assert id(model.text.positional_embedding) in groups[choice]


# Sentences


@pytest.mark.parametrize(
    "options",
    [{"pooling": p} for p in ("mean", "attention", "last")] + [{"text": text} for text in ("clip", "clip_words")],
    ids=str,
)
def test_padding_changes_nothing(options: dict[str, Any]) -> None:
    text = small(**options).text
    with torch.no_grad():
        together = text(F.pad(TOKENS, (0, 3)))
        for n, length in enumerate((3, 5, 4)):
            torch.testing.assert_close(together[n : n + 1], text(TOKENS[n : n + 1, :length]), atol=1e-6, rtol=1e-5)
        assert (together[0] - together[2]).abs().max() > 1e-3


def test_a_clips_sentence_is_its_state_beside_the_sum_of_its_words() -> None:
    model = small(text="clip_words")
    state, words = model.text(TOKENS).split(
        [model.text.text_projection.shape[1], model.text.word_norm.weight.numel()], 1
    )
    torch.testing.assert_close(state, encode_words(model.text, TOKENS)[1])
    reordered = model.text(TOKENS[1:2, [0, 2, 1, 3, 4]])
    torch.testing.assert_close(reordered[:, state.shape[1] :], words[1:2], atol=1e-6, rtol=1e-5)
    assert (reordered[:, : state.shape[1]] - state[1:2]).abs().max() > 1e-4
    table = F.layer_norm(model.text.token_embedding.weight, (words.shape[1],))
    torch.testing.assert_close(words[1], sum(table[token] for token in TOKENS[1].tolist()), atol=1e-6, rtol=1e-5)


def test_the_two_grus_equal_a_packed_bidirectional_one() -> None:
    torch.manual_seed(0)
    ours = GruSentence(nn.Embedding(END_ID + 1, 8, padding_idx=0), 6, "mean")
    packed = nn.GRU(8, 6, batch_first=True, bidirectional=True)
    state = dict(ours.ahead.state_dict())
    packed.load_state_dict(state | {f"{key}_reverse": value for key, value in ours.back.state_dict().items()})
    lengths = torch.tensor([3, 5, 4])
    words = nn.utils.rnn.pack_padded_sequence(
        ours.token_embedding(TOKENS), lengths, batch_first=True, enforce_sorted=False
    )
    states, last = packed(words)
    states = nn.utils.rnn.pad_packed_sequence(states, batch_first=True)[0]
    torch.testing.assert_close(ours(TOKENS), states.sum(dim=1) / lengths[:, None], atol=1e-6, rtol=1e-5)
    ours.pooling = "last"
    torch.testing.assert_close(ours(TOKENS), torch.cat(tuple(last), dim=1), atol=1e-6, rtol=1e-5)


def test_a_sentence_that_is_all_padding_stays_finite() -> None:
    for pooling in ("mean", "attention", "last"):
        assert small(pooling=pooling).text(torch.zeros(2, 5, dtype=torch.int64)).isfinite().all()


# Fusion


def test_coordinates_of_the_first_and_the_last_cell() -> None:
    grid = box_coordinates(52, 52, torch.device("cpu"))[0]
    step = 1 / 52
    first = [-1, -1, -1 + 2 * step, -1 + 2 * step, -1 + step, -1 + step, step, step]
    torch.testing.assert_close(grid[:, 0, 0], torch.tensor(first))
    assert grid[2:4, 51, 51].tolist() == [1, 1]
    torch.testing.assert_close(grid[0], -grid[2].flip(1))
    torch.testing.assert_close(grid[4], -grid[4].flip(1))
    wide = box_coordinates(2, 4, torch.device("cpu"))[0]
    assert wide[4].tolist() == [[-0.75, -0.25, 0.25, 0.75]] * 2
    assert wide[5].tolist() == [[-0.5] * 4, [0.5] * 4]
    assert wide[6:, 0, 0].tolist() == [0.25, 0.5]


@pytest.mark.parametrize("training", [False, True])
def test_fusion_equals_its_plain_form(training: bool) -> None:
    """Upsample, concatenate, convolve: what the split convolutions stand for."""
    torch.manual_seed(0)
    fusion = Fusion((6, 8, 10), 5, 12, 8, "box").train(training)
    levels = torch.randn(3, 6, 8, 12), torch.randn(3, 8, 4, 6), torch.randn(3, 10, 2, 3)
    sentence = torch.randn(3, 5)
    plain = copy.deepcopy(fusion)

    def up(x: torch.Tensor) -> torch.Tensor:
        return x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)

    def weights(*convolutions: nn.Module | None) -> torch.Tensor:
        return torch.cat([convolution.get_parameter("weight") for convolution in convolutions if convolution], dim=1)

    x = plain.product(plain.coarse(levels[2]) * plain.sentence(sentence)[:, :, None, None])
    for merge, lateral in (
        (plain.merge_middle, plain.middle(levels[1])),
        (plain.merge_fine, plain.fine(levels[0])),
    ):
        x = merge.norm(F.conv2d(torch.cat([up(x), lateral], dim=1), weights(merge.below, merge.lateral)))
    grid = box_coordinates(8, 12, x.device).expand(3, -1, -1, -1)
    x = plain.norm(F.conv2d(torch.cat([x, grid], dim=1), weights(plain.map, plain.coordinates), padding=1))
    fused, middle = fusion(fusion.project_image(levels), sentence)
    assert middle.shape == (3, 8, 4, 6)
    torch.testing.assert_close(fused, x, atol=1e-5, rtol=1e-4)


def test_turning_the_image_does_not_turn_the_answer(model: LTS) -> None:
    with torch.no_grad():
        wide, tall = model(images(), TOKENS, INDEX)[0], model(images().transpose(2, 3), TOKENS, INDEX)[0]
    assert (tall - wide.transpose(2, 3)).abs().max() > 1e-3


# The position prior


@pytest.mark.parametrize("size", [1, 3])
def test_filtering_is_a_scaled_correlation_with_the_sentence_kernel(size: int) -> None:
    torch.manual_seed(0)
    correlation = Correlation(5, 8, size)
    nn.init.constant_(correlation.bias, 0.3)
    source, x = torch.randn(2, 5), torch.randn(2, 8, 4, 6)
    kernels = (source @ correlation.kernel.weight.T + correlation.kernel.bias).view(2, 1, 8, size, size)
    want = [F.conv2d(x[n], kernels[n], padding=size // 2) / (8 * size**2) ** 0.5 + 0.3 for n in range(2)]
    torch.testing.assert_close(correlation(source, x), torch.stack(want), atol=1e-5, rtol=1e-5)


def test_the_response_peaks_where_the_map_agrees_with_the_kernel() -> None:
    correlation = Correlation(5, 8, 1)
    source, x = torch.randn(1, 5), torch.zeros(1, 8, 4, 6)
    x[0, :, 2, 3] = correlation.kernel(source)[0].detach()
    assert correlation(source, x).argmax() == 2 * 6 + 3


def test_the_transformer_looks_at_the_map_and_at_places() -> None:
    torch.manual_seed(0)
    locator = TransformerLocator(5, 8, 1, 16, 2, 4, 16)
    sentence, middle, fused = torch.randn(1, 5), torch.randn(1, 8, 4, 6), torch.randn(1, 8, 8, 12)
    first = locator(sentence, middle, fused)
    assert first.shape == (1, 1, 8, 12)
    assert (locator(sentence, torch.randn(1, 8, 4, 6), fused) - first).abs().max() > 1e-3
    assert (locator(sentence, middle.flip(3), fused) - first).abs().max() > 1e-4  # nothing but positions has changed


def test_the_given_prior_takes_the_place_of_the_own_one(model: LTS) -> None:
    target = torch.zeros(3, 1, 16, 24, dtype=torch.uint8)
    target[:, :, 4:8, 4:8] = 255
    with torch.no_grad():
        features = model.encode_image(images())
        own = model.locate(features, TOKENS, INDEX).sigmoid()
        mask = model.segment(features, TOKENS, INDEX)
        torch.testing.assert_close(model.segment(features, TOKENS, INDEX, own), mask, atol=0, rtol=0)
        oracle = model.prior_target(target)
        assert oracle.shape == own.shape
        assert (model.segment(features, TOKENS, INDEX, oracle) - mask).abs().max() > 1e-3
    with pytest.raises(ConfigError, match=r"given to segment is \(3, 1, 16, 24\), here it must be \(3, 1, 8, 12\)"):
        model.segment(features, TOKENS, INDEX, target.float())


def test_a_coarse_prior_is_repeated() -> None:
    model = small(prior_stride=16).eval()
    prior = torch.rand(3, 1, 4, 6)
    with torch.no_grad():
        features = model.encode_image(images())
        fused = model.fusion(features.of(INDEX), model.text(TOKENS))[0]
        repeated = prior.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        want = model.segmenter(fused, repeated)
        torch.testing.assert_close(model.segment(features, TOKENS, INDEX, prior), want, atol=1e-6, rtol=1e-5)


def test_without_a_prior_its_channel_is_zero() -> None:
    model = small(prior="none").eval()
    with torch.no_grad():
        features = model.encode_image(images())
        mask = model.segment(features, TOKENS, INDEX)
        assert torch.equal(mask, model.segment(features, TOKENS, INDEX, torch.zeros(3, 1, 8, 12)))
    with pytest.raises(ConfigError, match="prior = none"):
        model.locate(features, TOKENS, INDEX)


@pytest.mark.parametrize("detach", [False, True])
def test_detaching_keeps_the_mask_loss_from_the_locator(detach: bool) -> None:
    model = small(detach_prior=detach).train()
    mask, _ = model(images(), TOKENS, INDEX)
    mask.square().mean().backward()
    assert (model.locator.correlation.kernel.weight.grad is None) == detach


def test_both_losses_reach_text_and_backbone() -> None:
    terms: list[Callable[[tuple[torch.Tensor, torch.Tensor]], torch.Tensor]] = [lambda o: o[0], lambda o: o[1]]
    for term in terms:
        model = small().train()
        term(model(images(), TOKENS, INDEX)).square().mean().backward()
        for parameter in (model.text.token_embedding.weight, model.backbone.visual.conv1.weight):
            assert parameter.grad.abs().max() > 0


# Targets and losses


def test_the_mask_target_keeps_the_area() -> None:
    target = torch.randint(0, 256, (2, 1, 16, 24), dtype=torch.uint8)
    covered = mask_target(target, 4)
    assert covered.shape == (2, 1, 4, 6)
    torch.testing.assert_close(covered.sum(dim=(2, 3)) * 16, target.sum(dim=(2, 3)) / 255)
    torch.testing.assert_close(mask_target(target / 255, 4), covered)


def test_the_gaussian_target_follows_its_formula() -> None:
    covered = torch.zeros(3, 1, 8, 10)
    covered[0, 0, 2:6, 5:9] = 1  # centroid (3.5, 6.5), which rounds to even
    covered[1, 0, 7, 0] = 0.5  # smaller than the smallest sigma
    got = gaussian_target(covered, 0.25)
    rows, columns = torch.arange(8.0)[:, None], torch.arange(10.0)
    torch.testing.assert_close(got[0, 0], torch.exp(-((rows - 4) ** 2 + (columns - 6) ** 2) / 2))
    torch.testing.assert_close(got[1, 0], torch.exp(-((rows - 7) ** 2 + columns**2) / (2 * 0.5**2)))
    assert (got == 1).sum(dim=(1, 2, 3)).tolist() == [1, 1, 0]
    assert not got[2].any()


def test_the_focal_loss_follows_its_formula() -> None:
    logits = torch.tensor([0.5, -1.0, 2.0])
    p = logits.sigmoid().tolist()
    log = torch.Tensor.log
    target = torch.tensor([1.0, 0.3, 0.0])
    q = [log(torch.tensor(value)).item() for value in (p[0], 1 - p[1], 1 - p[2])]
    want = -((1 - p[0]) ** 2 * q[0] + 0.7**4 * p[1] ** 2 * q[1] + p[2] ** 2 * q[2])
    shaped = logits.view(1, 1, 1, 3), target.view(1, 1, 1, 3)
    assert penalty_reduced_focal_loss(*shaped).item() == pytest.approx(want, rel=1e-5)
    assert penalty_reduced_focal_loss(shaped[0], torch.zeros(1, 1, 1, 3)).isfinite()


def test_the_loss_is_the_masks_plus_the_weighted_priors() -> None:
    mask, prior = torch.randn(2, 1, 16, 16), torch.randn(2, 1, 8, 8)
    target = (torch.rand(2, 1, 16, 16) > 0.7).float()
    own = F.binary_cross_entropy_with_logits(mask, target)
    located = F.binary_cross_entropy_with_logits(prior, F.avg_pool2d(target, 2))
    got = small(prior_weight=0.5).loss((mask, prior), target, LossParams())
    torch.testing.assert_close(got, own + 0.5 * located)
    torch.testing.assert_close(small(prior="none").loss((mask, None), target, LossParams()), own)
    uint8 = small().loss((mask, prior), (target * 255).to(torch.uint8), LossParams())
    torch.testing.assert_close(uint8, own + located)
    centred = small(prior_target="gaussian", prior_weight=2.0)
    wanted = gaussian_target(F.avg_pool2d(target, 2), 0.25)
    torch.testing.assert_close(
        centred.loss((mask, prior), target, LossParams()), own + 2 * penalty_reduced_focal_loss(prior, wanted)
    )


# Backbones and configuration


def test_images_are_renormalised_for_a_timm_backbone() -> None:
    backbone = TimmBackbone("resnet10t", pretrained=False).eval()
    pixels = torch.rand(1, 3, 64, 64)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGE_MEAN, IMAGE_STD))
    imagenet = [torch.tensor(backbone.net.pretrained_cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std")]
    with torch.no_grad():
        for got, want in zip(
            backbone((pixels - mean) / std), backbone.net((pixels - imagenet[0]) / imagenet[1]), strict=True
        ):
            torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_unfit_backbones_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"unknown backbone 'darknet54'.*closest are .*darknet53"):
        LTS(None, LTSConfig(backbone="darknet54"))
    with pytest.raises(ConfigError, match=r"vit_tiny_patch16_224' gives NCHW maps at strides \[16\]"):
        LTS(None, LTSConfig(backbone="vit_tiny_patch16_224"))
    with pytest.raises(ConfigError, match="swin_tiny_patch4_window7_224' gives NHWC maps"):
        LTS(None, LTSConfig(backbone="swin_tiny_patch4_window7_224"))
    with torch.device("meta"), pytest.raises(ConfigError, match="needs a ResNet CLIP such as RN50-quickgelu, got Vis"):
        LTS(build_clip("ViT-B-32-quickgelu"), LTSConfig(backbone="clip"))


def test_pretrained_weights_that_do_not_exist_are_no_silent_random_ones() -> None:
    with torch.device("meta"), pytest.raises(WeightsError, match="no pretrained weights for backbone 'darknet21'"):
        LTS(None, LTSConfig(backbone="darknet21", pretrained=True))


def test_a_clip_that_is_needed_must_be_given() -> None:
    with pytest.raises(ConfigError, match="backbone and text = clip needs a CLIP"):
        LTS(None, LTSConfig(backbone="clip", text="clip"))
    with pytest.raises(ConfigError, match="word_vectors = clip needs a CLIP"):
        LTS(None, LTSConfig(word_vectors="clip"))


def test_all_contradictions_of_a_configuration_are_listed() -> None:
    with pytest.raises(ConfigError) as error:
        LTSConfig(
            backbone="clip", pretrained=True, text="bert", pooling="max", freeze_token_embedding=True,
            freeze_clip_text=True, dim=15, locator_dim=30, locator_layers=0, prior="some", prior_stride=4,
            aspp_rates=(0, 6), gaussian_sigma=0, prior_weight=-1,
        )  # fmt: skip
    message = str(error.value)
    assert "14 problems" in message
    for part in (
        "text is 'bert': use gru or clip",
        "pooling is 'max': use mean or attention or last",
        "prior is 'some': use filtering or transformer or none",
        "prior_stride is 4: use 8 or 16",
        "locator_layers is 0",
        "pretrained is true, but backbone is clip",
        "freeze_token_embedding is true, but the word vectors are learned",
        "freeze_clip_text is true, but text is not clip",
        "dim is 15: use an even number",
        "locator_dim is 30: use a multiple of 4",
        "locator_heads is 8: it must divide locator_dim 30",
        "gaussian_sigma is 0",
        "prior_weight is -1",
        "aspp_rates is (0, 6)",
    ):
        assert part in message
    with pytest.raises(ConfigError, match="word_vectors belongs to text gru"):
        LTSConfig(text="clip", word_vectors="clip")


def test_image_sides_must_be_multiples_of_32(model: LTS) -> None:
    with pytest.raises(ConfigError, match=r"multiples of 32, got \(64, 100\)"):
        model.encode_image(images(1, 64, 100))


def test_the_notice_names_the_patents() -> None:
    for number in ("CN 202011197790.9", "WO 2022/089115", "US 12,608,813", "JP 2023-547917"):
        assert number in NOTICE


def test_the_segmenter_sees_the_prior() -> None:
    torch.manual_seed(0)
    for head in ("aspp", "plain"):
        segmenter = Segmenter(9, 6, head, (1, 2)).eval()
        fused, prior = torch.randn(1, 8, 4, 6), torch.zeros(1, 1, 4, 6)
        assert segmenter(fused, prior).shape == (1, 1, 8, 12)
        assert (segmenter(fused, prior + 1) - segmenter(fused, prior)).abs().max() > 1e-3
