"""Checks on the value of one option; each raises a `ConfigError` that names the option, the value and what is allowed."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from minipeft.config.patterns import check_table, compiled
from minipeft.ecosystem.wrapper_names import unwrapped_name
from minipeft.errors import ConfigError, hint, shown, told

MAX_RANK = 2**16


def rank(name: str, value: object) -> int:
    """The rank of an update."""
    return integer(name, value, at_least=1, at_most=MAX_RANK)


def alpha(name: str, value: object) -> float:
    """The alpha of a scaling: a number above zero."""
    return number(name, value, above=0)


def integer(name: str, value: object, at_least: int, at_most: int = 2**31) -> int:
    """An integer within bounds, not a bool."""
    if isinstance(value, bool) or not isinstance(value, int) or not at_least <= value <= at_most:
        raise ConfigError(f"{name} must be an integer from {at_least} to {at_most}, not {told(value)}.")
    return value


def number(
    name: str, value: object, above: float | None = None, at_least: float | None = None, below: float | None = None
) -> float:
    """A finite number within bounds, not a bool."""
    # NaN fails the comparison too.
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max:
        over = (above is None or value > above) and (at_least is None or value >= at_least)
        if over and (below is None or value < below):
            return value
    limits = ((">", above), (">=", at_least), ("<", below))
    bounds = " and".join(f" {sign} {bound:g}" for sign, bound in limits if bound is not None)
    raise ConfigError(f"{name} must be a finite number{bounds}, not {told(value)}.")


def plain(value: float) -> float:
    """A number as a file has it: an integer if it is one."""
    return int(value) if value == int(value) else value


def flag(name: str, value: object) -> bool:
    """True or False and nothing that merely counts as one."""
    if not isinstance(value, bool):
        raise ConfigError(f"{name} must be True or False, not {told(value)}.")
    return value


def flags(**values: object) -> None:
    """Check the arguments of these names as `flag` does."""
    for name, value in values.items():
        flag(name, value)


def checked_module(model: object) -> nn.Module:
    """A model, and not its name or its folder."""
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model must be a torch.nn.Module, not {type(model).__name__}.")
    return model


def one_of(name: str, value: object, allowed: Sequence[object]) -> Any:
    """One of the allowed values, of the same type."""
    if not any(type(value) is type(choice) and value == choice for choice in allowed):
        close = hint(value, [a for a in allowed if isinstance(a, str)]) if isinstance(value, str) else ""
        raise ConfigError(f"{name} must be one of {shown(allowed, 20)}, not {told(value)}{close}.")
    return value


def names(name: str, value: object) -> tuple[str, ...] | None:
    """A list of non-empty strings as a tuple without repeats; a set is sorted, so that files do not depend on hashing."""
    if value is None:
        return None
    entries = sorted(value, key=str) if isinstance(value, set | frozenset) else value
    if (
        not isinstance(entries, list | tuple)
        or not entries
        or not all(isinstance(entry, str) and entry for entry in entries)
    ):
        raise ConfigError(f"{name} must be a non-empty list of non-empty strings, not {told(value, 200)}.")
    return tuple(dict.fromkeys(map(unwrapped_name, entries)))


def names_or_regex(name: str, value: object) -> tuple[str, ...] | str | None:
    """A list of suffixes, or a regular expression that compiles."""
    if isinstance(value, str):
        if not value:
            raise ConfigError(
                f"{name} is an empty string; give a list of suffixes such as ['c_attn'], or a regular expression."
            )
        compiled(value, name)
        return unwrapped_name(value)
    return names(name, value)


def layer_indices(name: str, value: object) -> tuple[int, ...]:
    """One index, or several in a list, tuple, range or set."""
    if isinstance(value, set | frozenset | Sequence) and not isinstance(value, str | bytes):
        indices = [integer(name, index, at_least=0) for index in value]
        return tuple(sorted(indices) if isinstance(value, set | frozenset) else indices)
    return (integer(name, value, at_least=0),)


def pattern_table(name: str, value: object, check: Any) -> dict[str, Any]:
    """A mapping from regular expressions to values that each pass `check(name, value)`; a copy."""
    if not isinstance(value, Mapping):
        raise ConfigError(f"{name} must map name patterns to values, not {told(value, 200)}.")
    for key, item in value.items():
        if not isinstance(key, str) or not key:
            raise ConfigError(f"{name}: the key {told(key)} is not a name pattern.")
        check(f"{name}[{told(key)}]", item)
    check_table(value, name)
    return {unwrapped_name(key): item for key, item in value.items()}
