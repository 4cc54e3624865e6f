"""What decides a stage's result: the values that it reads, and the code that it runs.

`values` is what stage `resolve` writes for DVC to watch, and `code` is what dvc.yaml lists (a test compares). Both make the
fingerprint of a training run, so that the same inputs resume and changed ones start afresh.
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from copy import copy
from functools import cache
from pathlib import Path
from typing import NoReturn

import ris_core
from pipelines.params import Params
from ris_core.models.registry import systems, trains
from ris_core.options import Plain, deciding

ROOT = Path(ris_core.__file__).parent.parent

# Which sections a stage reads, and which parts of the section of its system; `pretrain_clip` also reads that of its CLIP.
SECTIONS: dict[str, tuple[str, ...]] = {
    "synthesize": ("synthesize",),
    "prepare": ("prepare",),
    "preprocess": ("preprocess",),
    "propose": ("systems", "proposals"),
    "pretrain_clip": ("captions",),
    "initialise": ("train", "proposals"),
    "train": (),
    "evaluate": ("evaluate",),
    "register": ("register", "evaluate"),
    "compare": ("systems", "evaluate"),
}
PARTS = {"initialise": ("clip", "model", "initialise"), "train": ("model", "train")}
FREE = ("preset", "cluster")  # decide no result, and are read by any

# Code that decides no result: how a stage is started, where it runs, where its files lie, how errors read. The values that
# parameters end up with are watched as values, whatever code they come from.
PLUMBING = {
    "pipelines",  # its environment
    *(
        f"pipelines.{name}"
        for name in (
            *(
                "cluster",
                "fingerprint",
                "inputs",
                "journal",
                "lifeline",
                "params",
                "parts",
                "paths",
                "stage",
                "tracking",
            ),
            *("job", "outputs", "packing", "relocation", "submit", "transport", "versions"),
            *("by_hand", "outcome", "places", "predict"),
        )
    ),
    *(f"ris_core.{name}" for name in ("config", "errors", "files", "options", "storage", "yaml_file")),
    *("ris_core.evaluation.params", "ris_core.training.params"),
}
# What a module reads or names beside what it imports.
BESIDE = {
    "ris_core.models.clip": ("ris_core/models/configs/*.json",),
    "ris_core.data.refer.reader": ("ris_core/data/refer/*.json",),
    "pipelines.packaging": ("pipelines/serving_model.py",),
    # What is packaged, and how: there the code of errors and options runs with a stranger's files.
    "pipelines.serving_model": (
        "pipelines/packaging.py",
        *(f"ris_core/{name}.py" for name in ("errors", "files", "options")),
    ),
    "pipelines.report": ("pipelines/published.json", "pipelines/templates/*"),
}


def name(stage: str, item: str | None = None) -> str:
    """Give the name of a stage's values: `train-cris`, `pretrain_clip-rn`, `evaluate`."""
    return f"{stage}-{item}" if item else stage


def names(params: Params) -> Iterator[tuple[str, str | None]]:
    """List (stage, item) of all values there are, `item` being a system or a CLIP."""
    for stage in SECTIONS:
        items = params.systems if stage in PARTS else params.clips if stage == "pretrain_clip" else [None]
        yield from ((stage, item) for item in items)


def values(params: Params, stage: str, item: str | None = None) -> Plain:
    """Merge the values that decide what a stage makes, of the file, its preset and the defaults; as JSON has them."""
    if stage == "propose":
        wanted = not all(trains(system) for system in params.systems)
        return {"proposals": deciding(params.proposals) if wanted else None}
    if stage == "pretrain_clip" and item is not None:
        return {"captions": params.captions, "clip": deciding(params.clip(item))}
    if stage in PARTS and item is not None:
        section = params.of(item)
        own = {part: deciding(getattr(section, part)) for part in PARTS[stage]}
        if stage == "initialise":
            own["seed"] = params.train.seed
            own["proposals"] = None if trains(item) else deciding(params.proposals.options())
        return own
    return {section: deciding(getattr(params, section)) for section in SECTIONS[stage]}


