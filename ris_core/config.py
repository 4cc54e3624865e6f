"""The roof: `params.yaml` as one checked object, made of the options that stand beside what they configure.

`load_params` merges three layers, later ones winning: the defaults in code, the sections of `params.yaml`, and the preset
that its `preset` key names. Every unknown key, wrong type and value out of range, in the sections and in *all* presets, is
reported in one `ConfigError`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, make_dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf

from ris_core.data.refer.audit import PrepareParams
from ris_core.data.refer.reader import DatasetName
from ris_core.data.shapes.flavours import FLAVOURS
from ris_core.data.shapes.synthetic import SyntheticSpec
from ris_core.data.shards import PreprocessParams
from ris_core.errors import ConfigError, DataError, list_problems, short
from ris_core.evaluation.params import EvaluateParams
from ris_core.models.proposals import ProposalsParams
from ris_core.models.registry import first_stage, system_class, systems, trains
from ris_core.options import editable, misfits, option
from ris_core.training.params import SystemSection, TrainParams
from ris_core.training.pretrain import ClipParams
from ris_core.yaml_file import read_yaml

CLIPS = ("rn", "vit")  # each has a section `clip_<name>` and a folder data/clip/<name>
ORCHESTRATION = ("register", "cluster")  # sections that `pipelines.params` adds, and checks


@dataclass
class Params:
    """The whole of `params.yaml` but what the orchestration adds. The file has a section for each system, of its name."""

    preset: str = "default"
    synthetic_datasets: list[str] = option(["shapes"], choices=tuple(FLAVOURS))
    datasets: list[str] = option(["shapes"])  # who loads the file knows which there are
    systems: list[str] = option(["cris"], choices=tuple(systems()))
    clips: list[str] = option(["rn"], choices=CLIPS)
    captions: str = option("shapes", choices=tuple(FLAVOURS))
    synthesize: SyntheticSpec = field(default_factory=SyntheticSpec)
    prepare: PrepareParams = field(default_factory=PrepareParams)
    preprocess: PreprocessParams = field(default_factory=PreprocessParams)
    proposals: ProposalsParams = field(default_factory=ProposalsParams)
    clip_rn: ClipParams = field(default_factory=ClipParams)
    clip_vit: ClipParams = field(default_factory=ClipParams)
    train: TrainParams = field(default_factory=TrainParams)
    evaluate: EvaluateParams = field(default_factory=EvaluateParams)

    def of(self, system: str) -> SystemSection:
        """Give the section of a system. Raises ConfigError for an unknown one."""
        system_class(system)
        section = getattr(self, system)
        assert isinstance(section, SystemSection)
        return section

    def clip(self, name: str) -> ClipParams:
        """Give the section of a CLIP. Raises ConfigError for an unknown one."""
        known = {"rn": self.clip_rn, "vit": self.clip_vit}
        if name not in known:
            raise ConfigError(f"there is no CLIP '{name}'; there are {', '.join(CLIPS)}")
        return known[name]


Kind = TypeVar("Kind", bound=Params)


def load_params(path: str | Path = "params.yaml") -> Params:
    """Read, check and merge a parameter file. Sections of the orchestration are left alone.

    Raises ConfigError that lists every problem of the file, with the nearest known name for each unknown one.
    """
    return load_params_as(Params, path)


def load_params_as(
    kind: type[Kind], path: str | Path, dataset_name: Callable[[str], DatasetName] = DatasetName.parse
) -> Kind:
    """Do `load_params` with the sections that `kind` adds. `dataset_name` raises DataError for a dataset there is not."""
    path = Path(path)
    raw = _read(path)
    presets = raw.pop("presets", None) or {}
    if not isinstance(presets, DictConfig | dict):
        raise ConfigError(f"{path}: presets: expected a mapping of names to sections, found {short(presets)}")
    whole = _whole(kind)  # type: ignore[arg-type]  # classes are hashable, if not their instances
    schema = editable(OmegaConf.structured(whole))
    layers: dict[str, tuple[DictConfig, Mapping[str, Any]]] = {"": (_known(raw, schema), {})}
    problems: list[str] = []
    presets, wrong = _derived(presets)
    problems += wrong
    for name, preset in presets.items():
        layers[f"presets.{name}."] = (_known(preset, schema), raw)
    schemas: dict[type, DictConfig] = {}
    for prefix, (given, below) in layers.items():
        problems += misfits(whole, given, prefix, schemas)
        problems += _contradictions(schema, below, given, prefix, problems)
        problems += _impossible_trainings(given, prefix)
    problems += _unknown_datasets(raw, problems, dataset_name)
    chosen = str(raw.get("preset", schema.preset))
    if chosen not in presets and chosen != schema.preset:
        problems.append(f"preset: no preset named '{chosen}'; there are {', '.join(map(str, presets)) or 'none'}")
    if problems:
        raise ConfigError(list_problems(f"{path} cannot be used", problems))
    merged = OmegaConf.merge(raw, presets.get(chosen) or OmegaConf.create())
    params = OmegaConf.to_object(OmegaConf.merge(schema, _inherit(merged, schema)))
    assert isinstance(params, kind)
    problems = [
        f"{system}.clip: '{name}' is not among clips ({', '.join(params.clips)})"
        for system in params.systems
        if (name := params.of(system).clip) not in params.clips
    ]
    if problems:
        raise ConfigError(list_problems(f"{path} cannot be used", problems))
    return params


def _unknown_datasets(given: DictConfig, known: list[str], dataset_name: Callable[[str], DatasetName]) -> list[str]:
    """List datasets that there are not, unless the list itself is no list of names."""
    if "datasets" not in given or any(line.startswith("datasets") for line in known):
        return []
    problems = []
    for name in given.datasets:
        try:
            dataset_name(name)
        except DataError as error:
            problems.append(f"datasets: {error}")
    return problems


def _read(path: Path) -> DictConfig:
    try:
        return read_yaml(path)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such parameter file; run from the repository root, or pass its path") from None


def _derived(presets: Mapping[Any, Any]) -> tuple[dict[str, DictConfig], list[str]]:
    """Give the presets, each laid over the one that it names as `base`; and what is wrong with them."""
    found: dict[str, DictConfig] = {}
    waiting, problems = dict(presets), []
    for name, preset in presets.items():
        if preset is not None and not isinstance(preset, DictConfig):
            problems.append(f"presets.{name!s}: expected sections, found {short(preset)}")
            del waiting[name]
    while waiting:
        ready = [name for name, preset in waiting.items() if preset is None or preset.get("base") in (None, *found)]
        for name in ready:
            own = OmegaConf.create() if waiting[name] is None else waiting[name].copy()
            base = own.pop("base", None)
            merged = OmegaConf.merge(found[base], own) if base is not None else own
            assert isinstance(merged, DictConfig)
            found[str(name)] = merged
            del waiting[name]
        if not ready:
            problems += [
                f"presets.{name!s}.base: '{preset.base}' is no preset"
                + (" that ends" if preset.base in waiting else "")
                for name, preset in waiting.items()
            ]
            break
    return found, problems


def _known(given: DictConfig, schema: DictConfig) -> DictConfig:
    """Leave out the sections of an orchestration that is not asked for."""
    for name in ORCHESTRATION:
        if name not in schema:
            given.pop(name, None)
    return given


@cache
def _section(system: str) -> type[SystemSection]:
    """Make a `SystemSection` with the options of its system, and trainings only where it has them."""
    config = system_class(system).config_class
    trainings = {"initialise": first_stage(system) is not None, "train": trains(system)}
    own: list[Any] = [
        ("clip", str, option(CLIPS[0], choices=CLIPS)),
        ("model", config, field(default_factory=config)),
    ]
    for name, has in trainings.items():
        own.append((name, TrainParams | None, field(default_factory=TrainParams) if has else None))
    return make_dataclass(f"Section_{system}", own, bases=(SystemSection,))


@cache
def _whole(kind: type[Params]) -> type[Params]:
    """Give the parameters with a section for every system, so that a new one needs no line here."""
    own: list[Any] = [(system, _section(system), field(default_factory=_section(system))) for system in systems()]
    return make_dataclass(kind.__name__, own, bases=(kind,))


def _impossible_trainings(given: DictConfig, prefix: str) -> list[str]:
    """List trainings that are asked of a system which has none, and a system's only one left out."""
    problems = []
    for system, section in ((name, given.get(name)) for name in systems()):
        if not isinstance(section, DictConfig):
            continue
        for name, has in (("initialise", first_stage(system) is not None), ("train", trains(system))):
            if section.get(name) is not None and not has:
                problems.append(f"{prefix}{system}.{name}: {system} has no such training: set it to null")
        if trains(system) and "train" in section and section.train is None:
            problems.append(f"{prefix}{system}.train: {system} needs this training: it cannot be null")
    return problems


