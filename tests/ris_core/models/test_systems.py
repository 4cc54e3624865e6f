"""A trained model travels in a folder and comes back as it was; what is no such folder says so."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_world import ARCHITECTURE, VIT_ARCHITECTURE, Tiny
from torch import nn

from ris_core.config import Params
from ris_core.errors import ConfigError, WeightsError
from ris_core.models import systems
from ris_core.models.clip import load_saved_clip, read_clip_config
from ris_core.models.cris import CRIS, CRISConfig
from ris_core.models.lts import LTS, LTSConfig
from ris_core.models.risclip import RISCLIP
from ris_core.models.systems import build_model, export_model, load_model, read_model_info

INFO = {"word_len": 12, "image_size": 64, "dataset": "shapes", "val_mIoU": 1 / 3}


@pytest.fixture(scope="module")
def model(tiny: Tiny) -> nn.Module:
    torch.manual_seed(1)
    built = build_model("cris", tiny.params().cris.model, load_saved_clip(tiny.clip))
    for name, buffer in built.named_buffers():
        if name.endswith("running_var"):  # as after training
            buffer.uniform_(0.5, 2.0)
    return built.eval()


@pytest.fixture
def folder(model: nn.Module, tiny: Tiny, tmp_path: Path) -> Path:
    export_model(tmp_path, "cris", model.state_dict(), tiny.params().cris.model, tiny.clip, INFO)
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
    assert loaded.config == tiny.params().cris.model
    assert info == {**INFO, "system": "cris"}
    assert not loaded.training
    assert torch.equal(logits(loaded), logits(model))
    assert logits(model).std() > 0


def test_the_folder_is_readable_without_us(folder: Path, tiny: Tiny) -> None:
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    assert files == ["clip/clip.json", "model.json", "model.safetensors"]
    content = json.loads((folder / "model.json").read_text())
    assert content.keys() == {"format", "system", "config", "info"}
    assert content["format"] == 2
    assert content["system"] == "cris"
    assert json.loads((folder / "clip/clip.json").read_text())["architecture"] == ARCHITECTURE
    assert CRISConfig(**content["config"]) == tiny.params().cris.model
    assert content["info"] == INFO
    assert read_model_info(folder) == {"system": "cris", "config": content["config"], "info": INFO}


def test_weights_in_another_memory_layout_are_saved(model: nn.Module, tiny: Tiny, tmp_path: Path) -> None:
    odd = {
        name: value.to(memory_format=torch.channels_last) if value.ndim == 4 else value
        for name, value in model.state_dict().items()
    }
    export_model(tmp_path, "cris", odd, tiny.params().cris.model, tiny.clip, INFO)
    assert torch.equal(logits(load_model(tmp_path)[0]), logits(model))


@pytest.mark.parametrize("name", ["model.json", "model.safetensors"])
def test_a_missing_file_is_named(name: str, folder: Path) -> None:
    (folder / name).unlink()
    with pytest.raises(WeightsError, match=f"holds no model: {name} missing; train one, or pass its folder"):
        load_model(folder)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"nowhere holds no model: model\.json, model\.safetensors missing"):
        load_model(tmp_path / "nowhere")


def test_a_folder_that_lost_its_clip(folder: Path) -> None:
    (folder / "clip/clip.json").unlink()
    with pytest.raises(WeightsError, match=r"no saved CLIP in .*/clip: clip\.json is missing"):
        load_model(folder)


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
    for other in (1, 7):
        with pytest.raises(WeightsError, match=r"model\.json has another format than 2, the one read here"):
            load_model(changed(folder, format=other))


def test_weights_of_another_configuration_are_refused(folder: Path, tiny: Tiny) -> None:
    config = {**asdict(tiny.params().cris.model), "ffn_dim": 48}
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
    config = {**asdict(tiny.params().cris.model), "new_option": 1}
    with pytest.raises(WeightsError, match=r"model\.json is of another version of cris") as caught:
        load_model(changed(folder, config=config))
    assert "new_option" in str(caught.value)


def test_a_folder_holds_all_weights_so_that_nothing_is_fetched_again(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    whole = LTS.__init__

    def watched(self: LTS, clip: object, config: LTSConfig) -> None:
        asked.append(config.pretrained)
        whole(self, clip, replace(config, pretrained=False))  # type: ignore[arg-type]

    monkeypatch.setattr(LTS, "__init__", watched)
    config = LTSConfig(
        backbone="resnet18", pretrained=True, embedding_dim=4, gru_dim=4, fusion_dim=8, dim=8, head_dim=8
    )
    model = build_model("lts", config, nn.Identity())
    export_model(tmp_path, "lts", model.state_dict(), config, tiny.clip, INFO)
    load_model(tmp_path)
    assert asked == [True, False]


def test_an_unknown_system_lists_the_known_ones(folder: Path, tiny: Tiny) -> None:
    with pytest.raises(ConfigError, match="there is no system 'lavt'; there are cris, global_local, lts, risclip"):
        build_model("lavt", tiny.params().cris.model, nn.Identity())
    with pytest.raises(ConfigError, match="there is no system 'lavt'"):
        load_model(changed(folder, system="lavt"))


def test_an_export_that_is_stopped_leaves_no_half_file(
    model: nn.Module, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(systems.os, "replace", stopped)
    with pytest.raises(KeyboardInterrupt):
        export_model(tmp_path, "cris", model.state_dict(), tiny.params().cris.model, tiny.clip, INFO)
    with pytest.raises(WeightsError, match="holds no model"):
        load_model(tmp_path)


def test_every_registered_system_can_be_configured() -> None:
    assert list(systems.systems()) == ["cris", "global_local", "lts", "risclip"]
    for name in systems.systems():
        assert callable(systems.system_class(name).build)
        config = type(getattr(Params(), name).model)
        assert config is systems.system_class(name).config_class
        assert asdict(config()) == json.loads(json.dumps(asdict(config())), object_hook=tuples)
        assert config(**json.loads(json.dumps(asdict(config())))) == config()


def tuples(content: dict[str, Any]) -> dict[str, Any]:
    """JSON knows no tuples: what its lists were."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in content.items()}