def only_watched(params: Params, stage: str, item: str | None = None) -> Params:
    """Give the parameters without the sections that are not watched for a stage: reading one raises LookupError."""
    kept, allowed = copy(params), {*SECTIONS[stage], *FREE}
    if stage == "pretrain_clip":
        allowed.add(f"clip_{item}")
    if stage in PARTS and item is not None:
        section = copy(params.of(item))
        for part in dataclasses.fields(section):
            if part.name not in PARTS[stage]:
                setattr(section, part.name, Unwatched(f"{item}.{part.name}", stage))
        setattr(kept, item, section)
        allowed |= {item, "register"}  # of which the name of the experiment is read
    if stage == "initialise":
        kept.train = copy(params.train)
        for option in dataclasses.fields(kept.train):
            if option.name != "seed":
                setattr(kept.train, option.name, Unwatched(f"train.{option.name}", stage))
    for field in dataclasses.fields(kept):
        if field.name not in allowed:
            setattr(kept, field.name, Unwatched(field.name, stage))
    return kept


class Unwatched:
    """Stands where a value was that DVC does not watch for a stage; whatever is done with it raises LookupError.

    (Only `is None` cannot be caught.)
    """

    def __init__(self, name: str, stage: str):
        self.__dict__.update(_name=name, _stage=stage)

    def __getattr__(self, attribute: str) -> NoReturn:
        if attribute.startswith("__"):
            raise AttributeError(attribute)  # as pickle asks
        self._refuse(f".{attribute}")

    def _raise(self, *_: object) -> NoReturn:
        self._refuse()

    def _refuse(self, part: str = "") -> NoReturn:
        raise LookupError(f"stage {self._stage} reads {self._name}{part}: name it in pipelines.inputs.SECTIONS")

    __iter__ = __len__ = __bool__ = __eq__ = __str__ = __fspath__ = __hash__ = _raise


@cache
def code(module: str, of: tuple[str, ...] = ()) -> tuple[Path, ...]:
    """Find the files whose code decides what a module does, relative to the repository: what it imports, at its top or
    in functions, through any number of modules, and the folders of the systems `of`.
    """
    if _source(module) is None:
        raise ValueError(f"there is no module {module}")
    seen: set[str] = set()
    found: set[Path] = set()
    waiting = [module]
    while waiting:
        current = waiting.pop()
        source = _source(current)
        if source is None or current in seen or current in PLUMBING:
            continue
        seen.add(current)
        tree = ast.parse(source.read_text())
        if not _declares_nothing(tree):
            found.add(source.relative_to(ROOT))
        found |= {file.relative_to(ROOT) for pattern in BESIDE.get(current, ()) for file in ROOT.glob(pattern)}
        waiting += _imported(tree)
        waiting += [_dotted(file) for pattern in BESIDE.get(current, ()) for file in ROOT.glob(pattern)]
        if current == "ris_core.models.registry":
            waiting += [f"ris_core.models.{system}" for system in of]
    return tuple(sorted(found))


def code_of(stage: str, system: str | None = None) -> tuple[Path, ...]:
    """Find the files whose code decides what a stage makes; `compare` runs all systems, `propose` none."""
    of = {"compare": tuple(systems()), "propose": ()}.get(stage, (system,) if system else ())
    return code(f"pipelines.{stage}", of)


def digest_of(files: Sequence[Path]) -> str:
    """Give a short name for the content of some of the repository's files, wherever it lies."""
    found = hashlib.sha256()
    for file in files:
        found.update(file.as_posix().encode())
        found.update((ROOT / file).read_bytes())
    return found.hexdigest()[:12]


def _source(module: str) -> Path | None:
    """Find the file of a module of ours."""
    place = ROOT / module.replace(".", "/")
    candidates = (place.with_suffix(".py"), place / "__init__.py")
    ours = module.split(".")[0] in ("ris_core", "pipelines")
    return next((file for file in candidates if file.is_file()), None) if ours else None


def _dotted(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts) if file.suffix == ".py" else ""


def _declares_nothing(tree: ast.Module) -> bool:
    """Tell whether a module is a docstring alone."""
    return all(isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) for node in tree.body)


def _imported(tree: ast.AST) -> list[str]:
    """List the names imported anywhere below a node, but for type checkers; modules, and what is taken from them."""
    found: list[str] = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level or node.module is None:
                raise ValueError(f"`{ast.unparse(node)}`: write imports of ours in full, so that they can be followed")
            found += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        found += _imported(node)
    return found
