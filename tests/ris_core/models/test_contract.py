"""What every system promises, whichever folders there are: kind, options, roles, tokens; and that none needs another."""

from __future__ import annotations

import ast
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from tiny_world import IMAGE_SIZE, Tiny
from torch import nn

from ris_core import models as package
from ris_core.data.text import END_ID, PAD_ID, encode
from ris_core.errors import ConfigError
from ris_core.models import registry
from ris_core.models.clip import load_saved_clip
from ris_core.models.contract import MapSystem, ProposalSystem, Role, System, SystemConfig
from ris_core.models.losses import LossParams

SYSTEMS = registry.systems()
TRAINED = [name for name in SYSTEMS if registry.trains(name)]
FOLDER = Path(package.__path__[0])
SOURCE = FOLDER.parents[1]
TEXTS = ["ring", "the large red ring in the middle of the picture", "a blue star"]


def built(tiny: Tiny, system: str) -> System:
    """An untrained system of the small world."""
    section = tiny.params().of(system)
    clip = load_saved_clip({"rn": tiny.clip, "vit": tiny.clip_vit}[section.clip])
    return registry.build_model(system, section.model, clip)


def trained_by_the_loop(tiny: Tiny, system: str) -> dict[str, MapSystem]:
    """What is trained of a system: itself and, where it has one, its first stage."""
    whole, first = built(tiny, system), registry.first_stage(system)
    assert isinstance(whole, MapSystem)
    if first is None:
        return {system: whole}
    clip = load_saved_clip({"rn": tiny.clip, "vit": tiny.clip_vit}[tiny.params().of(system).clip])
    return {system: whole, "first stage": first(clip, whole.config)}


# What a system is


def test_there_are_systems_of_both_kinds() -> None:
    """Guards the tests below, which hold for none as well."""
    assert {"cris", "lts", "risclip"} <= set(TRAINED)
    assert "global_local" in set(SYSTEMS) - set(TRAINED)


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_system_is_of_one_kind(system: str, tiny: Tiny) -> None:
    kind = registry.system_class(system)
    assert issubclass(kind, MapSystem) != issubclass(kind, ProposalSystem)
    assert kind.__module__.startswith(f"ris_core.models.{system}.")
    model = built(tiny, system)
    assert type(model) is kind
    assert isinstance(model, nn.Module)
    assert registry.trains(system) == isinstance(model, MapSystem)


@pytest.mark.parametrize("system", SYSTEMS)
def test_its_options_are_a_frozen_dataclass(system: str, tiny: Tiny) -> None:
    options = registry.system_class(system).config_class
    assert issubclass(options, SystemConfig)
    assert options is not SystemConfig
    made: Any = options()
    assert "__dataclass_fields__" in vars(options), "one of its own, not only of its base"
    field = dataclasses.fields(made)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(made, field, getattr(made, field))
    assert built(tiny, system).config == tiny.params().of(system).model
    assert type(made.saved()) is options
    assert json.loads(json.dumps(dataclasses.asdict(made))), "model.json holds them"


@pytest.mark.parametrize("system", SYSTEMS)
def test_options_of_another_system_are_refused(system: str, tiny: Tiny) -> None:
    other = SYSTEMS[SYSTEMS.index(system) - 1]
    with pytest.raises(ConfigError, match=f"{system} takes a .*Config, got a .*Config"):
        registry.build_model(system, tiny.params().of(other).model, load_saved_clip(tiny.clip))


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_kept_clip_is_in_no_state_dict_and_never_moves(system: str, tiny: Tiny) -> None:
    model = built(tiny, system)
    left_out = set(dict(model.named_parameters())) - set(model.state_dict())
    assert bool(left_out) == model.keeps_clip
    assert not any(model.get_parameter(name).requires_grad for name in left_out)
    if first := registry.first_stage(system):
        assert first.keeps_clip == model.keeps_clip


# What is trained


@pytest.mark.parametrize("system", TRAINED)
def test_roles_cover_exactly_what_is_trained(system: str, tiny: Tiny) -> None:
    for name, model in trained_by_the_loop(tiny, system).items():
        expected = {key: parameter for key, parameter in model.named_parameters() if parameter.requires_grad}
        assert expected, name
        found = list(model.trained())
        assert [id(parameter) for _, parameter in found] == [id(parameter) for parameter in expected.values()], name
        assert [role for role, _ in found] == [model.role(key) for key in expected], name
        assert {role for role, _ in found} <= set(get_args(Role)), name
        assert "head" in {role for role, _ in found}, "something is new"


