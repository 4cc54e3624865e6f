"""YAML of anybody, bounded before anything is built of it: its size, depth, the length of its numbers, and what its aliases
come to when each is written out ("a bomb" of ten lines is a billion entries). Nothing in it is resolved: `${...}` is refused.
"""

from __future__ import annotations

from io import StringIO
from pathlib import Path

import yaml
from omegaconf import DictConfig, OmegaConf

from ris_core.errors import ConfigError, list_problems
from ris_core.options import texts_that_ask

SIZE_CAP = 1_000_000  # bytes
DEPTH_CAP = 40
ENTRIES_CAP = 50_000  # with every alias written out
NUMBER_CAP = 400  # characters of a number; those of base 60 take long to read


def read_yaml(path: Path) -> DictConfig:
    """Read a file of sections. Raises ConfigError, and FileNotFoundError where there is none."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:  # a folder, say
        raise ConfigError(f"{path} is not a parameter file: {error}") from None
    if len(content) > SIZE_CAP:
        raise ConfigError(f"{path} is no parameter file: {len(content)} bytes, more than {SIZE_CAP}")
    try:
        text = content.decode()
        _check(text)
        raw = OmegaConf.load(StringIO(text))
    except OSError as error:  # a single value
        raise ConfigError(f"{path} is not a parameter file: {error}") from None
    except (yaml.YAMLError, ValueError) as error:  # the second: bytes that are no text, and dates that are none
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(raw, DictConfig):
        raise ConfigError(f"{path}: expected sections (a mapping), found {type(raw).__name__}")
    if asks := texts_that_ask(OmegaConf.to_container(raw, resolve=False)):
        raise ConfigError(list_problems(f"{path} cannot be used", asks))
    return raw


def _check(text: str) -> None:
    """Refuse what would be too much. The parser gives one event after another, and keeps none."""
    sizes: dict[str, int] = {}  # of what each anchor names
    open_nodes: list[tuple[str | None, int]] = []  # the anchor, and the entries before it
    entries = 0
    for event in yaml.parse(text, Loader=yaml.CSafeLoader):
        before = entries
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise yaml.YAMLError(f"the alias *{event.anchor[:40]} stands for nothing, or for what holds itself")
            entries += sizes[event.anchor]
        elif isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append((event.anchor, entries))
            entries += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_nodes.pop()
            if anchor is not None:
                sizes[anchor] = entries - before
        elif isinstance(event, yaml.ScalarEvent):
            entries += 1
            if event.anchor is not None:
                sizes[event.anchor] = 1
            if len(event.value) > NUMBER_CAP and event.value[:1] in "+-.0123456789" and event.implicit[0]:
                raise yaml.YAMLError(f"a number of {len(event.value)} characters")
        if len(open_nodes) > DEPTH_CAP:
            raise yaml.YAMLError(f"sections within sections, more than {DEPTH_CAP} deep")
        if entries > ENTRIES_CAP:
            raise yaml.YAMLError(f"more than {ENTRIES_CAP} entries, with its aliases written out")
