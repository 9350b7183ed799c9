"""Opening an adapter directory: strict JSON, a checked safetensors header, two files that belong together.

The two files must be of one save. The weights therefore carry, in the safetensors metadata under ``minipeft``, the
configuration they were saved with, the digest of the configuration file they replaced, and samples of the base
weights. So a reader can tell an interrupted save (it takes the weights' own configuration) from a pair that was mixed
by hand (it refuses). Files without it, PEFT's own, open too. A pickle is never read.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minipeft.config import AdapterConfig, asks_nothing, config_from_dict
from minipeft.errors import CheckpointError, shown
from minipeft.files.atomic import read_limited

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
VERSION = 1
MAX_CONFIG_BYTES, MAX_HEADER_BYTES, MAX_DEPTH = 2**20, 2**26, 32
DTYPES = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8}
# Keys that say where a file comes from, not what its tensors mean.
PROVENANCE = {"base_model_name_or_path", "task_type", "inference_mode", "peft_version", "revision", "auto_mapping"}


def own_metadata(config: Mapping[str, Any], base: Mapping[str, Any], directory: Path) -> dict[str, str]:
    """Safetensors metadata for an adapter that is about to be written into a directory."""
    own = {
        "version": VERSION,
        "config": dict(config),
        "previous": _digest_of_file(directory / CONFIG_FILE),
        "base": dict(base),
    }
    return {"format": "pt", "minipeft": json.dumps(own)}


def with_sorted_metadata(payload: bytes) -> bytes:
    """The same safetensors file with its metadata in a fixed order, so that equal adapters are equal bytes."""
    length = struct.unpack("<Q", payload[:8])[0]
    header = json.loads(payload[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)  # the format aligns the tensors to 8 bytes
    return struct.pack("<Q", len(text)) + text + payload[8 + length :]


def _digest(config: Mapping[str, Any]) -> str:
    meaning = {k: v for k, v in sorted(config.items()) if k not in PROVENANCE and not asks_nothing(v)}
    return hashlib.sha256(json.dumps(meaning).encode()).hexdigest()


def _digest_of_file(path: Path) -> str | None:
    try:
        return _digest(_parse_config(path))
    except CheckpointError:
        return None


@dataclass(frozen=True)
class AdapterFile:
    """An adapter directory whose configuration and header have been read and checked; its tensors have not."""

    path: Path
    config: AdapterConfig
    shapes: Mapping[str, tuple[int, ...]]
    base: Mapping[str, list[float]]


def open_adapter(directory: Path) -> AdapterFile:
    """Read the configuration and the header of the weights.

    Raises:
        CheckpointError: a file is missing, hostile, damaged or of another save than its neighbour.
        ConfigError: the configuration asks for something that is not allowed or not implemented.
    """
    weights = directory / WEIGHTS_FILE
    if not os.path.isdir(directory):  # unlike Path's, it answers False for names that are too long or hold a NUL
        raise CheckpointError(
            f"{directory} is no directory; an adapter is a directory with {CONFIG_FILE} and {WEIGHTS_FILE}."
        )
    if not weights.exists():
        pickles = sorted(path.name for path in directory.iterdir() if path.suffix in {".bin", ".pt", ".pth", ".pkl"})
        fix = (
            f" {shown(pickles)} is a pickle, which is never read: save it again with safe_serialization=True."
            if pickles
            else ""
        )
        raise CheckpointError(f"{directory} has no {WEIGHTS_FILE}.{fix}")
    shapes, own = _read_header(weights)
    saved = own.get("config")
    if (directory / CONFIG_FILE).exists():
        values = _parse_config(directory / CONFIG_FILE)
        if saved is not None and _digest(values) != _digest(saved):
            if _digest(values) != own.get("previous"):
                raise CheckpointError(
                    f"{directory}: {CONFIG_FILE} and {WEIGHTS_FILE} are of different saves. Copy both from one save."
                )
            values = saved  # the save was interrupted between the two renames; the weights know what they are
    elif saved is not None:
        values = saved
    else:
        raise CheckpointError(f"{directory} has no {CONFIG_FILE}.")
    return AdapterFile(weights, config_from_dict(values, f"{directory / CONFIG_FILE}"), shapes, own.get("base") or {})


def _parse_config(path: Path) -> dict[str, Any]:
    try:
        values = _strict_json(read_limited(path, MAX_CONFIG_BYTES))
    except (ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} is no valid JSON ({str(error)[:100]}).") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds a {type(values).__name__}, not an object.")
    return values


def _strict_json(payload: bytes) -> Any:
    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(items)
        if len(table) != len(items):
            raise ValueError("a key stands twice")
        return table

    def constant(name: str) -> Any:
        raise ValueError(f"{name} is no JSON number")

    value = json.loads(payload.decode("utf-8"), object_pairs_hook=pairs, parse_constant=constant)
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(MAX_DEPTH):  # what reads the value later may recurse into it
        level = [item for inner in level for item in (inner.values() if isinstance(inner, dict) else inner)]
        level = [item for item in level if isinstance(item, dict | list)]
    if level:
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels")
    return value


def _is_own(own: Any) -> bool:
    """Whether this is metadata as `own_metadata` writes it: objects, and base samples that are numbers of sane size."""
    if not isinstance(own, dict) or not all(isinstance(own.get(key, {}), dict) for key in ("config", "base")):
        return False
    samples = own.get("base", {}).values()
    return all(isinstance(row, list) and all(is_sample(value) for value in row) for row in samples)


def is_sample(value: Any) -> bool:
    """Whether a value may stand for a base weight in a file: a finite number of the size of a float32."""
    return isinstance(value, int | float) and abs(value) < 1e39


def _read_header(path: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, Any]]:
    """Shapes by key, and our own metadata, from the head of a safetensors file; no tensor is read."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = struct.unpack("<Q", file.read(8))[0]
            if length > min(size, MAX_HEADER_BYTES):
                raise ValueError(f"its header claims {length:,} bytes")
            header = _strict_json(file.read(length))
        metadata = header.pop("__metadata__", {})
        shapes = {}
        total = 0
        for key, entry in header.items():
            if entry["dtype"] not in DTYPES:
                raise ValueError(f"{key!r} is {entry['dtype']}, and adapters are floating point ({', '.join(DTYPES)})")
            shapes[key] = tuple(int(n) for n in entry["shape"])
            total += math.prod(shapes[key]) * DTYPES[entry["dtype"]]
        if 8 + length + total != size:
            raise ValueError(f"it has {size:,} bytes where its header describes {8 + length + total:,}")
        own = _strict_json(metadata["minipeft"].encode()) if "minipeft" in metadata else {}
        if not _is_own(own) or own.get("version", VERSION) != VERSION:
            raise ValueError(f"its minipeft metadata is damaged, or of another version than {VERSION}")
        return shapes, own
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, struct.error) as error:
        raise CheckpointError(f"{path} is no readable adapter ({str(error)[:200]}).") from None
