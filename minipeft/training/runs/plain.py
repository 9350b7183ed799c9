"""Plain Python values to JSON and back, exactly; the tensors among them go to a safetensors file.

What JSON cannot express becomes an object with one key: ``{"$tuple": [...]}``, ``{"$float": "inf"}``,
``{"$pairs": [[key, value], ...]}`` for keys that are not strings, ``{"$counter": [...]}``, ``{"$tensor": "its name"}``.
Nothing else is written, and reading makes only these: no class is looked up and no code is run.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

from torch import Tensor

from minipeft.errors import CheckpointError, ConfigError


def to_plain(value: Any, where: str, put: Callable[[str, Tensor], None]) -> Any:
    """A value as JSON can hold it; `put` takes each tensor with its name. Raises CheckpointError for any other type."""
    if value is None or type(value) in (bool, int, str):
        return value
    if isinstance(value, float):  # numpy's float64 is one
        return float(value) if math.isfinite(value) else {"$float": repr(float(value))}
    if isinstance(value, Tensor):
        put(where, value)
        return {"$tensor": where}
    if type(value) in (list, tuple):
        items = [to_plain(item, f"{where}.{index}", put) for index, item in enumerate(value)]
        return items if type(value) is list else {"$tuple": items}
    if type(value) is dict and all(type(key) is str and not key.startswith("$") for key in value):
        return {key: to_plain(item, f"{where}.{key}", put) for key, item in value.items()}
    if type(value) in (dict, Counter):
        pairs = [[to_plain(key, where, put), to_plain(item, f"{where}.{key}", put)] for key, item in value.items()]
        return {"$pairs" if type(value) is dict else "$counter": pairs}
    raise CheckpointError(
        f"{where} is a {type(value).__name__}, which cannot be saved; allowed are None, numbers, strings, tensors, and "
        "lists, tuples and dictionaries of these."
    )


def from_plain(value: Any, get: Callable[[str], Tensor]) -> Any:
    """The value that `to_plain` was given; `get` returns the tensor of a name. Raises CheckpointError for anything else."""
    if isinstance(value, list):
        return [from_plain(item, get) for item in value]
    if not isinstance(value, dict):
        return value
    if not any(key.startswith("$") for key in value):
        return {key: from_plain(item, get) for key, item in value.items()}
    try:
        ((kind, content),) = value.items()
        if kind == "$tensor":
            return get(content)
        if kind == "$float":
            return {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}[content]
        if kind == "$tuple":
            return tuple(from_plain(item, get) for item in content)
        pairs = {from_plain(key, get): from_plain(item, get) for key, item in content}
        return {"$pairs": pairs, "$counter": Counter(pairs)}[kind]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{str(value)[:100]} is not a saved value ({error}).") from None


def checked_json(value: Any, what: str) -> Any:
    """A copy of a value that comes back from JSON as it went in; raises ConfigError if it would not, as NaN, a tuple or a path."""
    try:
        copy = json.loads(json.dumps(value, allow_nan=False))
        if copy == value:
            return copy
        reason = "it would come back as another value"
    except (TypeError, ValueError, RecursionError) as error:
        reason = str(error)
    raise ConfigError(
        f"{what} cannot be saved as JSON ({reason}): give dictionaries, lists, strings, finite numbers, None."
    )
