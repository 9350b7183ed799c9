"""transformers' published tables of renamed weights, the ones that `from_pretrained` and PEFT ask."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from minipeft.files.names.expert_places import tables
from minipeft.files.names.key_mapping import renamed_by

# Where the part of an adapter begins in a name; what stands before it is a module's.
_ADAPTER = re.compile(r"(.+?)\.((?:hada|ia3|lokr|lora|oft|vera)_.*|base_layer\..*)")


def published_names(model: nn.Module, names: Mapping[str, str]) -> dict[str, str]:
    """The names of a file, by key, as these tables have them for a model; as they are if there is no table.

    Only entries that rename are used. transformers 5 keeps its tables in ``conversion_mapping``; 4.52 to 4.57 kept them on
    the model's class.
    """
    renamings, _ = tables(model)
    if renamings:
        return {key: _renamed(name, renamings) for key, name in names.items()}
    table = getattr(model, "_checkpoint_conversion_mapping", None)
    return renamed_by(table, names, "transformers' table") if isinstance(table, dict) and table else dict(names)


def _renamed(name: str, renamings: list[Any]) -> str:
    """The name today. A table may speak of the weight, as of ``.gate.weight``, so a module is asked for by that."""
    match = _ADAPTER.fullmatch(name)
    asked = f"{match[1]}.weight" if match else name
    for renaming in renamings:
        asked = renaming.rename_source_key(asked)[0]
    return f"{asked.removesuffix('.weight')}.{match[2]}" if match else asked
