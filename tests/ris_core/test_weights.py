"""Weights files of every kind that people give: the good ones load, every other is told as what it is, with what to do."""

from __future__ import annotations

import argparse
import copy
import io
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save, save_file
from tiny_world import ARCHITECTURE
from torch import nn
from torch.optim.swa_utils import AveragedModel

from ris_core.contents import BadFile, kind_of
from ris_core.errors import WeightsError
from ris_core.models.clip import build_clip, load_clip
from ris_core.models.cris import CRIS, CRISConfig
from ris_core.weights import load_strictly, read_json, read_safetensors, read_state, read_torch, state_of, unwrapped

State = dict[str, torch.Tensor]


class Small(nn.Module):
    """A tower, a part with a batch norm (whose counter is an integer), and a mask that rightly holds -inf."""

    def __init__(self) -> None:
        super().__init__()
        self.visual = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        self.proj = nn.Linear(4, 2, bias=False)
        self.register_buffer("attn_mask", torch.full((2, 2), float("-inf")).triu(1), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(self.visual(x))


@pytest.fixture(scope="module")
def model() -> Small:
    torch.manual_seed(0)
    return Small()


@pytest.fixture(scope="module")
def state(model: Small) -> State:
    return dict(model.state_dict())


def saved(content: object, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def prefixed(state: State, prefix: str) -> State:
    return {prefix + name: value for name, value in state.items()}


def equal(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def lightning(state: State) -> dict[str, object]:
    return {
        "state_dict": prefixed(state, "model."),
        "pytorch-lightning_version": "2.5",
        "hyper_parameters": {"lr": 0.1},
    }


def whole(state: State) -> dict[str, object]:
    """A checkpoint as open_clip's and CRIS' own training write it."""
    parameters = [nn.Parameter(value) for value in state.values() if value.is_floating_point()]
    optimizer = torch.optim.AdamW(parameters)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [35])
    return {
        "epoch": 3,
        "name": "run",
        "best_iou": 0.5,
        "state_dict": prefixed(state, "module."),
        "optimizer": optimizer.state_dict(),
        "scheduler": schedule.state_dict(),
        "scaler": {},
    }


GOOD: dict[str, Callable[[State], bytes]] = {
    "safetensors": save,
    "state dict": saved,
    "old format": lambda state: saved(state, _use_new_zipfile_serialization=False),
    "pickle protocol 3": lambda state: saved(state, pickle_protocol=3),
    "whole checkpoint": lambda state: saved(whole(state)),
    "whole checkpoint, old format": lambda state: saved(whole(state), _use_new_zipfile_serialization=False),
    "Lightning": lambda state: saved(lightning(state)),
    "under model": lambda state: saved({"model": state, "epoch": 1}),
    "under model_state_dict": lambda state: saved({"model_state_dict": state}),
    "twice wrapped": lambda state: saved({"epoch": 1, "model": {"state_dict": state}}),
    "a name under model": lambda state: saved({"model": "RN50", "state_dict": state}),
    "parameters": lambda state: saved({name: nn.Parameter(value, False) for name, value in state.items()}),
}


@pytest.mark.parametrize("ending", ["pt", "safetensors", "bin"])
@pytest.mark.parametrize("kind", GOOD)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_the_content_decides(kind: str, ending: str, state: State, tmp_path: Path) -> None:
    path = tmp_path / f"weights.{ending}"
    path.write_bytes(GOOD[kind](state))
    assert equal(read_state(path), state)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_an_archive_of_torchscript(model: Small, state: State, tmp_path: Path) -> None:
    path = tmp_path / "archive.bin"
    torch.jit.save(torch.jit.script(copy.deepcopy(model).eval()), path)
    assert kind_of(path) == "a TorchScript archive"
    found = read_state(path)
    assert found.keys() - state.keys() == {"attn_mask"}  # TorchScript keeps every buffer
    assert equal({name: found[name] for name in state}, state)
    with zipfile.ZipFile(path, "w") as damaged:
        damaged.writestr("archive/constants.pkl", b"nothing of the kind")
    with pytest.raises(WeightsError, match=r"archive\.bin is a TorchScript archive that cannot be opened"):
        read_state(path)


@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_converted(precision: torch.dtype, model: Small, state: State, tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save({name: value.to(precision) for name, value in state.items()}, path)  # the counter as well, as people do
    other = Small()
    load_strictly(other, read_state(path), "does not fit")
    assert {value.dtype for value in other.parameters()} == {torch.float32}
    assert torch.equal(other.proj.weight, state["proj.weight"].to(precision).float())


def test_the_home_folder_may_be_written_short(state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    save_file(state, tmp_path / "weights.safetensors")
    assert equal(read_state("~/weights.safetensors"), state)
    with pytest.raises(WeightsError, match=r"~nobody-of-that-name/weights\.pt is missing"):
        read_state("~nobody-of-that-name/weights.pt")


# What wrappers put before names


PREFIXES = [
    "module.",
    "_orig_mod.",
    "model.",
    "module.module.",
    "module._orig_mod.",
    "_orig_mod.module.",
    "model.module.",
]


@pytest.mark.parametrize("prefix", [*PREFIXES, "model._orig_mod.module.model."])
def test_prefixes_of_all_names_are_taken_off(prefix: str, state: State) -> None:
    assert equal(unwrapped(prefixed(state, prefix)), state)


def test_a_prefix_of_some_names_stays(state: State) -> None:
    mixed = {**prefixed(state, "module."), "proj.weight": state["proj.weight"]}
    assert equal(unwrapped(mixed), mixed)
    assert unwrapped({}) == {}


def test_wrappers_as_torch_makes_them(model: Small, state: State) -> None:
    partly = copy.deepcopy(model)
    partly.visual = torch.compile(partly.visual)  # type: ignore[assignment]
    assert "visual._orig_mod.0.weight" in partly.state_dict()
    average = AveragedModel(model)
    assert "n_averaged" in average.state_dict()
    for wrapped in (nn.DataParallel(model), torch.compile(model), partly, average):
        assert isinstance(wrapped, nn.Module)
        assert equal(unwrapped(wrapped.state_dict()), state)


def test_names_that_would_fall_together_stay() -> None:
    both = {"a.weight": torch.zeros(1), "_orig_mod.a.weight": torch.ones(1)}
    assert equal(unwrapped(both), both)


# Files that are something else


def npz() -> bytes:
    file = io.BytesIO()
    np.savez(file, a=np.ones(2))
    return file.getvalue()


def archive(kind: str) -> bytes:
    file = io.BytesIO()
    if kind == "tar":
        with tarfile.open(fileobj=file, mode="w") as tar:
            tar.addfile(tarfile.TarInfo("RN50.pt"))
    else:
        with zipfile.ZipFile(file, "w") as zipped:
            zipped.writestr("RN50.pt", b"x")
    return file.getvalue()


DENIED = "it may be an error message in place of the file: download it again"
AGAIN = "download or copy it again, and compare its size"
OTHERS: dict[str, tuple[bytes, str, str]] = {
    "web page": (b"<!DOCTYPE html><html><title>Quota exceeded</title>", "a saved web page.*Quota exceeded", DENIED),
    "web page with a mark": ("\ufeff\n <html>\x00".encode(), "a saved web page", DENIED),
    "XML": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "a saved web page.*AccessDenied", DENIED),
    "denied": (b"access denied", "text, not weights: it begins 'access denied'", DENIED),
    "not found": (b"Not Found", "text, not weights: it begins 'Not Found'", DENIED),
    "another language": ("見つかりません".encode(), "text, not weights: it begins '見つかりません'", DENIED),
    "Latin-1": ("accès refusé, accès refusé".encode("latin-1"), "text, not weights", DENIED),
    "UTF-16": ("access denied".encode("utf-16"), "text, not weights: it begins 'access denied'", DENIED),
    "long text": (b"word " * 2000, r"text, not weights: it begins 'word word .*\.\.\.'", DENIED),
    "JSON": (b'{"error": "no such model"}', "JSON, not weights.*no such model", DENIED),
    "LFS": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
        "a Git LFS pointer",
        "git lfs pull",
    ),
    "annex": (b"/annex/objects/SHA256E-s1--00.pt\n", "a git-annex pointer", "git annex get"),
    "empty": (b"", "empty", AGAIN),
    "zeros": (bytes(100), "begins with zeros", AGAIN),
    "gzip": (b"\x1f\x8b\x08\x00" + bytes(30), "a gzip archive, not weights", "unpack it"),
    "tar": (archive("tar"), "a tar archive, not weights", "unpack it"),
    "zip": (archive("zip"), r"a zip archive that torch did not write, of RN50\.pt", "unpack it"),
    "cut zip": (b"PK\x03\x04" + bytes(50), "cut short or damaged", AGAIN),
    "npz": (npz(), "an archive of NumPy arrays", "safetensors, or a state dict"),
    "Keras": (b"\x89HDF\r\n\x1a\n" + bytes(30), "an HDF5 file", "safetensors, or a state dict"),
    "GGUF": (b"GGUF\x03\x00\x00\x00", "a GGUF file", "safetensors, or a state dict"),
    "picture": (b"\x89PNG\r\n\x1a\n" + bytes(30), "a picture", "safetensors, or a state dict"),
    "pickle": (pickle.dumps({"a": 1}), "a pickle that torch.save did not write", r"`torch\.save\("),
    "array pickle": (
        pickle.dumps({"state_dict": np.ones(2)}, 2),
        "a pickle",
        r'`torch\.save\({"state_dict": checkpoint',
    ),
    "cut pickle": (b"\x80\x04\x95", "a pickle.* or a cut one", r"`torch\.save\("),
    "protocol 0": (b'cos\nsystem\n(S"x"\ntR.', "text, not weights", DENIED),
    "noise": (b"\x07\xff\x00\x81" * 20, "not readable as safetensors, a TorchScript archive or a state dict", AGAIN),
    "one byte": (b"\x80", "a pickle.* or a cut one", r"`torch\.save\("),
    "long header": (b"\xff" * 3 + bytes(5) + b'{"a": 1}', "cut short: it is safetensors", AGAIN),
    "bad header": (b"\x08" + bytes(7) + b'{"a": 1}', "cut short or damaged: not readable as safetensors", AGAIN),
}


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
@pytest.mark.parametrize("kind", OTHERS)
def test_a_file_of_another_kind_is_told_as_what_it_is(kind: str, ending: str, tmp_path: Path) -> None:
    content, what, remedy = OTHERS[kind]
    path = tmp_path / f"weights.{ending}"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=rf"(?s)^{path} (is )?.*{what}.*; .*{remedy}"):
        read_state(path)
    with pytest.raises(WeightsError, match=what):
        read_safetensors(path)
    with pytest.raises(WeightsError, match=rf"^{path} "):
        read_torch(path)
    with pytest.raises(WeightsError, match=rf"^{path} .*{what}"):
        load_clip("tiny_rn", path)


@pytest.mark.parametrize("kind", ["safetensors", "state dict", "old format"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.99])
def test_a_download_that_was_cut_short(kind: str, share: float, state: State, tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    content = GOOD[kind]({**state, "big": torch.randn(100, 100)})
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(WeightsError, match=r"weights\.pt is (cut short|.*damaged).*download or copy it again"):
        read_state(path)


def test_what_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    for path, what in ((tmp_path, "is a folder"), (tmp_path / "no", "is missing"), (tmp_path / "link", "is a link to")):
        for reader in (read_state, read_safetensors, read_torch, read_json):
            with pytest.raises(WeightsError, match=rf"^{path} {what}"):
                reader(path)
    with pytest.raises(WeightsError, match="cannot be read"):
        read_state(tmp_path / ("long" * 100))
    with pytest.raises(WeightsError, match="/dev/null is no regular file"):
        read_state("/dev/null")


def test_one_kind_in_place_of_another_is_told(state: State, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "a")
    save_file(state, tmp_path / "b")
    with pytest.raises(WeightsError, match=r"a cannot be read as safetensors: it is a file of torch\.save; give"):
        read_safetensors(tmp_path / "a")
    with pytest.raises(WeightsError, match=r"b cannot be read as a file of torch\.save: it is safetensors; give"):
        read_torch(tmp_path / "b")


def test_damage_anywhere_is_never_a_crash(state: State, tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    path = tmp_path / "weights.pt"
    told: list[str] = []
    for kind in ("safetensors", "state dict", "old format", "whole checkpoint"):
        whole = GOOD[kind](state)
        for _ in range(60):
            content = bytearray(whole)
            for place in draw.integers(0, len(content), draw.integers(1, 8)):
                content[place] = draw.integers(0, 256)
            path.write_bytes(content[: len(content) - draw.integers(0, 3)])
            try:
                read_state(path)
            except WeightsError as error:
                told.append(str(error))
    assert len(told) > 50
    assert all(each.startswith(str(path)) and "weights_only" not in each for each in told)


# Files that ask for code


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.path), "w")


CHECKPOINT = r'`torch\.save\({"state_dict": checkpoint\["state_dict"\]}, "weights\.pt"\)`'
BESIDE: dict[str, object] = {
    "argparse.Namespace": argparse.Namespace(lr=1),
    "pathlib.*PosixPath": {"out": Path("/x")},
    "numpy.*scalar": np.float64(0.5),
    "numpy.*_reconstruct": np.ones(2),
    "frozenset": frozenset((1, 2)),
}


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("needed", BESIDE)
def test_classes_beside_a_state_dict_are_told_with_how_to_save_it_alone(
    needed: str, old: bool, state: State, tmp_path: Path
) -> None:
    path = tmp_path / "weights.pt"
    path.write_bytes(saved({"args": BESIDE[needed], "state_dict": state}, _use_new_zipfile_serialization=not old))
    with pytest.raises(
        WeightsError, match=rf"needs more than tensors .*\({needed}\).*not opened here.*{CHECKPOINT}"
    ) as told:
        read_state(path)
    assert "weights_only" not in str(told.value)
    assert told.value.__suppress_context__, "a traceback would quote torch's advice to run what is in the file"


@pytest.mark.parametrize("place", ["alone", "under model", "beside"])
def test_a_whole_model_is_never_opened(place: str, model: Small, state: State, tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save(
        {"alone": model, "under model": {"model": model}, "beside": {"ema": model, "state_dict": state}}[place], path
    )
    remedy = CHECKPOINT if place == "beside" else r'`torch\.save\(model\.state_dict\(\), "weights\.pt"\)`'
    with pytest.raises(WeightsError, match=rf"needs more than tensors.*Small.*{remedy}"):
        read_state(path)


@pytest.mark.parametrize("old", [False, True])
def test_code_is_never_run(old: bool, state: State, tmp_path: Path) -> None:
    path, trap = tmp_path / "weights.pt", tmp_path / "trap"
    path.write_bytes(saved({"state_dict": state, "trap": Trap(trap)}, _use_new_zipfile_serialization=not old))
    with pytest.raises(
        WeightsError, match=r"needs more than tensors and plain values \(.*open\), and could run any code"
    ):
        read_state(path)
    path.write_bytes(pickle.dumps(Trap(trap)))
    with pytest.raises(WeightsError, match=r"a pickle that torch\.save did not write"):
        read_state(path)
    assert not trap.exists()


@pytest.mark.parametrize("protocol", [0, 4, 5])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_another_pickle_protocol(protocol: int, state: State, tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    path.write_bytes(saved({"state_dict": state}, pickle_protocol=protocol))
    with pytest.raises(WeightsError, match=r"another pickle protocol than torch's; .*`torch\.save\(") as told:
        read_state(path)
    assert "weights_only" not in str(told.value)


# Contents that are no weights


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ({"accuracy": 0.5}, r"'accuracy' \(float\)"),
        ({}, "nothing"),
        ({"state_dict": {}, "epoch": 1}, "nothing"),
        ([torch.ones(2)], "a list"),
        (torch.ones(2), "a Tensor"),
        (None, "a NoneType"),
        (3, "a int"),
        ({0: torch.ones(2)}, r"0 \(Tensor\)"),
        ({"a": torch.ones(2), "b": [torch.ones(2)], "c": "x"}, r"'b' \(list\), 'c' \(str\)$"),
        (
            {"net": {"a": torch.ones(2)}, "epoch": 1},
            r"'net' \(dict\), .*if 'net' is it: `torch\.save\(checkpoint\['net'\]",
        ),
        (dict.fromkeys("abcde", 1), r"'a' \(int\), 'b' \(int\), 'c' \(int\) and 2 more"),
    ],
)
def test_what_is_there_in_place_of_a_state_dict_is_told(content: object, found: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save(content, path)
    expected = "expected names and tensors, by themselves or under state_dict, model_state_dict, model; found"
    with pytest.raises(WeightsError, match=rf"weights\.pt holds no state dict: {expected} {found}"):
        read_state(path)


def test_a_checkpoint_that_holds_itself() -> None:
    circle: dict[str, object] = {}
    circle["model"] = circle
    with pytest.raises(WeightsError, match="it holds no state dict"):
        state_of(circle, "it")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("kind", ["safetensors", "state dict", "whole checkpoint"])
def test_weights_that_are_not_finite_are_named(kind: str, value: float, state: State, tmp_path: Path) -> None:
    wrong = {name: tensor.clone() for name, tensor in state.items()}
    wrong["visual.0.weight"].fill_(value)
    wrong["proj.weight"][0, 1] = value
    path = tmp_path / "weights"
    path.write_bytes(GOOD[kind](wrong))
    with pytest.raises(WeightsError) as told:
        read_state(path)
    for text in (
        "visual.0.weight is not finite in 12 of 12 values",
        "proj.weight is not finite in 1 of 8",
        "2 problems",
    ):
        assert text in str(told.value)
    if kind == "safetensors":
        with pytest.raises(WeightsError, match=r"cannot be used: proj\.weight is not .*, visual\.0\.weight .*; take"):
            read_safetensors(path)


@pytest.mark.parametrize("prefix", ["", "module.", "backbone."])
def test_a_causal_mask_rightly_holds_infinity(prefix: str, model: Small, tmp_path: Path) -> None:
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    assert "attn_mask" in tensors
    torch.save({prefix + name: tensor for name, tensor in tensors.items()}, tmp_path / "weights.pt")
    found = read_state(tmp_path / "weights.pt")
    assert not any(tensor.requires_grad for tensor in found.values())
    if prefix != "backbone.":
        other = Small()
        load_strictly(other, found, "does not fit")
        assert equal(dict(other.state_dict()), dict(model.state_dict()))


@pytest.mark.parametrize(
    ("tensor", "flaw"),
    [
        (torch.empty(2, device="meta"), "has a shape but no values"),
        (torch.eye(2).to_sparse(), "is no plain tensor of real numbers"),
        (torch.ones(2, dtype=torch.complex64), "is no plain tensor of real numbers"),
        (torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "is no plain tensor of real numbers"),
        (torch.tensor([1e300], dtype=torch.float64), "is not finite in 1 of 1 values"),  # in float32
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_tensors_that_cannot_be_weights_are_named(tensor: torch.Tensor, flaw: str, tmp_path: Path) -> None:
    torch.save({"fine": torch.ones(2), "odd": tensor}, tmp_path / "weights.pt")
    with pytest.raises(WeightsError, match=rf"cannot be used \(1 problem\):\n  - odd {flaw}"):
        read_state(tmp_path / "weights.pt")


def test_all_misfits_are_listed_and_nothing_is_loaded(model: Small, state: State) -> None:
    other = Small()
    before = copy.deepcopy(dict(other.state_dict()))
    wrong = {
        **state,
        "new": torch.ones(1),
        "visual.0.bias": torch.ones(4, dtype=torch.int8),
        "visual.1.bias": torch.ones(3),
    }
    del wrong["proj.weight"]
    with pytest.raises(WeightsError) as told:
        load_strictly(other, wrong, "It does not fit")
    assert str(told.value).splitlines() == [
        "It does not fit (4 problems):",
        "  - missing: proj.weight [2, 4]",
        "  - not part of the model: new [1]",
        "  - shape of visual.1.bias: [3] in the weights, [4] in the model",
        "  - type of visual.0.bias: torch.int8 in the weights, torch.float32 in the model",
        "Give the architecture these weights were made with.",
    ]
    assert equal(dict(other.state_dict()), before)


# A model that is read from an official checkpoint


@pytest.fixture(scope="module")
def official() -> State:
    config = CRISConfig(vis_dim=32, fpn_out=(16, 32, 32), num_layers=1, num_heads=2, ffn_dim=32)
    torch.manual_seed(0)
    return CRIS(build_clip(ARCHITECTURE), config).official_state_dict()


@pytest.mark.parametrize("prefix", ["", *PREFIXES])
def test_cris_reads_a_whole_checkpoint(prefix: str, official: State) -> None:
    named = prefixed(official, prefix)
    wholes = ({**whole(official), "state_dict": named}, {"model": named, "epoch": 1})
    for content in (named, *wholes[: 2 if prefix == "module." else 0]):
        assert equal(CRIS.from_official_state_dict(content, num_heads=2).official_state_dict(), official)


def test_cris_reads_a_file_of_its_own_training(official: State, tmp_path: Path) -> None:
    torch.save({**whole(official), "best_iou": 0.5}, tmp_path / "best_model.pth")
    found = CRIS.from_official_state_dict(read_state(tmp_path / "best_model.pth"), num_heads=2)
    assert equal(found.official_state_dict(), official)


def test_what_cris_cannot_be_read_from_is_told(official: State) -> None:
    with pytest.raises(WeightsError, match=r"This checkpoint holds no state dict: expected .* found 'epoch'"):
        CRIS.from_official_state_dict({"epoch": 3})
    with pytest.raises(WeightsError, match=r"This checkpoint holds no state dict: expected .* found nothing"):
        CRIS.from_official_state_dict({"state_dict": {}, "epoch": 3})
    spoiled = {**official, "proj.txt.bias": official["proj.txt.bias"] * float("nan")}
    with pytest.raises(WeightsError, match=r"This checkpoint holds weights that .*\n  - proj\.txt\.bias is not finite"):
        CRIS.from_official_state_dict({"state_dict": spoiled})
    for key in (name for name, value in official.items() if value.ndim):
        empty = {**official, key: torch.empty((0,) * official[key].ndim)}
        with pytest.raises(WeightsError):
            CRIS.from_official_state_dict(empty, num_heads=2)


# JSON


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "damaged, cut short or no JSON at all"),
        (b'{"a":', "damaged, cut short or no JSON at all"),
        (b"<html>", "damaged, cut short or no JSON at all"),
        (b"\xff\xfe\xfd", "damaged, cut short or no JSON at all"),
        (b"[" * 100_000, "damaged, cut short or no JSON at all"),
        (b"[]", "damaged: it holds a list"),
        (b"null", "damaged: it holds a NoneType"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "a Git LFS pointer"),
    ],
)
def test_json_that_holds_no_object(content: bytes, what: str, tmp_path: Path) -> None:
    path = tmp_path / "model.json"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=rf"^{path} is {what}"):
        read_json(path)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_json_as_editors_save_it(encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "model.json"
    path.write_bytes('{"a": "é"}'.encode(encoding))
    assert read_json(path) == {"a": "é"}


def test_the_error_of_another_process_arrives_whole() -> None:
    error = BadFile(Path("a.pt"), "is empty", "download it again")
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error) == "a.pt is empty; download it again"
    assert (again.path, again.what) == (Path("a.pt"), "is empty")
