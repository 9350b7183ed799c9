"""The checkpoint to merge into: a directory with ``config.json`` and safetensors files, as transformers writes it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minipeft.errors import CheckpointError, MergeError, shown, told
from minipeft.files.base_checkpoint import CONFIG, INDEX, WEIGHTS
from minipeft.files.file_names import CONFIG_FILE
from minipeft.files.reading import parse, read_limited, read_object
from minipeft.files.tensor_file import MAX_HEADER_BYTES, damaged
from minipeft.merging.from_disk.stored import StoredTensor, stored_tensors

PICKLES = {".bin", ".pt", ".pth", ".pkl", ".ckpt"}


@dataclass(frozen=True)
class Base:
    """A checkpoint on disk, unread but for its headers."""

    folder: Path  # where it is
    config: Mapping[str, Any]  # ``config.json``
    shards: Mapping[str, list[StoredTensor]]  # file name -> its tensors, in the order in which they lie there
    metadata: Mapping[str, Mapping[str, str]]  # file name -> the safetensors metadata of that file
    index: Mapping[str, Any] | None  # ``model.safetensors.index.json``; None if there is one file only

    @property
    def tensors(self) -> dict[str, StoredTensor]:
        """Every tensor by its key."""
        return {tensor.key: tensor for shard in self.shards.values() for tensor in shard}


def open_base(folder: Path) -> Base:
    """Read the configuration and the headers of a checkpoint.

    Raises:
        CheckpointError: it is not a checkpoint in safetensors, or is damaged.
        MergeError: it is quantized.
    """
    if not os.path.isdir(folder):
        raise CheckpointError(
            f"base: {folder} is not a directory; it must have a model's {CONFIG} and its safetensors files."
        )
    if not os.path.exists(folder / CONFIG):
        what = "is an adapter, not a model" if os.path.exists(folder / CONFIG_FILE) else f"has no {CONFIG}"
        raise CheckpointError(
            f"base: {folder} {what}. Give the directory of the model that the adapter was trained on."
        )
    config = read_object(folder / CONFIG)
    _check_not_quantized(folder, config)
    if os.path.isfile(folder / WEIGHTS):
        names, index = [WEIGHTS], None
    elif os.path.isfile(folder / INDEX):
        names, index = _indexed(folder / INDEX)
    else:
        raise _without_weights(folder)
    read = {name: stored_tensors(folder / name) for name in names}
    base = Base(folder, config, {n: r[0] for n, r in read.items()}, {n: r[1] for n, r in read.items()}, index)
    _check_keys(base)
    return base


def _check_not_quantized(folder: Path, config: Mapping[str, Any]) -> None:
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    found = next((part["quantization_config"] for part in parts if part.get("quantization_config")), None)
    if found is not None:
        method = found.get("quant_method") if isinstance(found, dict) else None
        raise MergeError(
            f"base: {folder} is quantized ({told(method or 'unknown')}), and rounding to its few values would lose most "
            "of an update. Give the float model that it was made from, or dequantize() it and save that first."
        )


def _indexed(path: Path) -> tuple[list[str], dict[str, Any]]:
    try:
        index = parse(read_limited(path, MAX_HEADER_BYTES))
        key_to_file = index["weight_map"]
        names = sorted(set(key_to_file.values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise damaged(path, error) from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{path} names {told(name)}, which is not the name of a safetensors file next to it.")
    return names, index


def _without_weights(folder: Path) -> CheckpointError:
    pickles = [name for name in sorted(os.listdir(folder)) if Path(name).suffix in PICKLES]
    if not pickles:
        return CheckpointError(f"base: {folder} has neither {WEIGHTS} nor {INDEX}.")
    return CheckpointError(
        f"base: {folder} has its weights in {shown(pickles, 2)}, a pickle, which is never read. Save it as safetensors "
        f"first: AutoModelForCausalLM.from_pretrained({str(folder)!r}).save_pretrained(...)."
    )


def _check_keys(base: Base) -> None:
    place: dict[str, str] = {}
    for name, shard in base.shards.items():
        for tensor in shard:
            if place.setdefault(tensor.key, name) != name:
                raise CheckpointError(f"{base.folder}: {told(tensor.key)} is in {place[tensor.key]} and in {name}.")
    lost = [k for k, name in base.index["weight_map"].items() if place.get(k) != name] if base.index else []
    if lost:
        raise CheckpointError(f"{base.folder / INDEX}: {shown(lost, 3)} is not in the file that it names.")
