"""The exceptions users meet: each says what was wrong, the value, and what to do.

All problems of one input are collected and raised together, so that a user mends them in one round.
"""

from __future__ import annotations

from collections.abc import Sequence
from reprlib import Repr

SHOWN_PROBLEMS = 20

_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60


class RISError(Exception):
    """Base of every error this project raises on purpose. The message is meant to be read by a person."""


class ConfigError(RISError, ValueError):
    """A parameter or option is unknown, of the wrong type or out of range."""


class DataError(RISError, ValueError):
    """Input data is missing, malformed or contradictory."""


class WeightsError(RISError, ValueError):
    """Model weights or a checkpoint do not fit the model they were given to."""


class ClusterError(RISError, RuntimeError):
    """The cluster, tracking server or storage cannot do what was asked."""


def list_problems(title: str, problems: Sequence[str], remedy: str = "") -> str:
    """Write one message for many problems: a title with the count, the first 20, how many more, and what to do."""
    lines = [f"{title} ({len(problems)} problem{'s' if len(problems) != 1 else ''}):"]
    lines += [f"  - {problem}" for problem in problems[:SHOWN_PROBLEMS]]
    if len(problems) > SHOWN_PROBLEMS:
        lines.append(f"  ... and {len(problems) - SHOWN_PROBLEMS} more")
    if remedy:
        lines.append(remedy)
    return "\n".join(lines)


def short(value: object) -> str:
    """Give a value as a message shows it: a few dozen characters, whatever its size, never written out whole."""
    return _SHORT.repr(value)
