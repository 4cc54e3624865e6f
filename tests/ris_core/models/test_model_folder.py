"""A model folder in which one thing was damaged is refused, whatever it is, with what is wrong and what to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_world import ARCHITECTURE, VIT_ARCHITECTURE

from ris_core.errors import WeightsError
from ris_core.models.clip import build_clip, load_saved_clip, save_clip
from ris_core.models.contract import SystemConfig
from ris_core.models.cris import CRISConfig
from ris_core.models.registry import ModelInfo, build_model, export_model, load_model
from ris_core.models.risclip.system import RISCLIPConfig
from ris_core.predictor import RISPredictor

CRIS = CRISConfig(vis_dim=32, fpn_out=(16, 32, 32), num_layers=1, num_heads=2, ffn_dim=32)
RISCLIP = RISCLIPConfig(
    cfe_layers=1,
    cfe_dim=16,
    cfe_heads=2,
    adapter_dim=4,
    ske_blocks=1,
    ske_heads=2,
    ske_mlp_ratio=1.0,
    decoder_channels=(8,),
    skip_layers=(2,),
)
INFO = ModelInfo(image_size=64, word_len=12, dataset="shapes")


def export(folder: Path, system: str, config: SystemConfig, architecture: dict[str, Any]) -> Path:
    torch.manual_seed(0)
    architecture = {
        **architecture,
        "text_cfg": {**architecture["text_cfg"], "vocab_size": 96},
    }  # it is built many times
    save_clip(build_clip(architecture), folder / "clip", architecture, {})
    weights = build_model(system, config, load_saved_clip(folder / "clip")).state_dict()
    export_model(folder / system, system, weights, config, folder / "clip", INFO)
    return folder / system


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tmp_path_factory.mktemp("trained"), "cris", CRIS, ARCHITECTURE)


@pytest.fixture(scope="module")
def exported_frozen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose CLIP lies in its folder."""
    return export(tmp_path_factory.mktemp("frozen"), "risclip", RISCLIP, VIT_ARCHITECTURE)


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "model"))


@pytest.fixture
def frozen(exported_frozen: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported_frozen, tmp_path / "model"))


def changed(file: Path, change: Callable[[Any], object]) -> None:
    """Rewrite a JSON file with what a function makes of its content, or with the content it changed in place."""
    content = json.loads(file.read_text())
    found = change(content)
    file.write_text(json.dumps(content if found is None else found))


