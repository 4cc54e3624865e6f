import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_world import Tiny

from benchmarks import ablations
from benchmarks.ablations import CHANGES, VARIANTS, Budget, Found, build, columns, parse, report_variant, train, varied
from benchmarks.measure import Report
from benchmarks.models import OracleLTS, true_priors
from ris_core.evaluation.metrics import PROTOCOLS, iou
from ris_core.evaluation.queries import queries_of
from ris_core.models.clip import load_saved_clip
from ris_core.training.params import SystemSection

OURS = PROTOCOLS["ours"]


def of(tiny: Tiny, system: str, variant: str) -> SystemSection:
    """The section of a variant in the tiny world, whose RISCLIP is here joint, as it is in params.yaml."""
    section = tiny.params().of(system)
    if system == "risclip":
        section = replace(section, model=replace(section.model, joint=True))
    return varied(section, system, variant)


def made(tiny: Tiny, system: str, variant: str) -> Any:
    """As `measure` does it, with the tiny world's CLIPs."""
    clip = load_saved_clip(tiny.clip_vit if system == "risclip" else tiny.clip)
    torch.manual_seed(0)
    return build(of(tiny, system, variant), system, variant, clip)


@pytest.fixture
def oracle(tiny: Tiny) -> OracleLTS:
    return made(tiny, "lts", "oracle")


def test_the_command_line_names_system_and_variants() -> None:
    args = parse(["lts"])
    assert (args.system, args.dataset, args.steps, args.epochs, args.record) == ("lts", "shapes", None, None, False)
    assert args.only == list(VARIANTS["lts"])
    args = parse(["risclip", "--only", "whole", "decoder_alone", "--steps", "7", "--epochs", "1"])
    assert (args.only, args.steps, args.epochs) == (["whole", "decoder_alone"], 7, 1)


@pytest.mark.parametrize(
    "words",
    [[], ["cris"], ["lts", "--only", "decoder_alone"], ["risclip", "--only", "oracle"], ["lts", "--steps", "0"]],
)
def test_what_there_is_not_is_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(words)
    assert "usage" in capsys.readouterr().err


def test_a_budget_replaces_only_what_it_names(tiny: Tiny) -> None:
    params = replace(tiny.params().lts.train, loader_workers=2)
    assert Budget().of(params) == replace(params, loader_workers=0)
    assert Budget(5).of(params) == replace(params, loader_workers=0, steps_per_epoch=5)
    assert Budget(None, 9).changes() == {"epochs": 9}


@pytest.mark.parametrize(("system", "variant"), [(s, v) for s, variants in CHANGES.items() for v in variants])
def test_every_variant_differs_from_the_whole_and_can_be_built(tiny: Tiny, system: str, variant: str) -> None:
    assert made(tiny, system, variant).config != made(tiny, system, "whole").config


def test_variants_are_trained_as_the_whole_is(tiny: Tiny) -> None:
    whole = of(tiny, "risclip", "whole")
    for variant in VARIANTS["risclip"]:
        varied = of(tiny, "risclip", variant)
        assert (varied.initialise, varied.train) == (whole.initialise, whole.train)


def test_decoder_alone_leaves_the_locator_as_it_is(tiny: Tiny) -> None:
    model = made(tiny, "risclip", "decoder_alone")
    assert {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad} == {"decoder"}


@pytest.mark.parametrize(
    ("variant", "locates"), [("none", False), ("transformer", True), ("gaussian", True), ("oracle", False)]
)
def test_only_what_has_a_prior_of_its_own_locates(tiny: Tiny, variant: str, locates: bool) -> None:
    model = made(tiny, "lts", variant)
    assert model.locates == locates
    assert (model.locator is not None) == locates


def test_the_oracle_trains_exactly_what_the_variant_without_a_prior_does(tiny: Tiny, oracle: OracleLTS) -> None:
    none = made(tiny, "lts", "none").state_dict()
    state = oracle.state_dict()
    assert none.keys() == state.keys()
    assert all(torch.equal(none[name], state[name]) for name in none)


def batch(tiny: Tiny) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, 64, 64, generator=random)
    tokens = torch.tensor([[49406, 736, 49407], [49406, 1746, 49407], [49406, 320, 49407]])
    target = torch.zeros(3, 1, 16, 16, dtype=torch.uint8)
    target[0, :, :8, :8], target[1, :, 8:, 8:], target[2, :, 4:8, 8:] = 255, 255, 255
    return images, tokens, torch.tensor([0, 0, 1]), target


