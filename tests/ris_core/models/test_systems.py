"""A trained model travels in a folder and comes back as it was; what is no such folder says so."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_world import ARCHITECTURE, Tiny
from torch import nn

from ris_core.errors import ConfigError, WeightsError
from ris_core.models import systems
from ris_core.models.clip import load_saved_clip
from ris_core.models.cris import CRIS, CRISConfig
from ris_core.models.systems import build_model, export_model, load_model

INFO = {"word_len": 12, "image_size": 64, "dataset": "shapes", "val_mIoU": 1 / 3}


@pytest.fixture(scope="module")
def model(tiny: Tiny) -> nn.Module:
    torch.manual_seed(1)
    built = build_model("cris", tiny.params().cris, load_saved_clip(tiny.clip))
    for name, buffer in built.named_buffers():
        if name.endswith("running_var"):  # as after training
            buffer.uniform_(0.5, 2.0)
    return built.eval()


@pytest.fixture
def folder(model: nn.Module, tiny: Tiny, tmp_path: Path) -> Path:
    export_model(tmp_path, "cris", model.state_dict(), tiny.params().cris, tiny.clip, INFO)
    return tmp_path


def logits(model: nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, 64, 64, generator=generator)
    tokens = torch.tensor([[49406, 736, 2117, 49407, 0], [49406, 2117, 49407, 0, 0], [49406, 518, 736, 2117, 49407]])
    with torch.inference_mode():
        return model(images, tokens, torch.tensor([0, 1, 1]))


def test_round_trip_gives_identical_logits(model: nn.Module, folder: Path, tiny: Tiny) -> None:
    loaded, info = load_model(folder)
    assert isinstance(loaded, CRIS)
    assert loaded.config == tiny.params().cris
    assert info == {**INFO, "system": "cris"}
    assert not loaded.training
    assert torch.equal(logits(loaded), logits(model))
    assert logits(model).std() > 0


def test_the_folder_is_readable_without_us(folder: Path, tiny: Tiny) -> None:
    assert sorted(path.name for path in folder.iterdir()) == ["model.json", "model.safetensors"]
    content = json.loads((folder / "model.json").read_text())
    assert content["format"] == 1
    assert content["system"] == "cris"
    assert content["clip"] == ARCHITECTURE
    assert CRISConfig(**content["config"]) == tiny.params().cris
    assert content["info"] == INFO


def test_weights_in_another_memory_layout_are_saved(model: nn.Module, tiny: Tiny, tmp_path: Path) -> None:
    odd = {
        name: value.to(memory_format=torch.channels_last) if value.ndim == 4 else value
        for name, value in model.state_dict().items()
    }
    export_model(tmp_path, "cris", odd, tiny.params().cris, tiny.clip, INFO)
    assert torch.equal(logits(load_model(tmp_path)[0]), logits(model))


@pytest.mark.parametrize("name", ["model.json", "model.safetensors"])
def test_a_missing_file_is_named(name: str, folder: Path) -> None:
    (folder / name).unlink()
    with pytest.raises(WeightsError, match=f"holds no model: {name} missing; train one, or pass its folder"):
        load_model(folder)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"nowhere holds no model: model\.json, model\.safetensors missing"):
        load_model(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["model.json", "model.safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_damaged_file_is_named(name: str, share: float, folder: Path) -> None:
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: int(share * len(content))])
    with pytest.raises(WeightsError, match=rf"{folder}/{name}"):
        load_model(folder)


def changed(folder: Path, **changes: Any) -> Path:
    content = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps({**content, **changes}))
    return folder


def test_another_format_is_refused(folder: Path) -> None:
    with pytest.raises(WeightsError, match=r"model\.json has format 7, this code reads 1"):
        load_model(changed(folder, format=7))


def test_weights_of_another_configuration_are_refused(folder: Path, tiny: Tiny) -> None:
    config = {**asdict(tiny.params().cris), "ffn_dim": 48}
    with pytest.raises(WeightsError, match=r"does not fit the model\.json beside it") as caught:
        load_model(changed(folder, config=config))
    assert "decoder.layers.0.ffn.0.weight" in str(caught.value)


@pytest.mark.parametrize("change", ["missing", "surplus"])
def test_every_weight_must_be_there_and_no_other(change: str, folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    if change == "missing":
        del weights["proj.txt.bias"]
    else:
        weights["proj.txt.other"] = torch.zeros(1)
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(WeightsError, match=r"does not fit the model\.json beside it") as caught:
        load_model(folder)
    assert ("proj.txt.bias" if change == "missing" else "proj.txt.other") in str(caught.value)


def test_unknown_options_of_a_newer_version_are_refused(folder: Path, tiny: Tiny) -> None:
    config = {**asdict(tiny.params().cris), "new_option": 1}
    with pytest.raises(WeightsError, match=r"model\.json is of another version of cris") as caught:
        load_model(changed(folder, config=config))
    assert "new_option" in str(caught.value)


def test_an_unknown_system_lists_the_known_ones(folder: Path, tiny: Tiny) -> None:
    with pytest.raises(ConfigError, match="unknown system 'lavt'; there are cris"):
        build_model("lavt", tiny.params().cris, nn.Identity())
    with pytest.raises(ConfigError, match="unknown system 'lavt'"):
        load_model(changed(folder, system="lavt"))


def test_an_export_that_is_stopped_leaves_no_half_file(
    model: nn.Module, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(systems.os, "replace", stopped)
    with pytest.raises(KeyboardInterrupt):
        export_model(tmp_path, "cris", model.state_dict(), tiny.params().cris, tiny.clip, INFO)
    with pytest.raises(WeightsError, match="holds no model"):
        load_model(tmp_path)


def test_every_registered_system_can_be_configured() -> None:
    for name in systems.SYSTEMS:
        model, config = systems._parts(name)
        assert callable(model.build)
        assert asdict(config()) == json.loads(json.dumps(asdict(config())), object_hook=tuples)


def tuples(content: dict[str, Any]) -> dict[str, Any]:
    """JSON knows no tuples: what its lists were."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in content.items()}
