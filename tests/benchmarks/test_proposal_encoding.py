from dataclasses import replace
from itertools import islice

import pytest
import torch

from benchmarks import global_local
from benchmarks.global_local import CASES, Found, case, largest_difference, photograph, report_case, scenes
from benchmarks.measure import Report, Timing
from ris_core.models.proposals import felzenszwalb


def test_scenes_are_those_of_the_embedded_data_and_always_the_same() -> None:
    first, again = (list(islice(scenes(), 2)) for _ in range(2))
    for sample, other in zip(first, again, strict=True):
        assert sample.image.shape == (128, 160, 3)
        texts = [text for texts in sample.referents for text in texts]
        assert len(set(texts)) == len(texts) == 11
        assert (sample.image == other.image).all()
        assert sample.referents == other.referents


def test_the_photo_has_refcocos_numbers() -> None:
    sample = photograph()
    assert sample.image.shape == (480, 640, 3)
    assert list(map(len, sample.referents)) == [3, 2, 2]


@pytest.mark.parametrize("name", [name for name, published in CASES.items() if not published])
def test_small_cases_can_be_built_and_have_about_14_proposals(name: str) -> None:
    chosen = case(name)
    model = chosen.build("cpu")
    assert model.is_vit == ("ViT" in chosen.title)
    assert model.config == chosen.config
    found = [len(felzenszwalb(sample.image, chosen.proposals)) for sample in chosen.samples]
    assert 10 <= sum(found) / len(found) <= 20, found


def test_published_cases_are_of_the_published_sizes() -> None:
    for name in ("gl_vit_b32", "gl_rn50"):
        chosen = case(name)
        assert chosen.config.short_side == 800
        assert chosen.most_proposals == 20
        assert str(chosen.architecture).endswith("quickgelu")


def test_all_ways_of_one_small_case(monkeypatch: pytest.MonkeyPatch) -> None:
    one = replace(case("gl_small_vit"), samples=[next(scenes())], rounds=1)
    monkeypatch.setattr(global_local, "case", lambda name: one)
    found = global_local.measure("gl_small_vit", "cpu", torch.get_num_threads())
    assert (found.images, found.expressions) == (1, 11)
    assert 10 <= found.proposals <= 14
    assert found.difference < 1e-4
    assert found.gflop["per image"] < found.gflop["per referent"] < found.gflop["per expression"]
    assert found.gflop["per expression"] / found.gflop["per image"] == pytest.approx(11, rel=0.2)


def test_ways_that_differ_are_no_comparison() -> None:
    scores = {"per image": torch.tensor([1.0, 4.0]), "per expression": torch.tensor([1.0, 4.0002])}
    assert largest_difference(scores, "x") == pytest.approx(5e-5, rel=0.05)
    with pytest.raises(RuntimeError, match="scores of x with shared and with repeated encodings differ by"):
        largest_difference({**scores, "per referent": torch.tensor([1.01, 4.0])}, "x")


def test_nan_is_no_agreement() -> None:
    scores = {"per image": torch.tensor([1.0, torch.nan]), "per expression": torch.tensor([1.0, torch.nan])}
    with pytest.raises(RuntimeError):
        largest_difference(scores, "x")


def test_rates_stand_beside_the_way_per_expression() -> None:
    ways = {"per image": 1.0, "per referent": 4.0, "per expression": 8.0}
    parts = {"encode": 0.5, "texts": 0.1, "texts one by one": 0.2, "propose": 1.5}
    timings = {name: Timing(cpu=seconds, wall=99.0) for name, seconds in {**ways, **parts}.items()}
    gflop = {"per image": 1.0, "per referent": 5.0, "per expression": 10.0}
    report = Report("evaluate", {}, {})
    report_case(report, Found("GL", 2, 22, 14.0, timings, gflop, 1e-6), "cpu")
    rows = {row.what.strip(): row for row in report.rows}
    assert rows["proposals encoded per image"].ratio == 8
    assert rows["proposals encoded per image"].value == 22
    assert rows["proposals encoded per referent, as the official code"].ratio == 2
    assert [row.ratio for row in report.rows if "GFLOP" in row.what] == [2, 10]
    assert rows["proposals by felzenszwalb"].value == pytest.approx(2 / 1.5)
    assert rows["their time"].ratio == 3
