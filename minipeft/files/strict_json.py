"""Strict JSON: no key twice, no NaN, no deep nesting, no endless file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from minipeft.errors import CheckpointError, told_error
from minipeft.files.not_an_adapter import named
from minipeft.files.reading import read_limited

MAX_CONFIG_BYTES, MAX_DEPTH = 2**20, 32


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object of at most 1 MiB; raises CheckpointError if the file holds anything else."""
    payload = read_limited(path, MAX_CONFIG_BYTES)
    try:
        values = parse(payload)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({told_error(error, 100)}).{named(path)}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds a {type(values).__name__}, not an object.")
    return values


def parse(payload: bytes) -> Any:
    """The value of a JSON text; raises ValueError or RecursionError if it is not valid or not strict."""
    value = json.loads(payload.decode("utf-8"), object_pairs_hook=_object, parse_constant=_refuse)
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(MAX_DEPTH):  # code that reads the value later may recurse into it
        level = [item for inner in level for item in (inner.values() if isinstance(inner, dict) else inner)]
        level = [item for item in level if isinstance(item, dict | list)]
    if level:
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a key occurs twice")
    return table


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")
