"""`dataset.yaml`, which says what a dataset of one's own is made of. It lies beside the files, so that they travel together.

Of a mixed dataset it names the parts instead (`ris_core.data.own.mixed`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ris_core.data.own.mixed import mixed_name, mixture_problems
from ris_core.data.refer.reader import DATASETS, DatasetName
from ris_core.errors import ConfigError, DataError, list_problems
from ris_core.options import from_plain, option
from ris_core.yaml_file import read_yaml

FILE = "dataset.yaml"
SPLITS = ("train", "val", "test")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+]{0,39}")  # it becomes a part of file names, model names and URLs


@dataclass(frozen=True)
class Description:
    """What is read, by paths relative to the dataset's folder, and how images are drawn for the splits.

    expressions: a table, .csv, .jsonl, .json or .parquet, of columns `image`, `text`, and `annotation` or `mask`; a column
    `split` (train, val, test) decides in place of the draw. annotations: a COCO instances file; without it, masks are read.
    val, test: the shares of images that are drawn with `seed`, all expressions about an image together.
    """

    expressions: str = "expressions.csv"
    annotations: str | None = None
    val: float = option(0.1, minimum=0, below=1)
    test: float = option(0.1, minimum=0, below=1)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.val + self.test >= 1:
            problem = f"val and test are {self.val} and {self.test}: nothing is left to train on"
            raise ConfigError(list_problems(FILE, [problem]))


def describes_own(root: Path) -> bool:
    """Tell whether the folder holds a dataset of one's own."""
    return (root / FILE).is_file()


def read_description(root: Path) -> Description:
    """Read `dataset.yaml` of a folder. Raises ConfigError that lists everything wrong in it."""
    return from_plain(Description, _content(root), str(root / FILE))


def read_parts(root: Path) -> dict[str, int]:
    """Give the parts of a mixed dataset, with how often each comes; none of any other. Raises ConfigError if they are none."""
    content = _content(root)
    if "mixed" not in content:
        return {}
    problems = [f"{key}: a mixed dataset has nothing but `mixed`" for key in content if key != "mixed"]
    problems += mixture_problems(content["mixed"])
    if problems:
        raise ConfigError(list_problems(f"{root / FILE} cannot be used", problems))
    return {str(part): times for part, times in content["mixed"].items()}


def _content(root: Path) -> dict[str, Any]:
    content: Any = OmegaConf.to_container(read_yaml(root / FILE))
    assert isinstance(content, dict)
    return content


def named(root: Path) -> DatasetName:
    """Give the name of the dataset in a folder of that name, with its splits. Raises DataError or ConfigError if it has none."""
    name = root.name
    if not describes_own(root):
        return DatasetName.parse(name)
    own = own_name(name)
    parts = read_parts(root)
    for part in parts:
        if read_parts_of(root.parent / part):
            raise ConfigError(f"{root / FILE}: {part} is mixed itself: name its parts here")
    return mixed_name(name, {part: named(root.parent / part) for part in parts}) if parts else own


def read_parts_of(root: Path) -> dict[str, int]:
    """Do `read_parts` of a folder that need not be one's own."""
    return read_parts(root) if describes_own(root) else {}


def own_name(name: str) -> DatasetName:
    """Give the name of a dataset of one's own. Raises DataError where it is none, or that of a published dataset."""
    if name in DATASETS:
        raise DataError(f"'{name}' is a published dataset: give your own another name (its folder has a {FILE})")
    if not NAME.fullmatch(name):
        raise DataError(
            f"'{name[:60]}' cannot name a dataset: use letters, digits and _ . +, 40 at most, the first a letter or digit"
        )
    return DatasetName(name, folder=".", split_by="own", splits=SPLITS)
