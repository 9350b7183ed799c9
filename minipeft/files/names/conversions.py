"""Transformers' own tables of the weights that it renamed, or joined into others, since a checkpoint was written."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from minipeft.ecosystem.transformers_model import model_type


def conversions(model: nn.Module, *, add_legacy: bool = True) -> tuple[list[Any], list[Any]]:
    """The (renamings, converters) that transformers has for a model; both empty if it has none.

    `add_legacy`: those too that are for any model, such as ``LayerNorm.gamma``.
    """
    # Only a model of transformers' own is worth the import, and has imported it.
    if model_type(model) is None or not hasattr(model, "base_model_prefix") or "transformers" not in sys.modules:
        return [], []
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        table = get_model_conversion_mapping(model, add_legacy=add_legacy)  # type: ignore[arg-type]
    except Exception:  # what they make of a model that only looks like theirs
        return [], []
    renamings = [entry for entry in table if isinstance(entry, WeightRenaming)]
    return renamings, [entry for entry in table if isinstance(entry, WeightConverter)]