# A system that leaves CLIP as it is


@pytest.fixture(scope="module")
def frozen(tiny: Tiny) -> nn.Module:
    """RISCLIP with no branch that is a no-op, as after training."""
    torch.manual_seed(1)
    built = build_model("risclip", tiny.params().risclip.model, load_saved_clip(tiny.clip_vit))
    with torch.no_grad():
        for parameter in built.state_dict().values():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return built.eval()


@pytest.fixture
def frozen_folder(frozen: nn.Module, tiny: Tiny, tmp_path: Path) -> Path:
    folder = tmp_path / "risclip"
    export_model(folder, "risclip", frozen.state_dict(), tiny.params().risclip.model, tiny.clip_vit, INFO)
    return folder


def test_a_frozen_clip_travels_beside_the_weights(frozen: nn.Module, frozen_folder: Path, tiny: Tiny) -> None:
    files = sorted(path.relative_to(frozen_folder).as_posix() for path in frozen_folder.rglob("*") if path.is_file())
    assert files == ["clip/clip.json", "clip/clip.safetensors", "model.json", "model.safetensors"]
    assert (frozen_folder / "clip/clip.safetensors").read_bytes() == (tiny.clip_vit / "clip.safetensors").read_bytes()
    assert read_clip_config(frozen_folder / "clip") == read_clip_config(tiny.clip_vit)
    assert read_clip_config(tiny.clip_vit)["architecture"] == VIT_ARCHITECTURE
    weights = load_file(frozen_folder / "model.safetensors")
    assert {name.split(".")[0] for name in weights} == {"locator", "decoder"}
    assert not [name for name in weights if "clip" in name]
    shapes = {tuple(value.shape) for value in weights.values()}
    assert (49408, 32) not in shapes, "CLIP's words are stored once, in its own file"
    loaded, info = load_model(frozen_folder)
    assert isinstance(loaded, RISCLIP)
    assert info == {**INFO, "system": "risclip"}
    assert loaded.config == tiny.params().risclip.model
    assert not any(module.training for module in loaded.modules())
    assert torch.equal(logits(loaded), logits(frozen))
    assert logits(frozen).std() > 0


def test_the_clip_of_a_models_folder_is_one_to_build_on(frozen: nn.Module, frozen_folder: Path, tiny: Tiny) -> None:
    """As stage `train` does with the folder that `initialise` left."""
    again = frozen_folder.parent / "again"
    export_model(again, "risclip", frozen.state_dict(), tiny.params().risclip.model, frozen_folder / "clip", INFO)
    assert torch.equal(logits(load_model(again)[0]), logits(frozen))


def test_a_clip_exchanged_for_another_is_refused(frozen_folder: Path) -> None:
    place = frozen_folder / "clip/clip.safetensors"
    weights = load_file(place)
    weights["visual.conv1.weight"] = weights["visual.conv1.weight"] + 1e-3
    save_file(weights, place)
    with pytest.raises(WeightsError, match=r"clip\.safetensors is not the file clip\.json was written for"):
        load_model(frozen_folder)


def test_a_frozen_clip_that_is_gone_is_missed(frozen_folder: Path) -> None:
    (frozen_folder / "clip/clip.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"clip has a clip\.json but no clip\.safetensors"):
        load_model(frozen_folder)


def test_weights_of_another_kind_of_system_are_refused(frozen: nn.Module, tiny: Tiny, tmp_path: Path) -> None:
    wider = replace(tiny.params().risclip.model, cfe_dim=32)
    export_model(tmp_path, "risclip", frozen.state_dict(), wider, tiny.clip_vit, INFO)
    with pytest.raises(WeightsError, match=r"does not fit the model\.json beside it") as caught:
        load_model(tmp_path)
    assert "locator.cfe.0.image_in.1.weight" in str(caught.value)


def test_who_keeps_clip_and_who_trains_it() -> None:
    assert systems.keeps_clip("risclip")
    assert not systems.keeps_clip("cris")
    with pytest.raises(ConfigError, match="there is no system 'lavt'"):
        systems.keeps_clip("lavt")
