"""transformers' published tables of renamed weights, the ones that `from_pretrained` and PEFT ask."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from minipeft.files.names.key_mapping import renamed_by

Rename = Callable[[str], str]


def published_names(model: nn.Module, names: Mapping[str, str]) -> dict[str, str]:
    """The names of a file, by key, as these tables have them for a model; as they are if there is no table.

    Only entries that rename are used. transformers 5 keeps its tables in ``conversion_mapping``; 4.52 to 4.57 kept them on
    the model's class.
    """
    renamings = _renamings(model)
    if renamings:
        return {key: _renamed(name, renamings) for key, name in names.items()}
    table = getattr(model, "_checkpoint_conversion_mapping", None)
    return renamed_by(table, names, "transformers' table") if isinstance(table, dict) and table else dict(names)


def _renamings(model: nn.Module) -> list[Any]:
    # A model of transformers has imported it; nothing else is worth the time.
    if "transformers" not in sys.modules or not hasattr(model, "config") or not hasattr(model, "base_model_prefix"):
        return []
    try:
        tables = importlib.import_module("transformers.conversion_mapping")
        loading = importlib.import_module("transformers.core_model_loading")
        entries = tables.get_model_conversion_mapping(model)
        return [entry for entry in entries or () if isinstance(entry, loading.WeightRenaming)]
    except Exception:  # it is transformers' own affair, and differs by version: a file may fit without
        return []


def _renamed(name: str, renamings: list[Any]) -> str:
    for renaming in renamings:
        name = renaming.rename_source_key(name)[0]
    return name
