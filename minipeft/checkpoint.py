"""Adapter tensors to and from a directory in PEFT's format: what is written, and whether what is read fits the model."""

from __future__ import annotations

import functools
import json
import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from minipeft import inject, registry
from minipeft.adapted import adapted_layers, wrappers
from minipeft.adapter_file import (
    CONFIG_FILE,
    MAX_HEADER_BYTES,
    WEIGHTS_FILE,
    AdapterFile,
    is_sample,
    open_adapter,
    own_metadata,
    with_sorted_metadata,
)
from minipeft.config import ALL_LINEAR, AdapterConfig
from minipeft.errors import CheckpointError, nearest, shown
from minipeft.files import read_limited, write_files
from minipeft.inject import PREFIX, Parts, Plan
from minipeft.layers.base import LayerOps
from minipeft.methods.base import Adapter
from minipeft.patterns import is_suffix
from minipeft.state import STATE
from minipeft.targets import candidates

SAMPLES = 8
QUANTISED = 0.5  # of their norm, for all samples together; 4 bits cost about 0.1, and an unrelated weight is off by 1.4


# ------------------------------------------------------------------------------------------------------- writing
def adapter_tensors(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """The tensors of one adapter under PEFT's keys, ``base_model.model.<path>.lora_A.weight``; the live ones."""
    own = {
        f"{PREFIX}{name}.{key}": tensor
        for name, wrapper in wrappers(model)
        for key, tensor in wrapper.file_tensors(adapter_name).items()
    }
    return own | inject.shared_tensors(adapters_of(model, adapter_name).values())


def adapters_of(model: nn.Module, adapter_name: str) -> dict[str, Adapter]:
    """The parts of one adapter, by the name of the module they are on."""
    return {
        name: layer.adapter(adapter_name) for name, layer in adapted_layers(model) if adapter_name in layer.adapters
    }


def tensors_from_state(
    model: nn.Module, tensors: Mapping[str, Tensor], state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The values that `state`, a state of `model`, holds for these live tensors."""
    names = {id(tensor): name for name, tensor in model.state_dict(keep_vars=True).items()}
    found = {key: names[id(tensor)] for key, tensor in tensors.items() if id(tensor) in names}
    missing = [name for name in found.values() if name not in state]
    if missing:
        raise CheckpointError(f"state_dict lacks {shown(missing, 3)} of this model; nothing was written.")
    # What no state of the model holds does not change: the live tensor is right.
    return {key: state[found[key]] if key in found else tensor for key, tensor in tensors.items()}


def file_config(model: nn.Module, config: AdapterConfig, adapter_name: str, *, packed: bool = True) -> dict[str, Any]:
    """What goes into ``adapter_config.json``: targets resolved, so that every reader adapts the same modules.

    `packed` False: for a file that training goes on from, see `Adapter.packing`.
    """
    values = config.to_dict()
    layers = {name: layer for name, layer in adapted_layers(model) if adapter_name in layer.adapters}
    targets, targeted = config.target_modules, [name for name, layer in layers.items() if layer.targeted]
    if targets is None or targets == ALL_LINEAR:
        values["target_modules"] = _shortest(targeted, model)
    elif not isinstance(targets, str) and not all(any(is_suffix(t, name) for t in targets) for name in targeted):
        values["target_modules"] = targeted  # a shared module was meant by another name than its first
    if any(getattr(config, name) is not None for name in config.not_in_files):
        values["target_modules"] = targeted  # says what those options say
    if config.modules_to_save is not None:
        # An entry for a part of another entry's module would name nothing to a reader.
        saved = [name for name, wrapper in wrappers(model) if adapter_name in wrapper.adapters and name not in layers]
        entries = [entry for entry in config.modules_to_save if any(is_suffix(entry, name) for name in saved)]
        values["modules_to_save"] = entries or None
    if "fan_in_fan_out" in values:
        values["fan_in_fan_out"] = any(layer.ops.fan_in_fan_out for layer in layers.values())
    method, adapters = registry.method_class(config.method), adapters_of(model, adapter_name)
    values |= method.file_options(values, adapters) | (method.packing(values, adapters) if packed else {})
    if config.base_model_name_or_path is None:
        name = getattr(model, "name_or_path", None)
        values["base_model_name_or_path"] = name if isinstance(name, str) and name else None
    return values


def _shortest(names: list[str], model: nn.Module) -> list[str]:
    """The last parts of these module names, where they select these modules and no other, else the names themselves."""
    endings = sorted({name.rpartition(".")[2] for name in names})
    everything = [name for candidate in candidates(model).values() for name in candidate.names]
    selected = {name for name in everything if name.rpartition(".")[2] in endings}
    return endings if selected == set(names) else names


def save_adapter(
    directory: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any], base: Mapping[str, Any]
) -> None:
    """Write an adapter, both files or neither (see `minipeft.files`).

    Args:
        directory: made if need be.
        tensors: as `adapter_tensors` gives them.
        config: as `file_config` gives it.
        base: as `base_samples` gives it.

    Raises:
        CheckpointError: the directory cannot be written, or holds a whole model, which an adapter beside it would alter.
    """
    if os.path.exists(directory / "config.json") and any(directory.glob("model*.safetensors")):
        raise CheckpointError(
            f"{directory} holds a whole model; with an adapter beside it, transformers would load the two as one. "
            "Save the adapter to a directory of its own."
        )
    detached = {
        key: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for key, tensor in tensors.items()
    }
    detached = registry.method_class(config["peft_type"].lower()).packed(detached, config)
    weights = with_sorted_metadata(safetensors.torch.save(detached, own_metadata(config, base, directory)))
    # Sorted at the top only: within rank_pattern the first key that fits decides, so its order means something.
    text = json.dumps(dict(sorted(config.items())), indent=2) + "\n"
    write_files(directory, {WEIGHTS_FILE: weights, CONFIG_FILE: text.encode("utf-8")})


def base_samples(model: nn.Module, adapter_name: str) -> dict[str, list[float]]:
    """A few base weights of each layer the adapter is on, by which a reader knows the base again; not of merged layers."""
    remembered = model.__dict__[STATE].samples
    return {
        name: sample(layer.ops, layer.base_layer) or remembered.get(name, [])
        for name, layer in adapted_layers(model)
        if adapter_name in layer.adapters and not layer.merged
    }


@torch.no_grad()
def sample(ops: type[LayerOps], base: nn.Module) -> list[float]:
    """Eight elements of the canonical weight, evenly spread; rounded to 6 digits. None where they cannot be had.

    Of a quantised layer a ninth number, the tolerance, says that these are not the float weight's own.
    """
    weight = ops.read_weight(base)
    if weight.is_meta or weight.numel() == 0 or type(weight) not in (Tensor, nn.Parameter):
        return []  # the last is a weight held in shards, of which this process has one
    rows, columns = _places(*weight.shape)
    values = [float(f"{value:.6g}") for value in weight[rows, columns].tolist()]
    values += [QUANTISED] if ops.is_quantized else []
    return values if all(map(is_sample, values)) else []  # a broken base is not known again, and JSON has no NaN


@functools.cache
def _places(rows: int, columns: int) -> tuple[list[int], list[int]]:
    places = [index * (rows * columns - 1) // (SAMPLES - 1) for index in range(SAMPLES)]
    return [place // columns for place in places], [place % columns for place in places]


# ------------------------------------------------------------------------------------------------------- reading
@dataclass(frozen=True)
class Fit:
    """How a file's tensors compare with what a model expects."""

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    copies_of_base: Mapping[str, Tensor]  # keys that hold a base tensor, as PEFT writes for embedding tables
    repeated: Mapping[str, str]  # keys that repeat another, as PEFT writes for the bias of a trained head

    def __str__(self) -> str:
        return "; ".join(
            f"{what} {shown(keys)}"
            for what, keys in (("missing", self.missing), ("unexpected", self.unexpected))
            if keys
        )


def compare(file: AdapterFile, expected: Mapping[str, Tensor], model: nn.Module) -> Fit:
    """Hold a file's header against the tensors (of any device, meta too) that a plan for this model makes.

    Raises:
        CheckpointError: a shape differs, or no key fits at all.
    """
    wrong = [
        f"{key}: {list(shape)} in the file, {list(expected[key].shape)} here"
        for key, shape in file.shapes.items()
        if key in expected and expected[key].shape != shape
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise CheckpointError(
            f"{file.path} does not fit {type(model).__name__}: {'; '.join(wrong[:3])}{more}; nothing was loaded. "
            "Is it for another base?"
        )
    base = _base_tensors(model)
    extra = [key for key in file.shapes if key not in expected]
    copies = {key: base[key] for key in extra if key in base and base[key].shape == file.shapes[key]}
    plain = {key: key.replace(".modules_to_save.", ".") for key in extra}
    repeated = {
        key: other for key, other in plain.items() if other != key and file.shapes.get(other) == file.shapes[key]
    }
    missing = tuple(key for key in expected if key not in file.shapes)
    fit = Fit(missing, tuple(key for key in extra if key not in copies and key not in repeated), copies, repeated)
    if len(fit.missing) == len(expected):
        raise CheckpointError(
            f"{file.path} does not fit {type(model).__name__}: none of its {len(file.shapes)} keys is expected"
            f"{closest(fit)}; nothing was loaded."
        )
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
    warnings.warn(f"{message}; the rest was loaded.", stacklevel=4)


def closest(fit: Fit) -> str:
    """A guess at what an unexpected key was meant to be."""
    if not fit.unexpected or not fit.missing:
        return ""
    match = nearest(fit.unexpected[0], fit.missing) or fit.missing[0]
    return f" ({fit.unexpected[0]!r} came; {match!r} is expected)"


def _base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Base parameters under every key that PEFT may give them: with and without the wrapper's infix."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        plain = name.replace(".base_layer.", ".")
        owner, _, last = plain.rpartition(".")
        for key in (plain, f"{owner}.base_layer.{last}", f"{owner}.original_module.{last}"):
            tensors[PREFIX + key] = parameter
    return tensors


def check_base(file: AdapterFile, plan: Plan) -> None:
    """Compare the base weights that the file was saved with, where it says, with those of this model.

    Raises:
        CheckpointError: they differ by more than half precision explains.
    """
    here = {site.name: sample(site.ops, site.candidate.base) for site in plan.adapters}
    check_samples(file, here, " Pass allow_base_mismatch=True if that is meant.")


def check_samples(file: AdapterFile, here: Mapping[str, list[float]], fix: str = "") -> None:
    """Compare the samples of base weights in a file with those of this model, where both have them.

    Raises:
        CheckpointError: they differ by more than half precision explains.
    """
    for name, values in here.items():
        saved = file.base.get(name)
        if saved and values and not _alike(saved, values):
            raise CheckpointError(
                f"{file.path} was trained on another base: the weights of {name} differ (first {saved[0]:g} there, {values[0]:g} here); "
                f"nothing was loaded.{fix}"
            )


def _alike(saved: list[float], here: list[float]) -> bool:
    """Equal up to a conversion to half precision: 1 % of a value, or of the values' root mean square.

    Where one of the two is of a quantised layer, up to what that costs.
    """
    rough = len(saved) > SAMPLES or len(here) > SAMPLES
    saved, here = saved[:SAMPLES], here[:SAMPLES]
    if len(saved) != len(here):
        return True
    if rough:
        return math.dist(saved, here) <= QUANTISED * max(math.hypot(*saved), math.hypot(*here))
    size = math.sqrt(sum(value * value for value in saved) / len(saved)) if saved else 0.0
    return all(abs(a - b) <= 0.01 * max(abs(a), size) for a, b in zip(saved, here, strict=True))


def read_tensors(file: AdapterFile, fit: Fit) -> dict[str, Tensor]:
    """Read the tensors that are expected, by key.

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
            raise CheckpointError(
                f"{file.path} brings its own {key!r}, which differs from this model's; nothing was loaded. Use the base it was trained on."
            )
    for key, other in fit.repeated.items():
        if not torch.equal(tensors[key], tensors[other]):
            raise CheckpointError(f"{file.path}: {key!r} and {other!r} say different things; nothing was loaded.")
    beside = {*fit.unexpected, *fit.copies_of_base, *fit.repeated}
    return {key: tensor for key, tensor in tensors.items() if key not in beside}


def load_parts(model: nn.Module, directory: Path, *, strict: bool, allow_base_mismatch: bool) -> tuple[Plan, Parts]:
    """Read an adapter directory and build what it says for this model; the model is only read.

    The shapes are compared before anything is allocated for them, and everything is checked before it is built.

    Raises:
        MinipeftError: see `minipeft.load_adapter`.
    """
    file = open_adapter(directory)
    plan = inject.plan(model, file.config, every_pattern=False)
    fit = compare(file, inject.build(plan, on_meta=True).file_tensors(plan), model)
    if not allow_base_mismatch:
        check_base(file, plan)
    check_strict(file, fit, strict)
    return plan, inject.build_from(plan, read_tensors(file, fit))


def warn_if_idle(directory: Path, parts: Parts) -> None:
    """Warn about an adapter that was loaded to be used and leaves the model as it is."""
    if not parts.copies and all(adapter.changes_nothing() for adapter in parts.adapters):
        warnings.warn(
            f"{directory}: every update is zero, so this adapter changes nothing; was it ever trained?", stacklevel=3
        )