def places(content: object, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Ways to everything in a JSON value."""
    inner = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    return [found for key, value in inner for found in ((*place, key), *places(value, (*place, key)))]


def put(content: Any, place: tuple[Any, ...], value: object) -> None:
    """Change one value in a JSON value; None takes it away."""
    for key in place[:-1]:
        content = content[key]
    if value is None:
        del content[place[-1]]
    else:
        content[place[-1]] = value


def test_the_folders_themselves_are_good(exported: Path, exported_frozen: Path) -> None:
    for folder, system in ((exported, "cris"), (exported_frozen, "risclip")):
        assert load_model(folder)[1].system == system
        RISPredictor.from_folder(folder, "cpu")


def test_the_home_folder_may_be_written_short(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    assert load_model("~/model")[1].info == INFO


# Files that are something else

FILES = ["model.json", "model.safetensors", "clip/clip.json", "clip/clip.safetensors"]
DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda whole: b"",
    "cut": lambda whole: whole[: len(whole) // 2],
    "almost whole": lambda whole: whole[:-3],
    "zeros": lambda whole: bytes(len(whole)),
    "text": lambda whole: b"access denied",
    "web page": lambda whole: b"<!DOCTYPE html><html><title>Sign in</title></html>",
    "pointer": lambda whole: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
    "noise": lambda whole: bytes(range(256)) * 4,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_something_else(name: str, damage: str, frozen: Path) -> None:
    file = frozen / name
    file.write_bytes(DAMAGES[damage](file.read_bytes()))
    for load in (load_model, lambda folder: RISPredictor.from_folder(folder, "cpu")):
        with pytest.raises(WeightsError, match=rf"^{file} (is|begins|cannot be read) .*; .*(again|git lfs pull)"):
            load(frozen)


@pytest.mark.parametrize("name", FILES)
def test_a_folder_in_place_of_a_file(name: str, frozen: Path) -> None:
    (frozen / name).unlink()
    (frozen / name).mkdir()
    with pytest.raises(WeightsError, match=rf"^{frozen / name} is a folder"):
        load_model(frozen)


@pytest.mark.parametrize("name", FILES)
def test_a_link_to_what_is_gone(name: str, frozen: Path) -> None:
    (frozen / name).unlink()
    (frozen / name).symlink_to(frozen / "gone")
    with pytest.raises(WeightsError, match=rf"^{frozen / name} is a link to a file that is gone"):
        load_model(frozen)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(value: float, folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["proj.txt.bias"].fill_(value)
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(WeightsError, match=r"model\.safetensors holds weights that .*: proj\.txt\.bias is not finite"):
        load_model(folder)


def test_weights_that_torch_wrote(folder: Path) -> None:
    torch.save({"weight": torch.ones(2)}, folder / "model.safetensors")
    with pytest.raises(
        WeightsError, match=r"model\.safetensors cannot be read as safetensors: it is a file of torch\.save"
    ):
        load_model(folder)


def test_a_clip_that_is_gone(folder: Path) -> None:
    shutil.rmtree(folder / "clip")
    with pytest.raises(WeightsError, match=r"no saved CLIP in .*/clip: clip\.json is missing"):
        load_model(folder)


# Descriptions that were changed


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_descriptions_as_editors_save_them(encoding: str, folder: Path) -> None:
    for name in ("model.json", "clip/clip.json"):
        (folder / name).write_bytes((folder / name).read_text().encode(encoding))
    assert load_model(folder)[1].info == INFO


@pytest.mark.parametrize("content", ["[]", "null", "3", "{}", '[{"format": 4}]'])
@pytest.mark.parametrize("name", ["model.json", "clip/clip.json"])
def test_a_description_that_is_no_object(name: str, content: str, folder: Path) -> None:
    (folder / name).write_text(content)
    with pytest.raises(WeightsError, match=rf"(?s)^{folder / name} .* again"):
        load_model(folder)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda c: put(c, ("format",), 1), "has another format than 4"),
        (lambda c: put(c, ("format",), None), "has another format than 4"),
        (lambda c: put(c, ("system",), None), "system missing"),
        (lambda c: put(c, ("config",), None), "config missing"),
        (lambda c: put(c, ("info",), None), "info missing"),
        (lambda c: put(c, ("system",), "etris"), "there is no system 'etris'; there are cris"),
        (lambda c: put(c, ("system",), ["cris"]), "there is no system"),
        (lambda c: put(c, ("system",), "lts"), "config: vis_dim: unknown parameter"),
        (lambda c: put(c, ("info", "image_size"), None), "info: image_size: missing"),
        (lambda c: put(c, ("info", "image_size"), "large"), "info: image_size: Value 'large'"),
        (lambda c: put(c, ("info", "image_size"), 0), "info: image_size: 0 is below the minimum 1"),
        (lambda c: put(c, ("info", "word_len"), 1), "info: word_len: 1 is below the minimum 3"),
        (lambda c: put(c, ("config", "fpn_out"), [16, "???", 32]), "is not used here"),
        (lambda c: put(c, ("config", "fpn_out"), [16, [], 32]), "config: "),
        (lambda c: put(c, ("config", "dropout"), 10**400), "config: dropout: int too large"),
        (lambda c: put(c, ("config", "num_heads"), 5), "it must divide vis_dim 32"),
    ],
)
def test_a_changed_description_is_told(change: Callable[[Any], None], problem: str, folder: Path) -> None:
    changed(folder / "model.json", change)
    with pytest.raises(WeightsError, match=rf"(?s)^{folder}/model\.json .*{problem}.*export it again"):
        load_model(folder)


def test_all_that_is_wrong_is_told_at_once(folder: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        content["config"]["num_head"] = 2
        content["info"]["image_size"] = -64

    changed(folder / "model.json", change)
    with pytest.raises(WeightsError, match=r"config: num_head: unknown .*; info: image_size: -64 is below"):
        load_model(folder)


def test_no_trained_model(folder: Path) -> None:
    changed(folder / "model.json", lambda content: put(content, ("info", "word_len"), None))
    with pytest.raises(WeightsError, match="is what a training starts from"):
        RISPredictor.from_folder(folder, "cpu")


VALUES = [None, "text", [], {"a": 1}, -1]


@pytest.mark.parametrize("name", ["model.json", "clip/clip.json"])
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_any_one_value_may_be_anything(name: str, exported: Path, folder: Path) -> None:
    """Each is either a model all the same, or told in words: no other error gets out."""
    whole = (exported / name).read_text()
    refused = 0
    for place in places(json.loads(whole)):
        for value in VALUES:
            content = json.loads(whole)
            put(content, place, value)
            (folder / name).write_text(json.dumps(content))
            try:
                load_model(folder)
            except WeightsError as error:
                refused += 1
                told = str(error)
                assert str(folder) in told, (place, value)
    assert refused > 3 * len(places(json.loads(whole)))


def test_sizes_that_no_check_knows_of(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a system raises while it is built of what the folder says, is told of the folder."""
    from ris_core.models import registry

    def failing(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(registry, "build_model", failing)
    with pytest.raises(WeightsError, match=rf"^{folder} does not hold together: ZeroDivisionError; export it again"):
        load_model(folder)
