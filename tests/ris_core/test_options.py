"""Options know their range, plain values are checked against them as a whole, and equal decisions have equal names."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

import pytest
from omegaconf import OmegaConf

from ris_core.errors import ConfigError
from ris_core.options import (
    Plain,
    deciding,
    digest,
    from_plain,
    misfits,
    option,
    out_of_range,
    texts_that_ask,
)
from ris_core.training.params import TrainParams


@dataclass(frozen=True)
class Loss:
    weight: float = option(1.0, minimum=0)
    share: float = option(0.5, minimum=0, below=1)


@dataclass(frozen=True)
class Sizes:
    width: int  # must be given
    depth: int = option(2, minimum=1)
    kind: str = option("round", choices=("round", "square"))
    names: list[str] = option(["a"], choices=("a", "b", "c"))
    pair: tuple[int, int] = (3, 4)
    scales: tuple[float, ...] = (1.0, 2.0)
    most: int | None = option(None, minimum=1)
    loss: Loss = field(default_factory=Loss)
    extra: Plain | None = None
    workers: int = option(0, minimum=0, decides=False)

    def __post_init__(self) -> None:
        for name in ("pair", "scales"):  # as our options do: JSON and YAML bring lists
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.width == 13:
            raise ConfigError("width is 13: use a lucky one")


def problems(content: object) -> list[str]:
    """What is wrong with plain values for `Sizes`, line by line."""
    with pytest.raises(ConfigError) as caught:
        from_plain(Sizes, content, "sizes.json")
    title, _, text = str(caught.value).partition(": ")
    assert title == "sizes.json"
    return text.split("; ")


def test_an_option_is_its_default_and_a_list_is_nobodys_but_its_own() -> None:
    first, second = Sizes(1), Sizes(1)
    assert (first.depth, first.kind, first.names, first.most) == (2, "round", ["a"], None)
    first.names.append("b")
    assert second.names == ["a"]


def test_plain_values_become_the_object_they_were() -> None:
    whole = Sizes(7, 3, "square", ["b", "c"], (5, 6), (0.5,), 9, Loss(0.0, 0.25), {"a": [1, {"b": None}]}, workers=4)
    assert from_plain(Sizes, json.loads(json.dumps(dataclasses.asdict(whole))), "sizes.json") == whole
    assert from_plain(Sizes, {"width": 7}, "sizes.json") == Sizes(7)
    found = from_plain(Sizes, {"width": 7, "loss": {"share": 0}, "most": None}, "sizes.json")
    assert (found.loss, found.most) == (Loss(share=0.0), None)


def test_every_problem_is_named_at_once() -> None:
    found = problems(
        {
            "dept": 3,
            "zzz": 1,
            "depth": 0,
            "kind": "oval",
            "names": ["a", "d"],
            "pair": [1, 2, 3],
            "scales": ["wide"],
            "most": "many",
            "loss": {"weight": -1, "shar": 0.5, "share": 1},
            "workers": None,
        }
    )
    expected = {
        "dept": "unknown parameter",
        "zzz": "unknown parameter",
        "depth": "0 is below the minimum 1",
        "kind": "'oval' is not one of round, square",
        "names": "'d' is not one of a, b, c",
        "pair": "expected 2 values, found [1, 2, 3]",
        "scales": "Value 'wide' of type 'str' could not be converted to Float",
        "most": "Value 'many' of type 'str' could not be converted to Integer",
        "loss.weight": "-1.0 is below the minimum 0",
        "loss.shar": "unknown parameter",
        "loss.share": "1.0 is not below 1",
        "workers": "not Optional",
        "width": "missing",
    }
    text = "; ".join(found)
    for name, problem in expected.items():
        assert any(line.startswith(f"{name}: ") and problem in line for line in found), (name, problem, text)
    assert sum(": " in line and line.split(": ")[0] in expected for line in found) == len(expected)


def test_an_unknown_key_is_told_the_nearest_name_or_all_of_them() -> None:
    assert problems({"width": 1, "dept": 3, "loss": {"shar": 0.5}}) == [
        "dept: unknown parameter",
        "did you mean 'depth'?",
        "loss.shar: unknown parameter",
        "did you mean 'share'?",
    ]
    known = ", ".join(item.name for item in dataclasses.fields(Sizes))
    assert problems({"width": 1, "zzz": 3}) == ["zzz: unknown parameter", f"known here: {known}"]


@pytest.mark.parametrize(("content", "kind"), [(3, "int"), ([], "list"), (None, "NoneType"), ("width", "str")])
def test_what_is_no_mapping_is_told_what_was_expected(content: object, kind: str) -> None:
    known = ", ".join(item.name for item in dataclasses.fields(Sizes))
    assert problems(content) == [f"expected {known}", f"found {kind}"]


@pytest.mark.parametrize("content", [3, None, [1], "half"])
def test_a_section_must_be_a_section(content: object) -> None:
    (found,) = problems({"width": 1, "loss": content})
    assert found == f"loss: expected a section with weight, share, found {content!r}"


def test_not_a_number_is_in_no_range() -> None:
    assert problems({"width": 1, "loss": {"weight": float("nan")}}) == ["loss.weight: nan is below the minimum 0"]
    assert problems({"width": 1, "loss": {"share": float("nan")}})[0] == "loss.share: nan is below the minimum 0"
    assert out_of_range([float("nan")], {"below": 1}) == ["nan is not below 1"]


def test_contradictions_are_those_of_the_object_itself() -> None:
    with pytest.raises(ConfigError, match="width is 13: use a lucky one"):
        from_plain(Sizes, {"width": 13}, "sizes.json")


@pytest.mark.parametrize(
    "place",
    [
        {"kind": "${oc.env:RIS_SECRET}"},
        {"names": ["a", "${oc.env:RIS_SECRET}"]},
        {"depth": "${oc.env:RIS_SECRET}"},
        {"loss": {"weight": "${oc.env:RIS_SECRET}"}},
        {"loss": "${oc.env:RIS_SECRET}"},
        {"extra": {"a": [{"b": "x${oc.env:RIS_SECRET}"}]}},
        {"pair": "${oc.create:[1,2]}"},
        {"unknown": "${oc.env:RIS_SECRET}"},
    ],
)
def test_a_file_does_not_read_the_environment_of_its_reader(
    place: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RIS_SECRET", "77")
    (found,) = problems({"width": 1, **place})
    assert "${...} is not used here" in found
    assert "oc." in found
    assert "77" not in found


def test_texts_that_ask_are_found_wherever_they_are() -> None:
    asking = {"a": "plain", "b": ["${x}", {"c": "$y", "d": ("${z}",)}], "e": 3}
    assert texts_that_ask(asking) == ["'${x}': ${...} is not used here", "'${z}': ${...} is not used here"]
    assert texts_that_ask({"a": "costs 3 $", "b": None}) == []


def test_misfits_begin_with_the_keys_full_name() -> None:
    given = OmegaConf.create({"depth": 0, "loss": {"weight": -1}})
    assert misfits(Sizes, given, "presets.long.mine.") == [
        "presets.long.mine.depth: 0 is below the minimum 1",
        "presets.long.mine.loss.weight: -1.0 is below the minimum 0",
    ]
    assert misfits(Sizes, OmegaConf.create({"depth": 4}), "") == []


def test_deciding_leaves_out_what_decides_nothing_and_makes_lists_of_tuples() -> None:
    content = deciding(Sizes(7, workers=5, extra={"a": (1, (2,))}))
    assert content == {
        "width": 7,
        "depth": 2,
        "kind": "round",
        "names": ["a"],
        "pair": [3, 4],
        "scales": [1.0, 2.0],
        "most": None,
        "loss": {"weight": 1.0, "share": 0.5},
        "extra": {"a": [1, [2]]},
    }
    assert json.loads(json.dumps(content)) == content
    assert deciding([Sizes(7), (Loss(),)])[1] == [{"weight": 1.0, "share": 0.5}]
    assert deciding("text") == "text"
    assert "loader_workers" not in deciding(TrainParams())
    assert {"lr", "loss", "seed"} <= deciding(TrainParams()).keys()


def test_digest_depends_on_content_alone() -> None:
    assert digest({"a": 1, "b": [TrainParams()]}) == digest({"b": [TrainParams()], "a": 1})
    assert digest(TrainParams(lr=2e-3)) != digest(TrainParams(lr=1e-3))
    assert len(digest("x")) == 12
    assert digest("x") == digest("x") != digest("y")


def test_digest_is_of_what_decides() -> None:
    assert digest(Sizes(7, workers=5)) == digest(Sizes(7))
    assert digest(Sizes(7, depth=5)) != digest(Sizes(7))
    assert digest([Sizes(7, workers=5)]) == digest([deciding(Sizes(7))])
    assert digest((1, 2)) == digest([1, 2])
    assert digest(TrainParams(loader_workers=3, checkpoint_every_steps=7)) == digest(TrainParams())
