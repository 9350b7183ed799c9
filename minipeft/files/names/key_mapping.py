"""The user's own table of names, ``key_mapping``: regular expressions and their replacements, as PEFT's."""

from __future__ import annotations

import time
from collections.abc import Mapping

from minipeft.errors import ConfigError, told, told_error
from minipeft.patterns import MAX_EXPRESSIONS, SECONDS_PER_OPTION, compiled

MAX_NAME = 2000  # characters that a name may have after it was replaced


def renamed_by(mapping: Mapping[str, str], names: Mapping[str, str], where: str = "key_mapping") -> dict[str, str]:
    """The names, by key, with the first expression that is found in each replaced everywhere in it.

    Raises:
        ConfigError: the table is not one of expressions to replacements, or takes longer than two seconds.
    """
    _check(mapping, where)
    table = [(pattern, compiled(pattern, where), replacement) for pattern, replacement in mapping.items()]
    end, renamed = time.monotonic() + SECONDS_PER_OPTION, {}
    for key, name in names.items():
        for pattern, expression, replacement in table:
            try:
                new, count = expression.subn(replacement, name, timeout=max(end - time.monotonic(), 0.001))
            except TimeoutError:
                raise ConfigError(f"{where}: {told(pattern, 100)} takes more than {SECONDS_PER_OPTION:g} s.") from None
            except Exception as error:  # the engine's own, as for a group that is not there
                raise ConfigError(f"{where}: {told(replacement, 100)} cannot replace ({told_error(error)}).") from None
            if count:
                name = new
                break
        if len(name) > MAX_NAME and name != names[key]:
            raise ConfigError(f"{where} makes a name of {len(name):,} characters; {MAX_NAME:,} are allowed.")
        renamed[key] = name
    return renamed


def _check(mapping: object, where: str) -> None:
    if not isinstance(mapping, Mapping) or not all(isinstance(text, str) for pair in mapping.items() for text in pair):
        raise ConfigError(
            f"{where} must map regular expressions to replacements, such as "
            f"{{'^language_model.model': 'model.language_model'}}, not {told(mapping, 100)}."
        )
    if len(mapping) > MAX_EXPRESSIONS:
        raise ConfigError(f"{where} has {len(mapping):,} entries; {MAX_EXPRESSIONS} are allowed.")
