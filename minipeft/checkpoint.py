"""Adapter directories in PEFT's format: ``adapter_config.json`` and ``adapter_model.safetensors``, never a pickle.

The two files must belong together. The weights therefore carry, in the safetensors metadata under ``minipeft``, the
configuration they were saved with, the digest of the configuration file they replaced, and samples of the base
weights. A reader can so tell an interrupted save (it takes the weights' own configuration) from a pair that was
mixed by hand (it refuses), and an adapter of another base from one of this base. Files without it, PEFT's own, load too.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from minipeft.adapted import AdaptedLayer, adapted_layers, wrappers
from minipeft.config import AdapterConfig, asks_nothing, config_from_dict
from minipeft.errors import CheckpointError, nearest, shown
from minipeft.files import read_limited, write_files
from minipeft.inject import Plan
from minipeft.layers.base import LayerOps

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
VERSION = 1
MAX_CONFIG_BYTES, MAX_HEADER_BYTES = 2**20, 2**26
DTYPES = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8}
# Keys that say where a file comes from, not what its tensors mean.
PROVENANCE = {"base_model_name_or_path", "task_type", "inference_mode", "peft_version", "revision", "auto_mapping"}
SAMPLES = 8


# ------------------------------------------------------------------------------------------------------- writing
def adapter_tensors(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """The tensors of one adapter under PEFT's keys, ``base_model.model.<path>.lora_A.weight``; the live ones."""
    return {
        f"{PREFIX}{name}.{key}": tensor
        for name, wrapper in wrappers(model)
        for key, tensor in wrapper.file_tensors(adapter_name).items()
    }


def file_config(model: nn.Module, config: AdapterConfig, adapter_name: str) -> dict[str, Any]:
    """What goes into ``adapter_config.json``: targets resolved, so that every reader adapts the same modules."""
    values = config.to_dict()
    layers = {name: layer for name, layer in adapted_layers(model) if adapter_name in layer.adapters}
    if config.target_modules is None or config.target_modules == "all-linear":
        values["target_modules"] = list(layers)
    if "fan_in_fan_out" in values:
        values["fan_in_fan_out"] = any(layer.ops.fan_in_fan_out for layer in layers.values())
    if config.base_model_name_or_path is None:
        name = getattr(model, "name_or_path", None)
        values["base_model_name_or_path"] = name if isinstance(name, str) and name else None
    return values