@pytest.mark.parametrize("system", TRAINED)
def test_what_is_frozen_has_no_role_in_training(system: str, tiny: Tiny) -> None:
    model = built(tiny, system)
    assert isinstance(model, MapSystem)
    first = next(parameter for _, parameter in model.trained())
    before = len(list(model.trained()))
    first.requires_grad_(False)
    assert len(list(model.trained())) == before - 1
    assert all(parameter is not first for _, parameter in model.trained())


@pytest.mark.parametrize("system", sorted(set(SYSTEMS) - set(TRAINED)))
def test_nothing_of_a_zero_shot_system_is_trained(system: str, tiny: Tiny) -> None:
    model = built(tiny, system)
    assert isinstance(model, ProposalSystem)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert registry.first_stage(system) is None
    assert json.loads(json.dumps(model.facts())), "a record holds them"


@pytest.mark.parametrize("system", TRAINED)
def test_a_first_stage_is_a_system_with_the_same_options(system: str, tiny: Tiny) -> None:
    found = trained_by_the_loop(tiny, system)
    whole, first = found[system], found.get("first stage")
    if first is None:
        with pytest.raises(TypeError, match=f"{type(whole).__name__} has no first stage"):
            whole.adopt({})
    else:
        assert isinstance(first, MapSystem)
        assert first.config_class is whole.config_class
        assert first.stride == whole.stride
        before = {name: value.clone() for name, value in whole.state_dict().items()}
        with torch.no_grad():
            for _, parameter in first.trained():
                parameter.add_(1.0)
        whole.adopt(first.state_dict())
        assert any(not torch.equal(value, before[name]) for name, value in whole.state_dict().items())


# What it answers


@pytest.mark.parametrize("system", TRAINED)
def test_maps_have_the_sizes_that_are_promised(system: str, tiny: Tiny) -> None:
    images = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(0))
    index = torch.tensor([1, 0, 1])
    for name, model in trained_by_the_loop(tiny, system).items():
        tokens = model.tokenize(TEXTS, 12)
        side = IMAGE_SIZE // model.stride
        assert side * model.stride == IMAGE_SIZE, name
        target = torch.zeros(3, 1, side, side, dtype=torch.uint8)
        loss = model.train().loss(model(images, tokens, index), target, LossParams())
        assert (loss.shape, loss.dtype) == ((), torch.float32), name
        with torch.inference_mode():
            features = model.eval().encode_image(images)
            assert model.segment(features, tokens, index).shape == (3, 1, side, side), name
            assert model.segment(features, tokens[:2]).shape == (2, 1, side, side), "each its own image"
            if model.locates:
                where = model.locate(features, tokens, index)
                assert where.shape == (3, 1, where.shape[-1], where.shape[-1]), name
                assert model.located(features, tokens, index, IMAGE_SIZE).shape == (3, 1, side, side), name


@pytest.mark.parametrize("system", TRAINED)
def test_only_one_that_locates_has_a_coarse_map(system: str, tiny: Tiny) -> None:
    model = built(tiny, system)
    assert isinstance(model, MapSystem)
    overrides = type(model).locate is not MapSystem.locate
    assert model.locates == overrides
    if not overrides:
        with pytest.raises(TypeError, match=f"{type(model).__name__} has no coarse map"):
            model.locate(None, model.tokenize(TEXTS, 12))


def test_a_coarse_map_is_enlarged_by_areas(tiny: Tiny) -> None:
    """A cell of a coarse map means an area, so that its value stands in the middle of it."""
    model = built(tiny, "lts")
    assert isinstance(model, MapSystem)
    with torch.inference_mode():
        features = model.eval().encode_image(torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE))
        tokens, index = model.tokenize(TEXTS[:1], 12), torch.zeros(1, dtype=torch.int64)
        coarse, fine = model.locate(features, tokens, index), model.located(features, tokens, index, IMAGE_SIZE)
    assert coarse.shape[-1] * 2 == fine.shape[-1]
    torch.testing.assert_close(nn.functional.avg_pool2d(fine, 2)[..., 1:-1, 1:-1], _smoothed(coarse)[..., 1:-1, 1:-1])


def _smoothed(x: torch.Tensor) -> torch.Tensor:
    """What bilinear doubling and averaging back does: 3/4 of a cell and 1/8 of each neighbour, along both axes."""
    kernel = torch.tensor([1 / 8, 6 / 8, 1 / 8])
    return nn.functional.conv2d(x, (kernel[:, None] * kernel)[None, None], padding=1)


@pytest.mark.parametrize("system", sorted(set(SYSTEMS) - set(TRAINED)))
def test_proposals_are_scored_for_every_expression(system: str, tiny: Tiny) -> None:
    model = built(tiny, system)
    assert isinstance(model, ProposalSystem)
    rgb = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    masks = np.zeros((2, 48, 64), bool)
    masks[0, :20, :20], masks[1, 25:, 30:] = True, True
    scores = model.score(model.encode_proposals(rgb, masks), TEXTS)
    assert scores.shape == (3, 2)
    assert scores.isfinite().all()


