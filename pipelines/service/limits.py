"""What a request may cost, and what all of them together may."""

from __future__ import annotations

from dataclasses import dataclass

from ris_core.errors import ConfigError, list_problems

MIB = 1024**2
MAX_TEXT = (
    500  # characters of an expression: systems read a few dozen words, and the time of byte pairs grows with the square
)


@dataclass(frozen=True)
class Limits:
    """The limits of a service. Raises ConfigError, naming all that are out of range.

    max_body: bytes of a request. max_expressions: of a request. max_pixels: of an image. timeout: seconds from a request's
    first byte to its answer. queue: requests at once, the waiting and the answered. cache: bytes of encoded images, in all.
    """

    max_body: int = 20 * MIB
    max_expressions: int = 64
    max_pixels: int = 25_000_000
    timeout: float = 30.0
    queue: int = 32
    cache: int = 512 * MIB

    def __post_init__(self) -> None:
        least = {"max_body": 1, "max_expressions": 1, "max_pixels": 1, "queue": 1, "cache": 0}
        problems = [
            f"{name} is {getattr(self, name)}: use {minimum} or more"
            for name, minimum in least.items()
            if getattr(self, name) < minimum
        ]
        if not 0 < self.timeout <= 3600:  # so written, not-a-number is outside
            problems.append(f"timeout is {self.timeout}: use more than 0 and at most 3600 seconds")
        if problems:
            raise ConfigError(list_problems("the limits of the service are wrong", problems))
