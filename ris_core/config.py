"""`params.yaml` as typed sections: one dataclass per pipeline stage, checked as a whole before anything runs.

`load_params` merges three layers, later ones winning: the defaults below, the sections of `params.yaml`, and the preset
that its `preset` key names. Every unknown key, wrong type and value out of range, in the sections and in *all* presets, is
reported in one `ConfigError`.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from ris_core.data.flavours import FLAVOURS
from ris_core.data.refer import DATASETS
from ris_core.data.synthetic import SyntheticSpec
from ris_core.errors import ConfigError, list_problems
from ris_core.evaluation.metrics import PROTOCOLS
from ris_core.models.proposals import ProposalOptions
from ris_core.models.systems import has_first_stage, system_class, systems, trains

CLIPS = ("rn", "vit")  # each has a section `clip_<name>` and a folder data/clip/<name>


def option(
    default: Any, *, choices: tuple[Any, ...] | None = None, minimum: float | None = None, below: float | None = None
) -> Any:
    """A dataclass field whose value (each one, of a list) is one of `choices`, at least `minimum`, less than `below`."""
    metadata = {"choices": choices, "minimum": minimum, "below": below}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class PrepareParams:
    """Stage `prepare`: read the official REFER files and audit them."""

    on_bad: str = option("error", choices=("error", "skip"))
    strict: bool = False
    check_images: bool = True
    exclude_images_of: list[str] = option([], choices=tuple(DATASETS))


@dataclass
class PreprocessParams:
    """Stage `preprocess`: letterbox every image once and write the shards."""

    image_size: int = option(160, minimum=32)
    storage: str = option("pixels", choices=("pixels", "jpeg"))
    resample: str = option("opencv4", choices=("opencv4", "exact"))
    text: str = option("sent", choices=("sent", "raw"))
    images_per_shard: int = option(256, minimum=1)
    max_bad_images: float = option(0.01, minimum=0)


@dataclass
class ClipParams:
    """Stage `pretrain_clip`: train the small CLIP, or load real weights when `weights` is given."""

    architecture: str = "tiny_rn"
    weights: str | None = None
    image_size: int | None = option(None, minimum=16)
    seed: int = 0
    steps: int = option(600, minimum=1)
    scenes_per_step: int = option(24, minimum=2)
    lr: float = option(1e-3, minimum=0)
    weight_decay: float = option(0.05, minimum=0)
    warmup_steps: int = option(30, minimum=0)
    scene_loss: float = option(1.0, minimum=0)  # weight of scenes against their captions
    patch_loss: float = option(0.0, minimum=0)  # weight of an image's patches against each other, for a caption


@dataclass
class LossParams:
    """Pixel loss, a weighted sum of BCE, focal and dice terms; the default is the published one of CRIS: plain BCE."""

    bce_weight: float = option(1.0, minimum=0)
    positive_weight: float = option(1.0, minimum=0)  # of foreground pixels in the BCE
    dice_weight: float = option(0.0, minimum=0)
    focal_weight: float = option(0.0, minimum=0)
    focal_alpha: float = option(0.65, minimum=0, below=1)
    focal_gamma: float = option(2.0, minimum=0)


@dataclass
class TrainParams:
    """One training. Steps are the optimiser's own; `batch_images` is the global batch over all workers.

    The section `train` holds what all systems share; a system's own `train` (and `initialise`) is laid over it.
    """

    seed: int = 0
    epochs: int = option(8, minimum=1)
    steps_per_epoch: int | None = option(None, minimum=1)
    batch_images: int = option(16, minimum=1)
    expressions_per_image: int = option(2, minimum=1)
    word_len: int = option(17, minimum=3)
    optimizer: str = option("adamw", choices=("adam", "adamw"))
    lr: float = option(1e-3, minimum=0)
    backbone_lr_multiplier: float = option(0.5, minimum=0)
    first_epoch_backbone_multiplier: float | None = option(None, minimum=0)
    positional_embeddings: str = option("head", choices=("head", "backbone"))
    weight_decay: float = option(0.01, minimum=0)
    schedule: str = option("cosine", choices=("cosine", "multistep", "poly"))
    poly_power: float = option(1.0, minimum=0)
    poly_each: str = option("epoch", choices=("epoch", "step"))  # when a polynomial schedule lowers the rate
    warmup_steps: int = option(0, minimum=0)
    milestones: list[int] = option([35])
    gamma: float = option(0.1, minimum=0)
    ema_decay: float = option(0.0, minimum=0, below=1)
    clip_grad_norm: float = option(0.0, minimum=0)
    precision: str = option("auto", choices=("auto", "fp32", "bf16", "fp16"))
    compile: bool = False
    loss: LossParams = field(default_factory=LossParams)
    loader_workers: int = option(0, minimum=0)
    checkpoint_every_steps: int | None = option(None, minimum=1)
    keep: str = option("best", choices=("best", "last"))  # the epoch whose weights are kept; best by validation mIoU
    validate_split: str = "val"
    validate_images: int | None = option(None, minimum=1)
    validate_protocol: str = option("ours", choices=tuple(PROTOCOLS))


@dataclass(frozen=True)
class ProposalsParams(ProposalOptions):
    """Stage `propose`: the masks among which zero-shot systems choose."""

    splits: list[str] | None = None  # all but train


@dataclass
class EvaluateParams:
    """Stage `evaluate`: scores at original resolution, with baselines that show whether language is understood."""

    protocols: list[str] = option(["ours"], choices=tuple(PROTOCOLS))
    splits: list[str] | None = None
    shuffled_split: str | None = "val"
    bootstrap_samples: int = option(1000, minimum=1)
    images_per_batch: int = option(8, minimum=1)
    seed: int = 0


@dataclass
class RegisterParams:
    """Stage `register`: log the model to MLflow and move the alias when the score is better than the champion's."""

    split: str = "val"
    metric: str = option("mIoU", choices=("mIoU", "oIoU"))
    minimum: float = option(0.0, minimum=0)
    alias: str = "champion"
    experiment: str = "ris"