def test_in_training_the_oracle_is_told_the_target(tiny: Tiny, oracle: OracleLTS) -> None:
    images, tokens, index, target = batch(tiny)
    seen = []
    oracle.segmenter.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1]))
    loss = oracle.loss(oracle.train()(images, tokens, index), target, tiny.params().lts.train.loss)
    loss.backward()
    (prior,) = seen
    truth = torch.nn.functional.max_pool2d(target.float() / 255, 2)  # the squares fill whole cells
    assert torch.equal(prior, truth)
    first = oracle.backbone.visual.conv1.weight
    assert first.grad is not None
    assert first.grad.abs().sum() > 0


def test_the_oracles_training_works_under_autocast(tiny: Tiny, oracle: OracleLTS) -> None:
    images, tokens, index, target = batch(tiny)
    with torch.autocast("cpu", torch.bfloat16):
        output = oracle.train()(images, tokens, index)
    assert oracle.loss(output, target, tiny.params().lts.train.loss).isfinite()


def test_given_the_same_prior_oracle_and_lts_segment_alike(tiny: Tiny, oracle: OracleLTS) -> None:
    whole = made(tiny, "lts", "whole").eval()
    oracle.load_state_dict({k: v for k, v in whole.state_dict().items() if not k.startswith("locator.")})
    images, tokens, index, target = batch(tiny)
    prior = oracle.priors = whole.prior_target(target)
    with torch.no_grad():
        features = whole.encode_image(images)
        asked = oracle.eval().segment(features, tokens, index)
        torch.testing.assert_close(asked, whole.segment(features, tokens, index, prior))


def test_in_evaluation_the_oracle_is_told_the_truth_of_each_query(tiny: Tiny, oracle: OracleLTS) -> None:
    store, seen = tiny.store(), []
    oracle.segmenter.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1]))
    columns(oracle, store, 12, OURS, "val", [25, 28])
    queries = queries_of(store, "val", OURS, [25, 28])
    assert torch.equal(torch.cat(seen), true_priors(oracle, store, queries))


def test_the_oracles_prior_answers_nearly_perfectly(tiny: Tiny, oracle: OracleLTS) -> None:
    found = columns(oracle, tiny.store(), 12, OURS, "val", method="locate")
    assert found["right_object"].mean() > 0.9  # all but objects smaller than a cell of the 8 x 8
    assert iou(found["intersection"], found["union"]).mean() > 0.45 > 1.5 * found["random_iou"].mean()  # coarse cells


def test_every_expression_has_the_prior_of_its_own_object(tiny: Tiny, oracle: OracleLTS) -> None:
    store = tiny.store()
    queries = queries_of(store, "val", OURS)
    priors = true_priors(oracle, store, queries)
    assert priors.shape == (len(queries), 1, 8, 8)
    of = {query.ann_id: prior for query, prior in zip(queries, priors, strict=True)}
    assert all(torch.equal(of[query.ann_id], prior) for query, prior in zip(queries, priors, strict=True))
    assert len({prior.numpy().tobytes() for prior in of.values()}) == len(of)


@pytest.mark.parametrize("variant", ["whole", "oracle"])
def test_a_variant_is_trained_and_validated(tiny: Tiny, tmp_path: Path, variant: str) -> None:
    model = made(tiny, "lts", variant)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    weights = train(model, Budget(2, 1).of(tiny.params().lts.train), tiny.store(), tmp_path)
    assert weights.keys() == before.keys()
    assert not torch.equal(weights["segmenter.logit.weight"], before["segmenter.logit.weight"])


def test_rows_stand_beside_a_random_object() -> None:
    report = Report("ablations-lts", {}, {})
    found = Found({"mIoU": 0.5, "oIoU": 0.3}, 0.8, {"mIoU": 0.25, "oIoU": 0.1}, [("the prior alone: mIoU", 0.2, "")])
    report_variant(report, "LTS", found)
    assert [(row.what, row.value) for row in report.rows] == [
        ("LTS: mIoU", 0.5),
        ("LTS: oIoU", 0.3),
        ("  right object", 0.8),
        ("  the prior alone: mIoU", 0.2),
    ]
    assert np.allclose([report.rows[0].ratio, report.rows[1].ratio], [2.0, 3.0])


def test_a_record_is_named_by_its_system(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked = []

    def alone(function: Any, *arguments: Any) -> Found:
        asked.append((function, *arguments))
        return Found({"mIoU": 0.5, "oIoU": 0.3}, 0.8, {"mIoU": 0.25, "oIoU": 0.1}, [])

    monkeypatch.setattr(ablations, "alone", alone)
    args = argparse.Namespace(system="lts", only=["none"], dataset="shapes", steps=3, epochs=None, record=False)
    monkeypatch.setattr(ablations, "parse", lambda: args)
    ablations.main()
    assert asked == [(ablations.measure, "lts", "none", "shapes", Budget(3))]
    assert "ablations-lts: dataset shapes, steps_per_epoch 3" in capsys.readouterr().out
