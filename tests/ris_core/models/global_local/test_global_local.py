"""Zero-shot Global-Local against arrays made by the unmodified official code, for a ViT and a ResNet CLIP."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ris_core.errors import ConfigError, DataError
from ris_core.models.answer import choose
from ris_core.models.clip import IMAGE_MEAN, IMAGE_STD, build_clip
from ris_core.models.contract import MapSystem, ProposalSystem
from ris_core.models.global_local import system
from ris_core.models.global_local.system import GlobalLocal, GlobalLocalConfig, ProposalFeatures, TextFeatures
from ris_core.models.global_local.visual import Views, clip_geometry, proposal_boxes
from ris_core.models.proposals import best_proposal

GOLDEN = Path(__file__).parents[3] / "golden"
CPU = torch.device("cpu")
SIZES = {"vit": 64, "rn": 128}


@dataclass
class Fixture:
    """One golden file: the official weights in an open_clip CLIP, and its arrays."""

    family: str
    arrays: Any = field(init=False, repr=False)
    clip: Any = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.arrays = np.load(GOLDEN / f"gl_tiny_{self.family}_A.npz")
        dims = json.loads((GOLDEN / f"gl_tiny_{self.family}_A.json").read_text())
        vision = {
            "image_size": dims["image_resolution"],
            "layers": dims["vision_layers"],
            "width": dims["vision_width"],
        }
        text = {"layers": 2, "width": 64, "heads": 1, "context_length": 20, "vocab_size": 300}
        if self.family == "vit":
            vision["patch_size"] = dims["vision_patch_size"]
        self.clip = build_clip(
            {"embed_dim": dims["embed_dim"], "quick_gelu": True, "vision_cfg": vision, "text_cfg": text}
        )
        weights = {key[3:]: torch.from_numpy(self.arrays[key]).float() for key in self.arrays.files if key[:3] == "sd/"}
        left_out = self.clip.load_state_dict(weights, strict=False)
        assert not left_out.unexpected_keys
        assert all(key.endswith("num_batches_tracked") for key in left_out.missing_keys)

    def __getitem__(self, name: str) -> torch.Tensor:
        return torch.from_numpy(np.asarray(self.arrays[name]))

    def model(self, **options: Any) -> GlobalLocal:
        defaults = {"short_side": 120, "masked_blocks": 2, "noun_phrase": "whole"}  # as the fixtures were made
        return GlobalLocal(self.clip, GlobalLocalConfig(**{**defaults, **options}))

    def encode(self, model: GlobalLocal) -> ProposalFeatures:
        return model.encode_proposals(self.arrays["image_u8"], self.arrays["masks"])

    def texts(self, model: GlobalLocal) -> TextFeatures:
        return TextFeatures(*(model.encode_tokens(self[f"tokens_{name}"].long()) for name in ("sentence", "np")))

    def check(self, got: torch.Tensor, name: str) -> None:
        torch.testing.assert_close(got, self[name], rtol=1e-4, atol=1e-5, msg=lambda text: f"{name}: {text}")


@pytest.fixture(scope="module", params=["vit", "rn"])
def golden(request: pytest.FixtureRequest) -> Fixture:
    return Fixture(request.param)


@pytest.fixture(scope="module")
def vit() -> Fixture:
    return Fixture("vit")


def views_of(golden: Fixture, **options: Any) -> Views:
    size = (SIZES[golden.family],) * 2
    defaults = {"norm_stats": "imagenet", "fill": "official", "box_mode": "freesolo", "antialias": False}
    return Views(golden.arrays["image_u8"], size, short_side=120, device=CPU, **{**defaults, **options})


# Parity with the official code


def test_boxes(golden: Fixture) -> None:
    assert torch.equal(proposal_boxes(golden["masks"], "freesolo"), golden["boxes_int"].long())


@pytest.mark.parametrize("antialias", [False, True])
def test_what_clip_is_shown(golden: Fixture, antialias: bool) -> None:
    views, suffix = views_of(golden, antialias=antialias), "__aa" if antialias else ""
    golden.check(views.grids(golden["masks"], (4, 4)).unflatten(1, (4, 4)), f"masks_resized{suffix}")
    crops = views.crops(golden["masks"])
    if antialias:
        totals = crops.double().sum(dim=(1, 2, 3))
        torch.testing.assert_close(totals, golden["clip_crops_sum__aa"], rtol=1e-4, atol=1e-2)
    else:
        golden.check(views.whole, "clip_image")
        golden.check(crops, "clip_crops")


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("alpha", [0.85, 0.95])
def test_features_scores_and_choice(golden: Fixture, alpha: float, antialias: bool) -> None:
    model, suffix = golden.model(alpha=alpha, antialias=antialias), "__aa" if antialias else ""
    features, texts = golden.encode(model), golden.texts(model)
    golden.check(features.global_context, f"global_features{suffix}")
    golden.check(features.local_context, f"local_features{suffix}")
    golden.check(texts.sentence, "sentence_feature")
    golden.check(texts.phrase, "np_feature")
    golden.check(texts.mix(0.5), "text_feature")
    if not antialias:
        golden.check(features.mix(alpha), f"visual_feature_alpha{alpha}")
    scores = model.score_features(features, texts)
    golden.check(scores.T, f"scores_alpha{alpha}{suffix}")
    best = golden[f"argmax_alpha{alpha}{suffix}"].item()
    assert scores.argmax(dim=1).tolist() == [best]
    choice = choose(golden["masks"].bool(), scores)
    assert torch.equal(choice.masks[0], golden["masks"][int(best)].bool())


@pytest.mark.parametrize(("blocks", "name"), [(3, "global_features_block0"), (1, "global_features_lastblock")])
def test_more_and_fewer_masked_blocks(vit: Fixture, blocks: int, name: str) -> None:
    vit.check(vit.encode(vit.model(masked_blocks=blocks)).global_context, name)


def test_a_mask_of_everything_leaves_a_vit_as_it_is(vit: Fixture) -> None:
    everything = np.ones((1, 75, 100), dtype=bool)
    features = vit.model().encode_proposals(vit.arrays["image_u8"], everything)
    vit.check(features.global_context, "plain_image_feature")


def test_a_vit_that_averages_its_patches_averages_those_of_the_mask() -> None:
    model = tiny({"image_size": 64, "patch_size": 16, "width": 64, "layers": 3, "pool_type": "avg"})
    masks = np.zeros((3, 48, 64), dtype=np.uint8)
    masks[0], masks[1, :24], masks[2, 0, 0] = 1, 1, 1
    features = model.encode_proposals(IMAGE, masks).global_context
    views = Views(
        IMAGE,
        (64, 64),
        short_side=64,
        norm_stats="imagenet",
        fill="zero",
        box_mode="tight",
        antialias=False,
        device=CPU,
    )
    with torch.no_grad():
        torch.testing.assert_close(features[:1], model.clip.visual(views.whole), rtol=1e-4, atol=1e-5)
    assert (features[1] - features[0]).abs().max() > 1e-3
    assert not features[2].any()  # a speck between the samples of the grid


def test_the_upper_bound_of_the_proposals(golden: Fixture) -> None:
    masks, target = golden.arrays["masks"], golden.arrays["gt_mask"][0]
    index, iou = best_proposal(masks, target)
    assert index == golden["upper_bound_index"].item()
    assert iou == pytest.approx(golden["iou_each_proposal"][index].item(), abs=1e-6)


# Switches


def test_no_proposals_per_batch_changes_the_result(golden: Fixture) -> None:
    together = golden.encode(golden.model())
    for count in (1, 2):
        apart = golden.encode(golden.model(proposals_per_batch=count))
        torch.testing.assert_close(apart, together, rtol=1e-5, atol=1e-5)


def test_the_cosine_score_is_one(golden: Fixture) -> None:
    model = golden.model(score="cosine")
    features, texts = golden.encode(model), golden.texts(model)
    want = golden.clip.logit_scale.exp() * F.cosine_similarity(features.mix(0.95), texts.mix(0.5))
    torch.testing.assert_close(model.score_features(features, texts)[0], want.detach())
    official = golden.model().score_features(features, texts)
    assert torch.allclose(official[0], want, atol=1e-4) == (golden.family == "vit")


def test_mixing_weights_choose_their_sides(golden: Fixture) -> None:
    a, b = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    assert torch.equal(ProposalFeatures(*a).mix(1.0), a[0])
    assert torch.equal(ProposalFeatures(*a).mix(0.0), a[1])
    assert torch.equal(TextFeatures(*b).mix(1.0), b[0])
    assert torch.equal(TextFeatures(*b).mix(0.0), b[1])


@pytest.mark.parametrize(
    ("options", "colour"),
    [
        ({"fill": "official"}, [0.485, 0.456, 0.406]),
        ({"fill": "official", "norm_stats": "clip"}, [0.485, 0.456, 0.406]),
        ({"fill": "mean_color"}, [0, 0, 0]),
        ({"fill": "zero"}, [-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225]),
        ({"fill": "zero", "norm_stats": "clip"}, [-m / s for m, s in zip(IMAGE_MEAN, IMAGE_STD, strict=True)]),
    ],
)
def test_what_surrounds_the_object_in_a_crop(vit: Fixture, options: dict[str, str], colour: list[float]) -> None:
    mask = torch.zeros(1, 75, 100, dtype=torch.bool)
    mask[0, 20:60, 20:60] = torch.eye(40, dtype=torch.bool)  # the crop's top right corner is outside
    corner = views_of(vit, box_mode="tight", **options).crops(mask)[0, :, 0, -1]
    torch.testing.assert_close(corner, torch.tensor(colour, dtype=torch.float32))


def test_normalisation_is_of_imagenet_or_clip() -> None:
    image = np.full((20, 30, 3), 255, np.uint8)
    for stats, want in (("imagenet", (1 - 0.485) / 0.229), ("clip", (1 - 0.48145466) / 0.26862954)):
        views = Views(
            image, (8, 8), short_side=20, norm_stats=stats, fill="zero", box_mode="tight", antialias=False, device=CPU
        )
        torch.testing.assert_close(views.whole[0, 0], torch.full((8, 8), want))


def test_boxes_of_masks_at_the_borders() -> None:
    masks = torch.zeros(4, 6, 9, dtype=torch.bool)
    masks[0, 0, 0] = True  # nothing but the first pixel, where the official box is empty
    masks[1, 5, 8] = True
    masks[2] = True
    masks[3, 2, [1, 5]] = True  # with a gap
    assert proposal_boxes(masks, "tight").tolist() == [[0, 0, 1, 1], [8, 5, 9, 6], [0, 0, 9, 6], [1, 2, 6, 3]]
    assert proposal_boxes(masks, "freesolo").tolist() == [[0, 0, 1, 1], [7, 4, 8, 5], [0, 0, 8, 5], [2, 1, 4, 2]]


@pytest.mark.parametrize("short_side", [60, 75, 120])
def test_images_of_any_size_are_taken(vit: Fixture, short_side: int) -> None:
    for shape in ((75, 100), (100, 75), (75, 75)):
        image, masks = np.zeros((*shape, 3), np.uint8), np.ones((2, *shape), np.uint8)
        features = vit.model(short_side=short_side).encode_proposals(image, masks)
        assert features.local_context.shape == (2, 48)


# The system


def tiny(vision: dict[str, Any] | None = None, **options: Any) -> GlobalLocal:
    """A random CLIP with the real vocabulary; a ResNet unless told otherwise."""
    torch.manual_seed(0)
    text = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    vision = vision or {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8}
    clip = build_clip({"embed_dim": 32, "quick_gelu": True, "vision_cfg": vision, "text_cfg": text})
    return GlobalLocal(clip, GlobalLocalConfig(**{"short_side": 64, "noun_phrase": "rules", **options}))


@pytest.fixture(scope="module")
def model() -> GlobalLocal:
    return tiny()


IMAGE = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
MASKS = np.zeros((3, 48, 64), dtype=bool)
MASKS[0, 5:20, 5:20] = MASKS[1, 10:40, 30:60] = MASKS[2, 30:47, 2:60] = True


def test_an_image_is_encoded_once_for_all_expressions(model: GlobalLocal, monkeypatch: pytest.MonkeyPatch) -> None:
    features = model.encode_proposals(IMAGE, MASKS)
    monkeypatch.setattr(model.clip.visual, "forward", None)
    scores = model.score(features, ["a red circle", "square left of the ring"])
    assert scores.shape == (2, 3)
    for row, text in zip(scores, ["a red circle", "square left of the ring"], strict=True):
        torch.testing.assert_close(model.score(features, [text])[0], row, rtol=1e-5, atol=1e-5)
    choice = choose(torch.from_numpy(MASKS), scores)
    assert np.array_equal(choice.masks.numpy(), MASKS[scores.argmax(1).numpy()])


def test_all_texts_go_in_one_batch_and_none_twice(model: GlobalLocal, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = []

    def spy(clip: Any, tokens: torch.Tensor, real: Callable[..., Any] = system.encode_words) -> Any:
        batches.append(tuple(tokens.shape))
        return real(clip, tokens)

    monkeypatch.setattr(system, "encode_words", spy)
    expressions = ["Red circle", "red circle on the left", "star", "red circle"]
    features = model.encode_texts(expressions)
    assert batches == [(3, 7)]  # "red circle", "red circle on the left", "star"; cut to the longest
    assert features.sentence.shape == features.phrase.shape == (4, 32)
    assert torch.equal(features.phrase[0], features.sentence[0])
    assert torch.equal(features.phrase[1], features.sentence[0])
    assert torch.equal(features.sentence[3], features.sentence[0])


def test_texts_longer_than_the_context_are_cut(model: GlobalLocal) -> None:
    long = " ".join(["circle"] * 40)
    assert model.encode_texts([long]).sentence.isfinite().all()


def test_the_template_surrounds_sentence_and_phrase() -> None:
    plain, framed = tiny(), tiny(template="a photo of {}")
    said = framed.encode_texts(["star on the left"])
    meant = plain.encode_texts(["a photo of star on the left", "a photo of star"])
    torch.testing.assert_close(said.sentence[0], meant.sentence[0])
    torch.testing.assert_close(said.phrase[0], meant.sentence[1])


def test_an_image_without_proposals_answers_nothing(model: GlobalLocal) -> None:
    none = MASKS[:0]
    features = model.encode_proposals(IMAGE, none)
    assert features.global_context.shape == (0, 32)
    scores = model.score(features, ["star", "ring"])
    assert scores.shape == (2, 0)
    choice = choose(torch.from_numpy(none), scores)
    assert choice.masks.shape == (2, 48, 64)
    assert not choice.masks.any()


def test_no_expressions_give_no_scores(model: GlobalLocal) -> None:
    assert model.score(model.encode_proposals(IMAGE, MASKS), []).shape == (0, 3)


def test_clip_stays_frozen_and_in_evaluation_mode(model: GlobalLocal) -> None:
    model.train()
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    before = {key: value.clone() for key, value in model.clip.state_dict().items()}
    with torch.autocast("cpu", torch.bfloat16):  # has no effect
        features = model.encode_proposals(IMAGE, MASKS)
        texts = model.encode_texts(["star"])
    torch.testing.assert_close(features, model.encode_proposals(IMAGE, MASKS), rtol=0, atol=0)
    assert texts.sentence.dtype == torch.float32
    after = model.clip.state_dict()
    assert before
    assert all(torch.equal(value, after[key]) for key, value in before.items())


def test_which_noun_phrases_were_used_is_told(model: GlobalLocal) -> None:
    assert model.noun_phrases.backend == "rules"
    assert tiny(noun_phrase="whole").noun_phrases.backend == "whole"
    config = asdict(model.config)
    assert model.facts() == {**config, "noun_phrase": "rules"}
    assert tiny(noun_phrase="auto").facts()["noun_phrase"] in ("rules", "spacy"), "what ran, not what was wished"


def test_it_has_no_weights_of_its_own(model: GlobalLocal) -> None:
    assert dict(model.state_dict()) == {}
    model.load_state_dict({})
    assert issubclass(GlobalLocal, ProposalSystem)
    assert not issubclass(GlobalLocal, MapSystem)


@pytest.mark.parametrize(
    ("image", "masks", "message"),
    [
        (IMAGE.astype(np.float32), MASKS, r"uint8 \(H, W, 3\) RGB; got float32"),
        (IMAGE, MASKS[0], r"bool or uint8 \(N, 48, 64\); got bool \(48, 64\)"),
        (IMAGE, MASKS[:, :, :-1], r"got bool \(3, 48, 63\)"),
        (IMAGE, MASKS.astype(np.float32), "got float32"),
        (IMAGE, MASKS & (np.arange(3) == 1)[:, None, None], r"proposals \[0, 2\] of 3 have no pixel"),
    ],
)
def test_what_cannot_be_encoded_is_refused(model: GlobalLocal, image: Any, masks: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        model.encode_proposals(image, masks)


# Configuration


def test_all_problems_of_a_configuration_are_listed() -> None:
    with pytest.raises(ConfigError) as error:
        GlobalLocalConfig(
            alpha=1.5, beta=-1, masked_blocks=0, short_side=0, norm_stats="coco", fill="red", box_mode="loose",
            score="dot", noun_phrase="textblob", template="x", proposals_per_batch=0,
        )  # fmt: skip
    message = str(error.value)
    assert "11 problems" in message
    assert "norm_stats is 'coco': use one of imagenet, clip" in message
    assert "template is 'x': it must hold one {}" in message


def test_a_clip_that_does_not_fit_is_refused() -> None:
    shallow = {"image_size": 32, "patch_size": 16, "width": 64, "layers": 2}
    with pytest.raises(ConfigError, match="masked_blocks is 3, but this ViT has only 2 blocks"):
        tiny(shallow)
    with pytest.raises(ConfigError, match="this one pools otherwise"):
        tiny({**shallow, "attentional_pool": True}, masked_blocks=1)
    with pytest.raises(ConfigError, match="needs CLIP's own ResNet or ViT, got Linear"):
        clip_geometry(torch.nn.Linear(1, 1), 1)


def test_a_clip_with_another_vocabulary_reads_no_text(vit: Fixture) -> None:
    with pytest.raises(ConfigError, match=r"knows 300 tokens.*OpenAI's vocabulary of 49408"):
        vit.model().encode_texts(["star"])


def test_the_published_models_fit() -> None:
    for name, grid, is_vit in (("ViT-B-32-quickgelu", (7, 7), True), ("RN50-quickgelu", (7, 7), False)):
        with torch.device("meta"):
            visual = build_clip(name).visual
        assert clip_geometry(visual, GlobalLocalConfig().masked_blocks) == ((224, 224), grid, is_vit)