@dataclass
class ClusterParams:
    """Where work runs. Not tracked by DVC: the same result is expected from one worker or many."""

    train_workers: int = option(1, minimum=1)
    cpus_per_worker: int | None = option(None, minimum=1)
    use_gpu: str = option("auto", choices=("auto", "yes", "no"))
    max_failures: int = option(2, minimum=0)
    evaluate_actors: int = option(2, minimum=1)


def _section(system: str) -> Any:
    """The section of a system: the CLIP it starts from, its `model`, and its trainings, null where it has none."""
    config = system_class(system).config_class
    trainings = {"initialise": has_first_stage(system), "train": trains(system)}
    fields: list[Any] = [
        ("clip", str, option(CLIPS[0], choices=CLIPS)),
        ("model", config, field(default_factory=config)),
    ]
    for name, has in trainings.items():
        fields.append((name, TrainParams | None, field(default_factory=TrainParams) if has else None))
    return make_dataclass(f"Section_{system}", fields)


# So a fifth system needs no line here.
_SECTIONS = {system: _section(system) for system in systems()}
_Sections: Any = make_dataclass("_Sections", [(s, kind, field(default_factory=kind)) for s, kind in _SECTIONS.items()])


@dataclass
class Params(_Sections):
    """The whole of `params.yaml`; beside what is here it has a section for each system, of that name."""

    preset: str = "default"
    synthetic_datasets: list[str] = option(["shapes"], choices=tuple(FLAVOURS))
    datasets: list[str] = option(["shapes"], choices=tuple(DATASETS))
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
    register: RegisterParams = field(default_factory=RegisterParams)
    cluster: ClusterParams = field(default_factory=ClusterParams)


