"""Options: dataclass fields with the range of their values, standing beside what they configure; and how plain values,
as YAML and JSON have them, are checked against such a dataclass as a whole.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ris_core.errors import ConfigError, short

Plain = dict[str, Any]  # a dataclass as JSON has it: values of many types
T = TypeVar("T")


def option(
    default: Any,
    *,
    choices: tuple[Any, ...] | None = None,
    minimum: float | None = None,
    below: float | None = None,
    decides: bool = True,
) -> Any:
    """Make a dataclass field whose value (each one, of a list) is one of `choices`, at least `minimum`, less than `below`.

    `decides` says whether a result can depend on it; how far ahead batches are made, say, changes none. Like
    `dataclasses.field`, it is typed as what it stands for.
    """
    metadata = {"choices": choices, "minimum": minimum, "below": below, "decides": decides}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def deciding(value: Any) -> Any:
    """Give a value as JSON has it; of a section, without the options that decide no result.

    What is equal in this form gives the same outcome.
    """
    if dataclasses.is_dataclass(value):
        fields = (field for field in dataclasses.fields(value) if field.metadata.get("decides", True))
        return {field.name: deciding(getattr(value, field.name)) for field in fields}
    if isinstance(value, Mapping):
        return {key: deciding(each) for key, each in value.items()}
    return [deciding(each) for each in value] if isinstance(value, list | tuple) else value


def digest(value: Any) -> str:
    """Give a short stable name (12 hex digits of SHA-256) for JSON-able values and dataclasses: equal content, equal name."""
    text = json.dumps(deciding(value), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def from_plain(kind: type[T], content: object, where: str) -> T:
    """Make an instance of a dataclass of options from plain values that somebody may have changed, a JSON file's say.

    Raises ConfigError that names every unknown or missing key, wrong type and value out of range, under the title `where`.
    """
    if not isinstance(content, dict):
        known = ", ".join(field.name for field in _fields(kind))
        raise ConfigError(f"{where}: expected {known}; found {type(content).__name__}")
    problems = texts_that_ask(content)
    schema = editable(OmegaConf.structured(kind))
    if not problems:
        problems = misfits(kind, OmegaConf.create(content), "")
        required = (field for field in _fields(kind) if _is_required(field))
        problems += [f"{field.name}: missing" for field in required if field.name not in content]
    if problems:
        raise ConfigError(f"{where}: {'; '.join(problems)}")
    try:
        found = OmegaConf.to_object(OmegaConf.merge(schema, content))
    except OmegaConfBaseException as error:  # entries of a list that is no plain list of the field's type
        raise ConfigError(f"{where}: {str(error).splitlines()[0]}") from error
    assert isinstance(found, kind)
    return found


def _fields(kind: Any) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(kind)


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def texts_that_ask(content: object) -> list[str]:
    """Find texts anywhere in plain values that OmegaConf would resolve (`${oc.env:...}`): a file must not read its reader."""
    if isinstance(content, Mapping):
        return [problem for each in content.values() for problem in texts_that_ask(each)]
    if isinstance(content, list | tuple):
        return [problem for each in content for problem in texts_that_ask(each)]
    asks = isinstance(content, str) and ("${" in content or content == "???")  # the second is OmegaConf's "to be set"
    return [f"{str(content)[:40]!r}: ${{...}} is not used here"] if asks else []


def editable(schema: DictConfig) -> DictConfig:
    """Give the same schema; sections that are frozen dataclasses come read-only, also for the merge."""
    schema._set_flag("readonly", False)
    for name in schema:
        node = schema._get_node(name)
        if isinstance(node, DictConfig) and not node._is_none():
            editable(node)
    return schema


def misfits(section: type, given: DictConfig, prefix: str, schemas: dict[type, DictConfig] | None = None) -> list[str]:
    """List unknown keys, wrong types and values out of range for a dataclass of options, each a line that begins with the
    key's full name.

    Values are tried in `schemas`, one for each dataclass, which take longer to make than to use: who checks much gives the
    same dictionary each time.
    """
    schemas = {} if schemas is None else schemas
    problems: list[str] = []
    options = {item.name: item.metadata for item in dataclasses.fields(section)}
    hints = get_type_hints(section)
    if section not in schemas:
        schemas[section] = editable(OmegaConf.structured(section))
    tried = schemas[section]
    for key in given:
        name = f"{prefix}{key!s}"
        if key not in options:
            near = difflib.get_close_matches(str(key), options, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"known here: {', '.join(options)}"
            problems.append(f"{name}: unknown parameter; {hint}")
            continue
        try:
            value = given[key]
            if isinstance(tried._get_node(key), DictConfig) and not get_origin(_one_type(hints[key])):
                inner, optional = _section_type(hints[key])
                if isinstance(value, DictConfig):
                    problems += misfits(inner, value, f"{name}.", schemas)
                elif value is not None or not optional:
                    known = ", ".join(item.name for item in dataclasses.fields(inner))
                    problems.append(f"{name}: expected a section with {known}, found {short(value)}")
                continue
            tried[key] = value
        except (OmegaConfBaseException, OverflowError) as error:
            problems.append(f"{name}: {str(error).splitlines()[0]}")
            continue
        entries, typed = get_args(hints[key]), tried[key]
        if get_origin(hints[key]) is tuple and Ellipsis not in entries and len(typed) != len(entries):
            problems.append(f"{name}: expected {len(entries)} values, found {list(typed)}")
        values = typed if isinstance(typed, ListConfig) else [] if typed is None else [typed]
        problems += [f"{name}: {problem}" for problem in out_of_range(values, options[key])]
    return problems


def _section_type(hint: Any) -> tuple[Any, bool]:
    """Give the dataclass behind the type of a section, and whether the section may be null."""
    inner = [part for part in get_args(hint) if part is not type(None)]
    return (inner[0], True) if inner else (hint, False)


def _one_type(hint: Any) -> Any:
    """Give a type without its `| None`."""
    return _section_type(hint)[0] if type(None) in get_args(hint) else hint


def out_of_range(values: Iterable[Any], limits: Mapping[str, Any]) -> list[str]:
    """Tell what is wrong with values of the right type, given the metadata of their field."""
    choices, minimum, below = (limits.get(name) for name in ("choices", "minimum", "below"))
    problems: list[str] = []
    for each in values:
        if choices is not None and each not in choices:
            problems.append(f"{short(each)} is not one of {', '.join(map(str, choices))}")
        if minimum is not None and not each >= minimum:  # so written, not-a-number is below everything
            problems.append(f"{each} is below the minimum {minimum}")
        if below is not None and not each < below:
            problems.append(f"{each} is not below {below}")
    return problems