# Its text


@pytest.mark.parametrize("system", TRAINED)
def test_sentences_are_cut_at_the_length_and_padded_to_the_longest(system: str, tiny: Tiny) -> None:
    for model in trained_by_the_loop(tiny, system).values():
        lengths = [model.count_tokens(text) for text in TEXTS]
        longest = max(lengths)
        assert len(set(lengths)) > 1
        whole = model.tokenize(TEXTS, longest + 5)
        assert (whole.dtype, whole.shape) == (torch.int64, (3, longest)), "no longer than the longest"
        for row, length in zip(whole.tolist(), lengths, strict=True):
            assert row[length:] == [PAD_ID] * (longest - length)
            assert row[length - 1] != PAD_ID
        cut = model.tokenize(TEXTS, 5)
        assert cut.shape == (3, 5)
        for row, uncut, length in zip(cut.tolist(), whole.tolist(), lengths, strict=True):
            assert row[: min(length, 4)] == uncut[: min(length, 4)]
            if length > 5:
                assert row[-1] == uncut[length - 1], "a sentence that is cut ends as any other does"
        alone = model.tokenize(TEXTS[:1], longest)
        assert alone.tolist() == [whole[0, : lengths[0]].tolist()]


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_system_says_how_long_its_sentences_may_be(system: str, tiny: Tiny) -> None:
    model = built(tiny, system)
    assert isinstance(model.context_length, int)
    assert model.context_length >= model.count_tokens(TEXTS[1]) > model.count_tokens(TEXTS[0])


def test_by_default_sentences_are_clips_byte_pairs(tiny: Tiny) -> None:
    model = built(tiny, "cris")
    assert isinstance(model, MapSystem)
    assert model.tokenize(TEXTS[:1], 12).tolist() == [encode(TEXTS[0])]
    assert model.tokenize(TEXTS[1:2], 6).tolist() == [[*encode(TEXTS[1])[:5], END_ID]]
    assert [model.count_tokens(text) for text in TEXTS] == [len(encode(text)) for text in TEXTS]


# Nobody else's folder


def imports(path: Path) -> Iterator[str]:
    """Dotted names of all that a source file imports, wherever in it, relative ones written in full."""
    module = path.relative_to(SOURCE).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = ".".join(module[: len(module) - node.level]) if node.level else ""
            origin = ".".join(part for part in (above, node.module) if part)
            yield from (f"{origin}.{alias.name}" for alias in node.names)


def system_of(name: str) -> str | None:
    """The system into whose folder an imported name leads."""
    parts = name.split(".")
    return parts[2] if parts[:2] == ["ris_core", "models"] and len(parts) > 2 and parts[2] in SYSTEMS else None


def test_the_walk_sees_every_kind_of_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the tests below."""
    monkeypatch.setattr(f"{__name__}.SOURCE", tmp_path)
    path = tmp_path / "ris_core/models/cris/system.py"
    path.parent.mkdir(parents=True)
    lines = {
        "import ris_core.models.lts.layers": "lts",
        "from ris_core.models import risclip": "risclip",
        "from ..global_local import system": "global_local",
        "from .. import lts": "lts",
        "from .layers import Neck": "cris",
        "from ris_core.models.registry import systems": None,
        "import torch": None,
        "if TYPE_CHECKING:\n    import ris_core.models.lts": "lts",
        "def f():\n    from ris_core.models.risclip import RISCLIP": "risclip",
    }
    path.write_text("\n".join(lines))
    assert [system_of(name) for name in imports(path)] == list(lines.values())


@pytest.mark.parametrize("system", SYSTEMS)
def test_no_system_imports_another(system: str) -> None:
    files = sorted((FOLDER / system).rglob("*.py"))
    found = {path.relative_to(SOURCE).as_posix(): {system_of(name) for name in imports(path)} for path in files}
    assert any(system in names for names in found.values()), "its own parts"
    foreign = {path: others for path, names in found.items() if (others := names - {None, system})}
    assert foreign == {}


def test_the_rest_of_the_library_names_no_system() -> None:
    """A new system needs no line elsewhere: whoever wants one asks the registry."""
    own = {FOLDER / system for system in SYSTEMS}
    others = [path for path in sorted((SOURCE / "ris_core").rglob("*.py")) if not own & set(path.parents)]
    found = {path.relative_to(SOURCE).as_posix(): {system_of(name) for name in imports(path)} for path in others}
    assert "ris_core/models/registry.py" in found
    assert {path: names for path, names in found.items() if names - {None}} == {}
