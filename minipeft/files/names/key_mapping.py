"""Names replaced by tables of expressions: the user's own, ``key_mapping`` as PEFT's, and transformers' published ones."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from typing import Any

from torch import nn

from minipeft.errors import ConfigError, told, told_error
from minipeft.files.names.expert_places import tables
from minipeft.patterns import MAX_EXPRESSIONS, SECONDS_PER_OPTION, compiled

MAX_NAME = 2000  # characters that a name may have after it was replaced
# Where the part of an adapter begins in a name; what stands before it is a module's.
_ADAPTER = re.compile(r"(.+?)\.((?:hada|ia3|lokr|lora|oft|vera)_.*|base_layer\..*)")


def renamed_by(mapping: Mapping[str, str], names: Mapping[str, str]) -> dict[str, str]:
    """The names, by key, with the first expression that is found in each replaced everywhere in it.

    Raises:
        ConfigError: the table is not one of expressions to replacements, or takes longer than two seconds.
    """
    _check(mapping)
    table = [(pattern, compiled(pattern, "key_mapping"), replacement) for pattern, replacement in mapping.items()]
    end, renamed = time.monotonic() + SECONDS_PER_OPTION, {}
    for key, name in names.items():
        for pattern, expression, replacement in table:
            try:
                new, count = expression.subn(replacement, name, timeout=max(end - time.monotonic(), 0.001))
            except TimeoutError:
                raise ConfigError(
                    f"key_mapping: {told(pattern, 100)} takes more than {SECONDS_PER_OPTION:g} s."
                ) from None
            except Exception as error:  # the engine's own, as for a group that is not there
                raise ConfigError(
                    f"key_mapping: {told(replacement, 100)} cannot replace ({told_error(error)})."
                ) from None
            if count:
                name = new
                break
        if len(name) > MAX_NAME and name != names[key]:
            raise ConfigError(f"key_mapping makes a name of {len(name):,} characters; {MAX_NAME:,} are allowed.")
        renamed[key] = name
    return renamed


def _check(mapping: object) -> None:
    if not isinstance(mapping, Mapping) or not all(isinstance(text, str) for pair in mapping.items() for text in pair):
        raise ConfigError(
            f"key_mapping must map regular expressions to replacements, such as "
            f"{{'^language_model.model': 'model.language_model'}}, not {told(mapping, 100)}."
        )
    if len(mapping) > MAX_EXPRESSIONS:
        raise ConfigError(f"key_mapping has {len(mapping):,} entries; {MAX_EXPRESSIONS} are allowed.")


def published_names(model: nn.Module, names: Mapping[str, str]) -> dict[str, str]:
    """The names of a file, by key, as transformers' tables of renamed weights have them for a model."""
    renamings, _ = tables(model)
    return {key: _renamed(name, renamings) for key, name in names.items()} if renamings else dict(names)


def _renamed(name: str, renamings: list[Any]) -> str:
    """The name today. A table may speak of the weight, as of ``.gate.weight``, so a module is asked for by that."""
    match = _ADAPTER.fullmatch(name)
    asked = f"{match[1]}.weight" if match else name
    for renaming in renamings:
        asked = renaming.rename_source_key(asked)[0]
    return f"{asked.removesuffix('.weight')}.{match[2]}" if match else asked
