"""Writing an adapter in PEFT's format: the tensors of one adapter, its configuration, and the two files."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from minipeft import registry
from minipeft.config import ALL_LINEAR, AdapterConfig
from minipeft.errors import CheckpointError, shown
from minipeft.files.atomic import write_files
from minipeft.files.format import CONFIG_FILE, WEIGHTS_FILE, own_metadata, with_sorted_metadata
from minipeft.injection.adapted_layer import AdaptedLayer
from minipeft.injection.build import PREFIX, shared_tensors
from minipeft.injection.module_tree import adapted_layers, candidates, wrappers
from minipeft.injection.modules_to_save import SavedModule
from minipeft.methods.base import Adapter
from minipeft.patterns import is_suffix


def adapter_tensors(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """The tensors of one adapter under PEFT's keys, ``base_model.model.<path>.lora_A.weight``; the live ones."""
    own = {
        f"{PREFIX}{name}.{key}": tensor
        for name, wrapper in wrappers(model)
        for key, tensor in wrapper.file_tensors(adapter_name).items()
    }
    return own | shared_tensors(adapters_of(model, adapter_name).values())


def adapters_of(model: nn.Module, adapter_name: str) -> dict[str, Adapter]:
    """The parts of one adapter, by the name of the module they are on; not those of a companion of its configuration."""
    return {name: layer.adapter(adapter_name) for name, layer in _layers_of(model, adapter_name)}


def _layers_of(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, AdaptedLayer]]:
    for name, layer in adapted_layers(model):
        if layer.owns(adapter_name) and not layer.adapter(adapter_name).key_prefix:
            yield name, layer


def tensors_from_state(
    model: nn.Module, tensors: Mapping[str, Tensor], state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The values that `state`, a state of `model`, holds for these live tensors."""
    names = {id(tensor): name for name, tensor in model.state_dict(keep_vars=True).items()}
    found = {key: names[id(tensor)] for key, tensor in tensors.items() if id(tensor) in names}
    missing = [name for name in found.values() if name not in state]
    if missing:
        raise CheckpointError(f"state_dict lacks {shown(missing, 3)} of this model.")
    # What no state of the model holds does not change: the live tensor is right.
    return {key: state[found[key]] if key in found else tensor for key, tensor in tensors.items()}


def file_config(model: nn.Module, config: AdapterConfig, adapter_name: str, *, compact: bool = True) -> dict[str, Any]:
    """What goes into ``adapter_config.json``: targets resolved, so that every reader adapts the same modules.

    `compact` False: for a file that training goes on from, see `Adapter.compacted`.
    """
    values = config.to_dict()
    layers = dict(_layers_of(model, adapter_name))
    targets, targeted = config.target_modules, [name for name, layer in layers.items() if layer.targeted]
    if targets is None or targets == ALL_LINEAR:
        values["target_modules"] = _shortest(targeted, model)
    elif any(
        adapter_name in layer.tied_adapters and not layer.adapter(adapter_name).key_prefix
        for _, layer in adapted_layers(model)
    ):
        values["target_modules"] = targeted  # other readers would take a tied layer that is named for another one
    elif not isinstance(targets, str) and not all(any(is_suffix(t, name) for t in targets) for name in targeted):
        values["target_modules"] = targeted  # a shared module was meant by another name than its first
    if any(getattr(config, name) is not None for name in config.not_in_files):
        values["target_modules"] = targeted  # says what those options say
    if config.modules_to_save is not None:
        # An entry for a part of another entry's module would name nothing to a reader.
        saved = [
            name
            for name, wrapper in wrappers(model)
            if adapter_name in wrapper.adapters and isinstance(wrapper, SavedModule)
        ]
        entries = [entry for entry in config.modules_to_save if any(is_suffix(entry, name) for name in saved)]
        values["modules_to_save"] = entries or None
    if "fan_in_fan_out" in values:
        values["fan_in_fan_out"] = any(layer.ops.fan_in_fan_out for layer in layers.values())
    method, adapters = registry.method_class(config.method), adapters_of(model, adapter_name)
    values |= method.file_options(values, adapters, compact)
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
    """Write an adapter, both files or neither (see `minipeft.files.atomic`).

    Args:
        directory: made if need be.
        tensors: as `adapter_tensors` gives them.
        config: as `file_config` gives it.
        base: as `minipeft.files.base_samples.base_samples` gives it.

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
    detached = registry.method_class(config["peft_type"].lower()).compacted(detached, config)
    weights = with_sorted_metadata(safetensors.torch.save(detached, own_metadata(config, base, directory)))
    # Sorted at the top only: within rank_pattern the first key that fits decides, so its order means something.
    text = json.dumps(dict(sorted(config.items())), indent=2) + "\n"
    write_files(directory, {WEIGHTS_FILE: weights, CONFIG_FILE: text.encode("utf-8")})
