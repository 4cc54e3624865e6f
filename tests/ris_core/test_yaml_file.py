"""Parameter files of anybody: bounded before they are built, nothing in them resolved."""

from __future__ import annotations

from pathlib import Path

import pytest

from ris_core.errors import ConfigError
from ris_core.yaml_file import read_yaml

LAYERS = "\n".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12))
BAD = {
    "a bomb of aliases": (f"a0: &a0 [lol, lol]\n{LAYERS}\n", "entries, with its aliases written out"),
    "a merge of aliases": (
        "a0: &a0 {x: 1}\n" + "\n".join(f"a{n}: &a{n} {{l: *a{n - 1}, r: *a{n - 1}}}" for n in range(1, 40)),
        "entries",
    ),
    "what holds itself": ("a: &a [*a]\n", "holds itself"),
    "an alias of nothing": ("a: *b\n", "alias"),
    "depth of lists": ("a: " + "[" * 5000, "deep"),
    "depth of sections": ("\n".join(" " * n + "a:" for n in range(300)), "deep"),
    "a long number": ("a: " + "9" * 5000, "a number of 5000 characters"),
    "a number of base 60": ("a: 1" + ":59" * 5000, "a number of"),
    "size": ("a: " + "x" * 1_000_001, "more than 1000000"),
    "the environment": ("train: {epochs: '${oc.env:HOME}'}", "is not used here"),
    "another key": ("a: 1\nb: ${a}\n", "is not used here"),
    "an object": ("a: !!python/object/apply:os.system ['true']\n", "not valid YAML"),
    "the same key twice": ("a: 1\na: 2\n", "duplicate key"),
    "a list": ("- a\n- b\n", "expected sections"),
    "bytes": (b"\xff\xfe\x00", "not valid YAML"),
}


@pytest.mark.parametrize("case", BAD)
def test_refused_with_a_message(case: str, tmp_path: Path) -> None:
    content, message = BAD[case]
    path = tmp_path / "params.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError) as raised:
        read_yaml(path)
    assert message in str(raised.value)
    assert len(str(raised.value)) < 1000


def test_plain_aliases_and_an_empty_file_are_read(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text("train: &t {epochs: 3, rate: 1e-3}\npresets: {long: {train: {<<: *t, epochs: 9}}}\n")
    assert read_yaml(path) == {
        "train": {"epochs": 3, "rate": 1e-3},
        "presets": {"long": {"train": {"epochs": 9, "rate": 1e-3}}},
    }
    path.write_text("")
    assert read_yaml(path) == {}
