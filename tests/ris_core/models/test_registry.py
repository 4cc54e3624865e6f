"""A trained model travels in a folder and comes back as it was; what is no such folder says so."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_world import ARCHITECTURE, VIT_ARCHITECTURE, Tiny
from torch import nn

from ris_core import files
from ris_core.errors import ConfigError, WeightsError
from ris_core.files import file_sha256
from ris_core.models import registry
from ris_core.models.clip import load_saved_clip, read_clip_config
from ris_core.models.contract import MapSystem, ProposalSystem
from ris_core.models.cris.system import CRIS, CRISConfig
from ris_core.models.lts.system import LTS, LTSConfig
from ris_core.models.registry import (
    Description,
    ModelInfo,
    build_model,
    export_model,
    first_stage,
    load_model,
    read_description,
    system_class,
    systems,
    trains,
)
from ris_core.models.risclip.system import RISCLIP

ROOT = Path(__file__).parents[3]
INFO = ModelInfo(64, word_len=12, dataset="shapes", val_mIoU=1 / 3)


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
    loaded, described = load_model(folder)
    assert isinstance(loaded, CRIS)
    assert loaded.config == tiny.params().cris.model
    digest = file_sha256(folder / "model.safetensors")
    assert described == Description("cris", tiny.params().cris.model, INFO, digest)
    assert not loaded.training
    assert torch.equal(logits(loaded), logits(model))
    assert logits(model).std() > 0


def test_the_folder_is_readable_without_us(folder: Path, tiny: Tiny) -> None:
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    assert files == ["clip/clip.json", "model.json", "model.safetensors"]
    content = json.loads((folder / "model.json").read_text())
    assert content.keys() == {"format", "system", "config", "info", "weights_sha256"}
    assert content["format"] == 4
    assert content["weights_sha256"] == file_sha256(folder / "model.safetensors")
    assert content["system"] == "cris"
    assert json.loads((folder / "clip/clip.json").read_text())["architecture"] == ARCHITECTURE
    assert CRISConfig(**content["config"]) == tiny.params().cris.model
    assert content["info"] == asdict(INFO)
    assert (content["info"]["word_len"], content["info"]["dataset"], content["info"]["epoch"]) == (12, "shapes", None)
    described = Description("cris", tiny.params().cris.model, INFO, content["weights_sha256"])
    assert read_description(folder) == described


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
    for other in (1, 2, 3, 7, "3", None):
        with pytest.raises(WeightsError, match=r"model\.json has another format than 4, the one read here"):
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
    with pytest.raises(WeightsError, match=r"is not the file model\.json was written for \(checksums differ\)"):
        load_model(folder)
    changed(folder, weights_sha256=file_sha256(folder / "model.safetensors"))
    with pytest.raises(WeightsError, match=r"does not fit the model\.json beside it") as caught:
        load_model(folder)
    assert ("proj.txt.bias" if change == "missing" else "proj.txt.other") in str(caught.value)


def test_unknown_options_of_a_newer_version_are_refused(folder: Path, tiny: Tiny) -> None:
    config = {**asdict(tiny.params().cris.model), "new_option": 1}
    with pytest.raises(WeightsError, match=r"model\.json does not describe a model that can be built here") as caught:
        load_model(changed(folder, config=config))
    assert "config: new_option: unknown parameter" in str(caught.value)


def test_everything_that_is_wrong_in_a_description_is_told_at_once(folder: Path, tiny: Tiny) -> None:
    config = {**asdict(tiny.params().cris.model), "vis_dim": "wide", "num_head": 2, "dropout": 1.5}
    with pytest.raises(WeightsError) as caught:
        load_model(changed(folder, config=config))
    for text in ("vis_dim: Value 'wide'", "num_head: unknown parameter; did you mean 'num_heads'?"):
        assert text in str(caught.value)
    config = {**asdict(tiny.params().cris.model), "num_heads": 5}
    with pytest.raises(WeightsError, match="num_heads is 5: it must divide vis_dim 32"):
        load_model(changed(folder, config=config))
    info = {**asdict(INFO), "resample": "nearest", "word_len": "long", "imagesize": 3}
    del info["image_size"]
    with pytest.raises(WeightsError) as caught:
        load_model(changed(folder, config=asdict(tiny.params().cris.model), info=info))
    for text in ("resample: 'nearest' is not one of", "word_len: Value 'long'", "'image_size'?", "image_size: missing"):
        assert text in str(caught.value)


@pytest.mark.parametrize("key", ["system", "config", "info"])
@pytest.mark.parametrize("value", ["absent", None, 3, "text", [], {}, {"a": 1}, "${oc.env:HOME}", {"a": "${b}"}])
def test_a_description_that_was_changed_is_never_a_crash(key: str, value: object, folder: Path) -> None:
    changed(folder, **{key: value})
    if value == "absent":
        content = json.loads((folder / "model.json").read_text())
        del content[key]
        (folder / "model.json").write_text(json.dumps(content))
    defaults = (key, value) == ("config", {})  # the published sizes, which the CLIP beside them does not have
    with pytest.raises(
        WeightsError, match="does not hold together" if defaults else rf"{folder}/model\.json "
    ) as caught:
        load_model(folder)
    assert str(Path.home()) not in str(caught.value)


@pytest.mark.parametrize(
    "content", ["[]", "3", "null", '"text"', "<html></html>", "{", "\x00", '{"format": 4}', "[" * 9999]
)
def test_a_description_that_is_none(content: str, folder: Path) -> None:
    (folder / "model.json").write_text(content)
    with pytest.raises(WeightsError, match=rf"{folder}/model\.json .* again") as caught:
        load_model(folder)
    if content.startswith('{"format"'):
        assert "system, config, info, weights_sha256 missing" in str(caught.value)


def test_weights_that_are_a_web_page_are_named(folder: Path) -> None:
    for content, what in (
        (b"<!DOCTYPE html><html>404</html>", "a saved web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer"),
    ):
        (folder / "model.safetensors").write_bytes(content)
        with pytest.raises(WeightsError, match=rf"{folder}/model\.safetensors is {what}, not"):
            load_model(folder)


def test_a_configuration_of_another_system_is_refused(tiny: Tiny) -> None:
    with pytest.raises(ConfigError, match="lts takes a LTSConfig, got a CRISConfig"):
        build_model("lts", CRISConfig(), load_saved_clip(tiny.clip))


def test_a_folder_holds_all_weights_so_that_nothing_is_fetched_again(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    whole = LTS.__init__

    def watched(self: LTS, clip: object, config: LTSConfig) -> None:
        asked.append(config.pretrained)
        whole(self, clip, replace(config, pretrained=False))  # type: ignore[arg-type]  # nothing is fetched in tests

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
    with pytest.raises(WeightsError, match=r"model\.json does not describe .*: there is no system 'lavt'"):
        load_model(changed(folder, system="lavt"))


def test_an_export_that_is_stopped_leaves_no_half_file(
    model: nn.Module, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "replace", stopped)
    with pytest.raises(KeyboardInterrupt):
        export_model(tmp_path, "cris", model.state_dict(), tiny.params().cris.model, tiny.clip, INFO)
    with pytest.raises(WeightsError, match="holds no model"):
        load_model(tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_the_files_of_a_model_are_as_readable_as_others(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "usual").touch()
    modes = {path.stat().st_mode for path in folder.rglob("*") if path.is_file()}
    assert modes == {(tmp_path / "usual").stat().st_mode}


def test_every_registered_system_can_be_configured(tiny: Tiny) -> None:
    assert systems() == ["cris", "global_local", "lts", "risclip"]
    for name in systems():
        assert issubclass(system_class(name), MapSystem | ProposalSystem)
        assert not getattr(system_class(name), "__abstractmethods__", None), "it has all that the contract asks"
        config = type(tiny.params().of(name).model)
        assert config is system_class(name).config_class
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
    loaded, described = load_model(frozen_folder)
    assert isinstance(loaded, RISCLIP)
    assert (described.system, described.info) == ("risclip", INFO)
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
    assert system_class("risclip").keeps_clip
    assert not system_class("cris").keeps_clip
    with pytest.raises(ConfigError, match="there is no system 'lavt'"):
        system_class("lavt")


def test_who_is_trained_and_in_how_many_stages() -> None:
    assert [name for name in systems() if trains(name)] == ["cris", "lts", "risclip"]
    assert [name for name in systems() if first_stage(name)] == ["risclip"]
    for asked in (trains, first_stage):
        with pytest.raises(ConfigError, match="there is no system 'lavt'"):
            asked("lavt")


def test_a_system_is_imported_without_its_neighbours() -> None:
    code = (
        "import sys; from ris_core.models.registry import system_class, systems; names = systems(); system_class('cris');"
        "print([name for name in names if f'ris_core.models.{name}' in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "['cris']\n"


def test_a_folder_that_names_no_system_is_a_fault_of_its_author(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/__init__.py").write_text("SYSTEM = dict\n")
    monkeypatch.setattr(registry.models, "__path__", [*registry.models.__path__, str(tmp_path)])
    assert "mine" in systems()
    with pytest.raises(TypeError, match=r"mine\.SYSTEM is <class 'dict'>, not a MapSystem or a ProposalSystem"):
        system_class("mine")
    sys.modules.pop("ris_core.models.mine")
