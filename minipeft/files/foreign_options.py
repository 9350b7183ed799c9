"""Options that PEFT's and transformers' methods of the same names have: taken where they ask for nothing else than is done."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from minipeft.errors import ConfigError, hint, told

# Option -> (which values ask for nothing else than we do; why that is so, or what to do instead).
Harmless = Mapping[str, tuple[Callable[[object], bool], str]]


def only(*allowed: object) -> Callable[[object], bool]:
    """Whether a value is one of these objects."""
    return lambda value: any(value is choice for choice in allowed)


def check_options(verb: str, given: Mapping[str, Any], harmless: Harmless, own: Iterable[str]) -> None:
    """Check the options that were given to a verb besides its `own`.

    Raises:
        ConfigError: an option is unknown, or asks for what is not done.
    """
    for name, value in given.items():
        if name not in harmless:
            raise ConfigError(f"{verb} has no option {told(name)}{hint(name, [*own, *harmless])}.")
        is_harmless, instead = harmless[name]
        if not is_harmless(value):
            raise ConfigError(f"{verb}: {name}={told(value)} is not possible; {instead}.")
