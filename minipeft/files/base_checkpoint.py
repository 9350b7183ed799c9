"""The checkpoint that a base was loaded from, if it is on this machine: its configuration and the shapes of its tables."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from torch import nn

from minipeft.ecosystem.transformers_model import name_or_path
from minipeft.errors import CheckpointError
from minipeft.files.hub import may_be_base_id
from minipeft.files.reading import MAX_CONFIG_BYTES, read_limited
from minipeft.files.tensor_file import MAX_HEADER_BYTES, open_tensors

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"


def base_config(model: nn.Module) -> dict[str, Any]:
    """``config.json`` of the base; empty if it is not here, or is not an object."""
    values = _read_json(_find(model, CONFIG), MAX_CONFIG_BYTES)
    return values if isinstance(values, dict) else {}


def stored_rows(model: nn.Module, table: str, width: int) -> int | None:
    """How many rows a table, named by its module, has in the base's safetensors files; None if that cannot be said.

    A checkpoint may have other names for the outer modules, so the key that ends most alike is taken.
    """
    weights, index = _find(model, WEIGHTS), _read_json(_find(model, INDEX), MAX_HEADER_BYTES)
    try:
        if weights is not None:
            shapes = dict(open_tensors(weights).shapes)
        else:
            key_to_file = index.get("weight_map") if isinstance(index, dict) else None
            table_of_files = key_to_file if isinstance(key_to_file, dict) else {}
            places = {key: file for key, file in table_of_files.items() if isinstance(file, str)}
            files = {_find(model, places[key]) for key in _closest(table, list(places))}
            shapes = {k: v for path in files if path is not None for k, v in open_tensors(path).shapes.items()}
    except CheckpointError:
        return None
    rows = {
        shapes[key][0] for key in _closest(table, list(shapes)) if len(shapes[key]) == 2 and shapes[key][1] == width
    }
    return rows.pop() if len(rows) == 1 else None


def _closest(table: str, keys: list[str]) -> list[str]:
    """The keys of weights that share the most last components with a table's, at least the module's own name."""
    wanted = [*table.split("."), "weight"]

    def alike(key: str) -> int:
        pairs = zip(reversed(key.split(".")), reversed(wanted), strict=False)
        return len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))

    scores = {key: alike(key) for key in keys}
    best = max(scores.values(), default=0)
    return [key for key, score in scores.items() if score == best >= 2]


def cached(place: str, revision: str | None = None) -> Path | None:
    """Where the files of a model are on this machine: its directory, or the hub's cache of ``config.json``."""
    if os.path.isdir(place) or not may_be_base_id(place):
        return Path(place)
    found = try_to_load_from_cache(place, CONFIG, revision=revision)
    return Path(found).parent if isinstance(found, str) else None


def _find(model: nn.Module, file: str) -> Path | None:
    place = name_or_path(model)
    folder = None if place is None else cached(place, getattr(model.config, "_commit_hash", None))
    path = None if folder is None or Path(file).name != file else folder / file
    return path if path is not None and os.path.isfile(path) else None


def _read_json(path: Path | None, limit: int) -> Any:
    try:
        return None if path is None else json.loads(read_limited(path, limit))
    except (ValueError, RecursionError):  # CheckpointError is a ValueError
        return None