def load_params(path: str | Path = "params.yaml") -> Params:
    """Read, check and merge a parameter file.

    Raises ConfigError that lists every problem of the file, with the nearest known name for each unknown one.
    """
    path = Path(path)
    try:
        raw = OmegaConf.load(path)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such parameter file; run from the repository root, or pass its path") from None
    except (YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    except OSError as error:  # a folder, or a file that holds a single value
        raise ConfigError(f"{path} is not a parameter file: {error}") from None
    if not isinstance(raw, DictConfig):
        raise ConfigError(f"{path}: expected sections (a mapping), found {type(raw).__name__}")
    presets = raw.pop("presets", None) or {}
    if not isinstance(presets, DictConfig | dict):
        raise ConfigError(f"{path}: presets: expected a mapping of names to sections, found {presets!r}")
    schema = _schema()
    problems = _misfits(schema, raw, "")
    problems += _contradictions(schema, {}, raw, "", problems)
    problems += _impossible_trainings(raw, "")
    for name, preset in presets.items():
        prefix = f"presets.{name!s}."
        if isinstance(preset, DictConfig):
            problems += _misfits(schema, preset, prefix)
            problems += _contradictions(schema, raw, preset, prefix, problems)
            problems += _impossible_trainings(preset, prefix)
        elif preset is not None:
            problems.append(f"presets.{name!s}: expected sections, found {preset!r}")
    chosen = str(raw.get("preset", schema.preset))
    if chosen not in presets and chosen != schema.preset:
        problems.append(f"preset: no preset named '{chosen}'; there are {', '.join(map(str, presets)) or 'none'}")
    if problems:
        raise ConfigError(list_problems(f"{path} cannot be used", problems))
    params = OmegaConf.to_object(OmegaConf.merge(schema, _inherit(OmegaConf.merge(raw, presets.get(chosen) or {}))))
    assert isinstance(params, Params)
    problems = [
        f"{system}.clip: '{name}' is not among clips ({', '.join(params.clips)})"
        for system in params.systems
        if (name := getattr(params, system).clip) not in params.clips
    ]
    if problems:
        raise ConfigError(list_problems(f"{path} cannot be used", problems))
    return params


def _impossible_trainings(given: DictConfig, prefix: str) -> list[str]:
    """Trainings that are asked of a system which has none, and a system's only one left out."""
    problems = []
    for system, section in ((name, given.get(name)) for name in systems()):
        if not isinstance(section, DictConfig):
            continue
        for name, has in (("initialise", has_first_stage(system)), ("train", trains(system))):
            if section.get(name) is not None and not has:
                problems.append(f"{prefix}{system}.{name}: {system} has no such training: set it to null")
        if trains(system) and "train" in section and section.train is None:
            problems.append(f"{prefix}{system}.train: {system} needs this training: it cannot be null")
    return problems


def _inherit(merged: Any) -> Any:
    """The trainings of each system, whether the file has them or not, laid over the section `train`; null stays null."""
    schema = _schema()
    for system in systems():
        for name in ("initialise", "train"):
            own = (merged.get(system) or {}).get(name, schema[system][name] and {})
            if own is not None:
                OmegaConf.update(merged, f"{system}.{name}", OmegaConf.merge(merged.get("train") or {}, own))
    return merged


def preset_overrides(path: str | Path = "params.yaml") -> list[str]:
    """What the chosen preset sets over the sections of the file, as `key: section's value -> preset's value` lines."""
    raw = OmegaConf.load(path)
    assert isinstance(raw, DictConfig)
    preset = (raw.get("presets") or {}).get(raw.get("preset", "default")) or {}
    return [
        f"{key}: {OmegaConf.select(raw, key)} -> {value}"
        for key, value in _leaves(preset, "")
        if OmegaConf.select(raw, key) != value
    ]


def digest(value: Any) -> str:
    """A short stable name (12 hex digits of SHA-256) for JSON-able values and dataclasses: equal content, equal name."""
    text = json.dumps(value, sort_keys=True, default=lambda item: dataclasses.asdict(item))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _schema() -> DictConfig:
    return _editable(OmegaConf.structured(Params))


def _editable(schema: DictConfig) -> DictConfig:
    """The same schema; sections that are frozen dataclasses come read-only, also for the merge."""
    schema._set_flag("readonly", False)
    for name in schema:
        node = schema._get_node(name)
        if isinstance(node, DictConfig) and not node._is_none():
            _editable(node)
    return schema


def _section_type(hint: Any) -> tuple[Any, bool]:
    """The dataclass behind the type of a section, and whether the section may be null."""
    inner = [part for part in get_args(hint) if part is not type(None)]
    return (inner[0], True) if inner else (hint, False)


def _leaves(config: Any, prefix: str) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key in config:
        value = config[key]
        found += _leaves(value, f"{prefix}{key}.") if isinstance(value, DictConfig) else [(f"{prefix}{key}", value)]
    return found


def _misfits(schema: DictConfig, given: Any, prefix: str) -> list[str]:
    """Unknown keys, wrong types and values out of range of `given`, each as a line that begins with the key's full name."""
    problems: list[str] = []
    section = OmegaConf.get_type(schema)
    assert section is not None
    options = {item.name: item.metadata for item in dataclasses.fields(section)}
    hints = get_type_hints(section)
    for key in given:
        name = f"{prefix}{key!s}"
        if key not in options:
            near = difflib.get_close_matches(str(key), options, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"known here: {', '.join(options)}"
            problems.append(f"{name}: unknown parameter; {hint}")
            continue
        try:
            value = given[key]
            if isinstance(schema._get_node(key), DictConfig):
                inner, optional = _section_type(hints[key])
                if isinstance(value, DictConfig):
                    problems += _misfits(_editable(OmegaConf.structured(inner)), value, f"{name}.")
                elif value is not None or not optional:
                    known = ", ".join(item.name for item in dataclasses.fields(inner))
                    problems.append(f"{name}: expected a section with {known}, found {value!r}")
                continue
            typed = schema.copy()
            typed[key] = value
        except OmegaConfBaseException as error:
            problems.append(f"{name}: {str(error).splitlines()[0]}")
            continue
        entries = get_args(hints[key])
        if get_origin(hints[key]) is tuple and Ellipsis not in entries and len(typed[key]) != len(entries):
            problems.append(f"{name}: expected {len(entries)} values, found {list(typed[key])}")
        problems += [f"{name}: {problem}" for problem in _out_of_range(typed[key], options[key])]
    return problems


def _out_of_range(value: Any, limits: Mapping[str, Any]) -> list[str]:
    """What is wrong with a value of the right type (or with entries of a list), given the metadata of its field."""
    choices, minimum, below = (limits.get(name) for name in ("choices", "minimum", "below"))
    entries = value if isinstance(value, ListConfig) else [] if value is None else [value]
    problems: list[str] = []
    for each in entries:
        if choices is not None and each not in choices:
            problems.append(f"{each!r} is not one of {', '.join(map(str, choices))}")
        if minimum is not None and not each >= minimum:  # so written, not-a-number is below everything
            problems.append(f"{each} is below the minimum {minimum}")
        if below is not None and not each < below:
            problems.append(f"{each} is not below {below}")
    return problems


def _contradictions(
    schema: DictConfig, below: Mapping[str, Any], given: DictConfig, prefix: str, known: list[str]
) -> list[str]:
    """Problems that the sections of `given`, laid over those of `below`, find by their own checks: sizes that do not go
    together, say. Sections with problems that are known already are left out.
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