def save_adapter(directory: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any], base: Mapping[str, Any]) -> None:
    """Write an adapter, both files or neither (see `minipeft.files`).

    Args:
        directory: made if need be.
        tensors: as `adapter_tensors` gives them.
        config: as `file_config` gives it.
        base: as `base_samples` gives it.

    Raises:
        CheckpointError: the directory cannot be written, or holds a whole model, which an adapter beside it would alter.
    """
    if (directory / "config.json").exists() and any(directory.glob("model*.safetensors")):
        raise CheckpointError(
            f"{directory} holds a whole model; with an adapter beside it, transformers would load the two as one. Save to a directory of its own."
        )
    previous = _digest_of_file(directory / CONFIG_FILE)
    own = {"version": VERSION, "config": dict(config), "previous": previous, "base": dict(base)}
    metadata = {"format": "pt", "minipeft": json.dumps(own, sort_keys=True)}
    detached = {key: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for key, tensor in tensors.items()}
    payloads = {WEIGHTS_FILE: safetensors.torch.save(detached, metadata), CONFIG_FILE: (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()}
    write_files(directory, payloads)


def base_samples(model: nn.Module) -> dict[str, Any]:
    """A few weights of each adapted layer's base, by which a reader knows the base again; merged layers are left out."""
    return {name: sample(layer.ops, layer.base_layer) for name, layer in adapted_layers(model) if not layer.merged}


@torch.no_grad()
def sample(ops: type[LayerOps], base: nn.Module) -> list[float]:
    """Eight elements of the canonical weight, evenly spread; rounded to 6 digits."""
    weight = ops.read_weight(base)
    if weight.is_meta or weight.numel() == 0:
        return []
    places = torch.linspace(0, weight.numel() - 1, SAMPLES, dtype=torch.float64).long().to(weight.device)
    values = weight[places // weight.shape[1], places % weight.shape[1]].float().cpu().tolist()
    return [float(f"{value:.6g}") for value in values]


def _digest(config: Mapping[str, Any]) -> str:
    meaning = {key: value for key, value in config.items() if key not in PROVENANCE and not asks_nothing(value)}
    return hashlib.sha256(json.dumps(meaning, sort_keys=True).encode()).hexdigest()


def _digest_of_file(path: Path) -> str | None:
    try:
        return _digest(_parse_config(path))
    except CheckpointError:
        return None


# ------------------------------------------------------------------------------------------------------- reading
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
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is no directory; an adapter is a directory with {CONFIG_FILE} and {WEIGHTS_FILE}.")
    if not weights.exists():
        pickles = sorted(path.name for path in directory.iterdir() if path.suffix in {".bin", ".pt", ".pth", ".pkl"})
        fix = f" {shown(pickles)} is a pickle, which is never read: save it again with safe_serialization=True." if pickles else ""
        raise CheckpointError(f"{directory} has no {WEIGHTS_FILE}.{fix}")
    shapes, own = _read_header(weights)
    saved = own.get("config")
    if (directory / CONFIG_FILE).exists():
        values = _parse_config(directory / CONFIG_FILE)
        if saved is not None and _digest(values) != _digest(saved):
            if _digest(values) != own.get("previous"):
                raise CheckpointError(
                    f"{directory}: {CONFIG_FILE} and {WEIGHTS_FILE} are of different saves; nothing was loaded. Copy both from one save."
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
        raise CheckpointError(f"{path} is no valid JSON ({str(error)[:100]}); nothing was loaded.") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds a {type(values).__name__}, not an object; nothing was loaded.")
    return values


def _strict_json(payload: bytes) -> Any:
    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(items)
        if len(table) != len(items):
            raise ValueError("a key stands twice")
        return table

    def constant(name: str) -> Any:
        raise ValueError(f"{name} is no JSON number")

    return json.loads(payload.decode("utf-8"), object_pairs_hook=pairs, parse_constant=constant)


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
        if not isinstance(own, dict) or own.get("version", VERSION) != VERSION:
            raise ValueError(f"its minipeft metadata is of another version than {VERSION}")
        return shapes, own
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, struct.error) as error:
        raise CheckpointError(f"{path} is no readable adapter ({str(error)[:200]}); nothing was loaded.") from None


@dataclass(frozen=True)
class Fit:
    """How a file's tensors compare with what a model expects."""

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    copies_of_base: Mapping[str, Tensor]  # keys that hold a base tensor, as PEFT writes for embedding tables

    def __str__(self) -> str:
        return "; ".join(f"{what} {shown(keys)}" for what, keys in (("missing", self.missing), ("unexpected", self.unexpected)) if keys)


def compare(file: AdapterFile, expected: Mapping[str, Tensor], model: nn.Module) -> Fit:
    """Hold a file's header against the tensors (of any device, meta too) that a plan for this model makes.

    Raises:
        CheckpointError: a shape differs, or no key fits at all.
    """
    wanted = {f"{PREFIX}{name}": tensor for name, tensor in expected.items()}
    wrong = [f"{key}: {list(shape)} in the file, {list(wanted[key].shape)} here" for key, shape in file.shapes.items() if key in wanted and wanted[key].shape != shape]
    if wrong:
        raise CheckpointError(f"{file.path} does not fit {type(model).__name__}: {shown(wrong, 3).replace(chr(39), '')}; nothing was loaded. Is it for another base?")
    base = _base_tensors(model)
    extra = [key for key in file.shapes if key not in wanted]
    copies = {key: base[key] for key in extra if key in base and base[key].shape == file.shapes[key]}
    fit = Fit(tuple(key for key in wanted if key not in file.shapes), tuple(key for key in extra if key not in copies), copies)
    if len(fit.missing) == len(wanted):
        raise CheckpointError(f"{file.path} does not fit {type(model).__name__}: none of its {len(file.shapes)} keys is expected{closest(fit)}; nothing was loaded.")
    return fit


def check_strict(file: AdapterFile, fit: Fit, strict: bool) -> None:
    """Raise for missing and unexpected tensors, or warn about them.

    Raises:
        CheckpointError: there are such and `strict` is True.
    """
    if not fit.missing and not fit.unexpected:
        return
    message = f"{file.path} does not fit this model: {fit}{closest(fit)}"
    if strict:
        raise CheckpointError(f"{message}; nothing was loaded.")
    warnings.warn(f"{message}; the rest was loaded.", stacklevel=3)


def closest(fit: Fit) -> str:
    """A guess at what an unexpected key was meant to be."""
    if not fit.unexpected or not fit.missing:
        return ""
    match = nearest(fit.unexpected[0], fit.missing) or fit.missing[0]
    return f" ({fit.unexpected[0]!r} came; {match!r} is expected)"


def _base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Base parameters under every key that PEFT may give them: with and without the wrapper's ``.base_layer``."""
    tensors = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        plain = name.replace(".base_layer.", ".")
        owner, _, last = plain.rpartition(".")
        tensors[PREFIX + plain] = tensors[f"{PREFIX}{owner}.base_layer.{last}"] = parameter
    return tensors


def check_base(file: AdapterFile, plan: Plan) -> None:
    """Compare the base weights that the file was saved with, where it says, with those of this model.

    Raises:
        CheckpointError: they differ by more than half precision explains.
    """
    for site in plan.adapters:
        saved = file.base.get(site.name)
        module = site.candidate.module
        if not isinstance(saved, list) or (isinstance(module, AdaptedLayer) and module.merged):
            continue
        here = sample(site.ops, site.candidate.base)
        if len(here) == len(saved) and not _alike(saved, here):
            raise CheckpointError(
                f"{file.path} was trained on another base: the weights of {site.name} differ (first {saved[0]:g} there, {here[0]:g} here); "
                "nothing was loaded. Pass allow_base_mismatch=True if that is meant."
            )


def _alike(saved: list[Any], here: list[float]) -> bool:
    """Equal up to a conversion to half precision: 1 % of a value, or of the values' root mean square."""
    if not all(isinstance(value, int | float) for value in saved):
        return False
    size = math.sqrt(sum(value * value for value in saved) / len(saved)) if saved else 0.0
    return all(abs(a - b) <= 0.01 * max(abs(a), size) for a, b in zip(saved, here, strict=True))


def read_tensors(file: AdapterFile, fit: Fit) -> dict[str, Tensor]:
    """Read the tensors, by module name and key without PEFT's prefix.

    Raises:
        CheckpointError: the file is damaged, has changed since its header was read, holds NaN or infinity, or brings
            base weights that are not this model's.
    """
    expected_size = MAX_HEADER_BYTES + sum(math.prod(shape) * 8 for shape in file.shapes.values())
    try:
        tensors = safetensors.torch.load(read_limited(file.path, expected_size))
    except SafetensorError as error:
        raise CheckpointError(f"{file.path} is damaged ({error}); nothing was loaded.") from None
    if {key: tuple(tensor.shape) for key, tensor in tensors.items()} != dict(file.shapes):
        raise CheckpointError(f"{file.path} changed while it was being read; nothing was loaded.")
    broken = [key for key, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        raise CheckpointError(f"{file.path} holds NaN or infinity in {shown(broken, 3)}; nothing was loaded.")
    for key, parameter in fit.copies_of_base.items():
        if not torch.allclose(tensors[key].float(), parameter.detach().float().cpu(), rtol=1e-2, atol=1e-6):
            raise CheckpointError(f"{file.path} brings its own {key!r}, which differs from this model's; nothing was loaded. Use the base it was trained on.")
    return {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items() if key not in fit.unexpected and key not in fit.copies_of_base}
