"""The two tables of a vocabulary, input embedding and output head, and how many rows the base on disk has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import try_to_load_from_cache
from torch import Tensor, nn

from minipeft.files.atomic import read_limited
from minipeft.files.hub import is_hub_id
from minipeft.files.strict_json import MAX_CONFIG_BYTES
from minipeft.injection.wrapper import innermost
from minipeft.transformers_model import input_embedding, name_or_path, output_head


class Table(NamedTuple):
    """One table: the module in the model, perhaps a wrapper, and its weight (tokens, width)."""

    module: nn.Module
    weight: Tensor


def tables(model: nn.Module) -> dict[str, Table]:
    """The tables of a transformers model by name; of two that share a weight, only the first."""
    found: dict[int, tuple[str, Table]] = {}
    for module in (input_embedding(model), output_head(model)):
        weight = None if module is None else getattr(innermost(module), "weight", None)
        if module is None or not isinstance(weight, Tensor) or weight.ndim != 2 or not weight.is_floating_point():
            continue
        name = next((name for name, other in model.named_modules() if other is module), None)
        if name is not None:
            found.setdefault(id(weight), (name, Table(module, weight)))
    return dict(found.values())


def base_vocabulary(model: nn.Module) -> int | None:
    """``vocab_size`` in the ``config.json`` of the base that the model was loaded from, if that is on this machine."""
    place = name_or_path(model)
    if place is None or len(place) >= 4096:
        return None
    path: object = Path(place) / "config.json"
    if not Path(place).is_dir() and is_hub_id(place):
        path = try_to_load_from_cache(place, "config.json", revision=getattr(model.config, "_commit_hash", None))
    try:
        values = json.loads(read_limited(Path(path), MAX_CONFIG_BYTES)) if isinstance(path, str | Path) else {}
        size = values.get("vocab_size", (values.get("text_config") or {}).get("vocab_size"))
    except (ValueError, AttributeError, RecursionError):  # CheckpointError is a ValueError
        return None
    return size if isinstance(size, int) else None