def _inherit(merged: Any, schema: DictConfig) -> DictConfig:
    """Lay the trainings of each system, whether the file has them or not, over the section `train`; null stays null."""
    for system in systems():
        for name in ("initialise", "train"):
            own = (merged.get(system) or {}).get(name, schema[system][name] and {})
            if own is not None:
                OmegaConf.update(merged, f"{system}.{name}", OmegaConf.merge(merged.get("train") or {}, own))
    assert isinstance(merged, DictConfig)
    return merged


def preset_overrides(path: str | Path = "params.yaml") -> list[str]:
    """List what the chosen preset sets over the sections of the file, as `key: section's value -> preset's value` lines."""
    raw = _read(Path(path))
    preset: Mapping[Any, Any] = _derived(raw.get("presets") or {})[0].get(str(raw.get("preset", "default"))) or {}
    return [
        f"{key}: {OmegaConf.select(raw, key)} -> {value}"
        for key, value in _leaves(preset, "")
        if OmegaConf.select(raw, key) != value
    ]


def _leaves(config: Mapping[Any, Any], prefix: str) -> list[tuple[str, object]]:
    found: list[tuple[str, object]] = []
    for key in config:
        value = config[key]
        found += _leaves(value, f"{prefix}{key}.") if isinstance(value, DictConfig) else [(f"{prefix}{key}", value)]
    return found


def _contradictions(
    schema: DictConfig, below: Mapping[str, Any], given: DictConfig, prefix: str, known: list[str]
) -> list[str]:
    """List problems that the sections of `given`, laid over those of `below`, find by their own checks: sizes that do not
    go together, say. Sections with problems that are known already are left out.
    """
    problems: list[str] = []
    for name in map(str, given):
        spoilt = any(line.startswith(f"{where}{name}{end}") for line in known for where in ("", prefix) for end in ".:")
        if name not in schema or not isinstance(schema._get_node(name), DictConfig) or spoilt:
            continue
        layers = [layer[name] for layer in (below, given) if layer.get(name) is not None]
        try:
            OmegaConf.to_object(OmegaConf.merge(schema[name], *layers))
        except ConfigError as error:
            problems += [f"{prefix}{name}: {line.removeprefix('  - ')}" for line in str(error).splitlines()[1:]]
    return problems
