"""Writing an adapter in PEFT's format: the tensors of one adapter, its configuration, and the two files."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from minipeft.config.adapter_config import ALL_LINEAR, ALL_LINEAR_TEXT, AdapterConfig
from minipeft.config.patterns import endings, full_matches, is_suffix, matching
from minipeft.ecosystem.transformers_model import name_or_path
from minipeft.ecosystem.wrapper_names import PREFIX, unwrapped_name
from minipeft.errors import CheckpointError, ConfigError, shown, told, warn
from minipeft.files.atomic import Pieces, write_files
from minipeft.files.file_names import CONFIG_FILE, WEIGHTS_FILE
from minipeft.files.format import own_metadata
from minipeft.files.peft_extras import followers, for_peft
from minipeft.files.reading import MAX_CONFIG_BYTES
from minipeft.files.tensor_bytes import file_of
from minipeft.files.tensor_file import MAX_DIMENSIONS, header_is_too_long
from minipeft.injection.adapted_layer import AdaptedLayer
from minipeft.injection.build import shared_tensors
from minipeft.injection.module_tree import adapted_layers, candidates, layers_of, wrappers_of
from minipeft.injection.modules_to_save import SavedModule
from minipeft.injection.tied_sites import rest_of
from minipeft.kernels.functional import is_divided, is_finite
from minipeft.registry import registry

MATRIX = re.compile(r"\.lora_(embedding_)?[AB](\.weight)?$")


def adapter_tensors(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """The live tensors of one adapter under PEFT's keys, such as ``base_model.model.<path>.lora_A.weight``."""
    here = list(wrappers_of(model, adapter_name))
    own = {
        f"{PREFIX}{name}.{key}": t for name, wrapper in here for key, t in wrapper.file_tensors(adapter_name).items()
    }
    layers = (wrapper for _, wrapper in here if isinstance(wrapper, AdaptedLayer) and wrapper.owns(adapter_name))
    return own | shared_tensors(layer.adapter(adapter_name) for layer in layers)


def tensors_from_state(
    model: nn.Module, tensors: Mapping[str, Tensor], state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The values that `state`, a ``state_dict`` of `model`, holds for these live tensors.

    Raises:
        ConfigError: it is no table of tensors.
        CheckpointError: it lacks one of them, or has one of another shape.
    """
    if not isinstance(state, Mapping) or not all(isinstance(name, str) for name in state):
        raise ConfigError(f"state_dict must map names to tensors, as model.state_dict() does, not {told(state)}.")
    names = {id(tensor): name for name, tensor in named_tensors(model)}
    state = _of_the_model(state, names.values())
    found = {key: names[id(tensor)] for key, tensor in tensors.items() if id(tensor) in names}
    missing = [name for name in found.values() if name not in state]
    if missing:
        raise CheckpointError(f"state_dict lacks {shown(missing, 3)} of this model.")
    for key, name in found.items():
        _check_same_shape(name, state[name], tensors[key])
    # A tensor in no state_dict of the model is a constant, so the live one is right.
    return {key: state[found[key]] if key in found else tensor for key, tensor in tensors.items()}


def is_gathered_elsewhere(state: Mapping[str, Tensor]) -> bool:
    """Whether a gathered state is empty since the first process has it, as accelerate gathers that of a sharded model."""
    return not state and dist.is_available() and dist.is_initialized() and dist.get_rank() > 0


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The live tensors of a model's ``state_dict``, found without calling it.

    The first FSDP would gather each block for it and wait for the other processes, and only one of them may be saving.
    """
    for prefix, module in model.named_modules(remove_duplicate=False):
        kept = {name: b for name, b in module._buffers.items() if name not in module._non_persistent_buffers_set}
        for name, tensor in {**module._parameters, **kept}.items():
            if tensor is not None:
                yield unwrapped_name(f"{prefix}.{name}" if prefix else name), tensor


def _check_same_shape(name: str, given: object, live: Tensor) -> None:
    """Refuse a value that is not this tensor's; a shard of it is empty or flat, and says nothing of its shape."""
    if not isinstance(given, Tensor):
        raise ConfigError(f"state_dict[{told(name, 200)}] must be a tensor, not {told(given)}.")
    if live.ndim > 1 and live.numel() and given.ndim == live.ndim and given.shape != live.shape:
        raise CheckpointError(
            f"state_dict[{told(name, 200)}] has the shape {list(given.shape)}, and this model's has {list(live.shape)}. Is it the "
            "state of another model?"
        )


def _of_the_model(state: Mapping[str, Tensor], names: Collection[str]) -> dict[str, Tensor]:
    """A state with the names that a model's tensors have, if it is that of a wrapper around the model."""
    state = {unwrapped_name(name): tensor for name, tensor in state.items()}
    prefix = "module."  # DDP's
    if all(name.startswith(prefix) for name in state) and not any(name.startswith(prefix) for name in names):
        return {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def file_config(model: nn.Module, config: AdapterConfig, adapter_name: str, *, compact: bool = True) -> dict[str, Any]:
    """The contents of ``adapter_config.json``, with targets resolved so that every reader adapts the same modules.

    `compact` False is for a file that training resumes from, see `minipeft.methods.base.Adapter.compacted`.
    """
    values, layers = config.to_dict(), dict(layers_of(model, adapter_name))
    values["target_modules"] = _resolved_targets(model, config, adapter_name, layers)
    if isinstance(tables := values.get("trainable_token_indices"), dict):
        values["trainable_token_indices"] = _resolved_tables(model, tables, adapter_name)
    if config.modules_to_save is not None:
        copies = {name: w for name, w in wrappers_of(model, adapter_name) if isinstance(w, SavedModule)}
        saved = [name for name, wrapper in copies.items() if wrapper.only is None]  # bias="all" copies biases alone
        tied = [name for name in followers(model, config, adapter_name) if name in copies]
        originals = {name: copies[name].base_layer for name in (*saved, *tied)}
        values["modules_to_save"] = for_peft(model, config.modules_to_save, originals) or None
        bases = [copies[name].base_layer for name in tied]
        if config.ensure_weight_tying and any(rest_of(base) or isinstance(base, nn.Embedding) for base in bases):
            # PEFT has a whole copy of each then. Else it drops the bias of a head, and makes a linear layer of an embedding.
            values["ensure_weight_tying"] = False
    if "fan_in_fan_out" in values:
        values["fan_in_fan_out"] = any(layer.ops.fan_in_fan_out for layer in layers.values())
    adapters = {name: layer.adapter(adapter_name) for name, layer in layers.items()}
    values |= registry.method_class(config.method).file_options(values, adapters, compact)
    if config.base_model_name_or_path is None:
        values["base_model_name_or_path"] = name_or_path(model)
    if config.task_type is None:
        values.setdefault("auto_mapping", auto_mapping(model))
    return values


def auto_mapping(model: nn.Module) -> dict[str, str]:
    """The class of the base, by which PEFT's ``AutoPeftModel`` finds it without a task type."""
    # FSDP2 makes a class of its own; the one that minipeft makes has the name of the base's.
    cls = next(c for c in type(model).__mro__ if issubclass(c, nn.Module) and not c.__module__.startswith("torch.dist"))
    return {"base_model_class": cls.__name__, "parent_library": cls.__module__}


def _resolved_targets(
    model: nn.Module, config: AdapterConfig, adapter_name: str, layers: Mapping[str, AdaptedLayer]
) -> Any:
    targets = config.target_modules
    names = [name for name, layer in layers.items() if layer.targeted]
    if any(getattr(config, option) is not None for option in config.not_in_files):
        return names  # which says what those options say
    if targets in (None, ALL_LINEAR, ALL_LINEAR_TEXT):
        return _shortest(names, model)
    for _, layer in adapted_layers(model):
        if adapter_name in layer.tied_adapters and not layer.adapter(adapter_name).key_prefix:
            # Other readers would adapt a tied layer, too, that the user's list names; PEFT ties what is named.
            return [*names, *followers(model, config, adapter_name)]
    if not isinstance(targets, str) and len(matching(targets, names)) < len(names):
        return names  # the user's list has another name for a module that has several
    if isinstance(targets, str) and len(full_matches(targets, names, "target_modules")) < len(names):
        return names
    return config.to_dict()["target_modules"]


def _resolved_tables(model: nn.Module, option: Mapping[str, Any], adapter_name: str) -> dict[str, Any]:
    """Token ids by the first name of a table that has several, such as T5's once it was resized."""
    here, found = [name for name, _ in wrappers_of(model, adapter_name)], dict[str, Any]()
    for entry, ids in option.items():
        firsts = [entry] if any(is_suffix(entry, name) for name in here) else []
        firsts = firsts or [first for first, each in candidates(model).items() if matching([entry], each.names)]
        found |= dict.fromkeys(firsts, ids)
    return found


def _shortest(names: list[str], model: nn.Module) -> list[str] | str:
    """The last components of these module names if they select exactly these modules, else the names themselves.

    A name may be the ending of another one, as `feature_extractor` is in Wav2Vec2's x-vectors; then a regular expression.
    """
    chosen = set(names)
    others = [name for candidate in candidates(model).values() for name in candidate.names if name not in chosen]
    taken = {name.rpartition(".")[2] for name in others}
    last = sorted({name.rpartition(".")[2] for name in names})
    clear = [ending for ending in last if ending not in taken]
    if len(clear) == len(last):
        return last
    if chosen.isdisjoint(ending for other in others for ending in endings(other)):
        return names
    rest = [re.escape(name) for name in names if name.rpartition(".")[2] in taken]
    return "|".join([*rest, *([rf"(.*\.)?({'|'.join(map(re.escape, clear))})"] if clear else [])])


def save_adapter(
    directory: Path,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    base: Mapping[str, Any],
    kept: Sequence[str] = (),
    scaling: Mapping[str, Any] | None = None,
    card: Mapping[str, bytes] | None = None,
    tied: bool = False,
) -> None:
    """Write the files of an adapter, all or none (see `minipeft.files.atomic`).

    Args:
        directory: created if it does not exist.
        tensors: as `adapter_tensors` returns them.
        config: as `file_config` returns it.
        base: as `minipeft.files.base_samples.base_samples` returns it.
        kept: modules that are saved and do not train, see `minipeft.injection.fresh_parts`.
        scaling: the options that the user gave for what is now in B, see `minipeft.files.scaling_in_B`.
        card: the model card by its name, if one is to be written.
        tied: whether the user asked for ``ensure_weight_tying`` and `config` says False.

    Raises:
        CheckpointError: the directory cannot be written, or holds a whole model; or a tensor has no values here.
    """
    check_no_model_in(directory)
    check_values(directory, tensors)
    written = _compacted(tensors, config)
    weights = file_of(written, own_metadata(config, base, kept, directory, scaling, tied))
    text = config_text(config)
    warn_if_unreadable(directory, written, weights, text)
    write_files(directory, {WEIGHTS_FILE: weights, CONFIG_FILE: text, **(card or {})})


def config_text(config: Mapping[str, Any]) -> bytes:
    """The contents of ``adapter_config.json``."""
    # Only the top level is sorted: within rank_pattern the first key that fits decides, so its order has a meaning.
    return (json.dumps(dict(sorted(config.items())), indent=2) + "\n").encode("utf-8")


def check_no_model_in(directory: Path) -> None:
    """Raise CheckpointError if a directory for an adapter holds a whole model."""
    weights = (path for pattern in ("model*.safetensors", "pytorch_model*.bin") for path in directory.glob(pattern))
    if os.path.exists(directory / "config.json") and any(weights):
        raise CheckpointError(
            f"{directory} holds a whole model; with an adapter next to it, transformers would load the two as one. "
            "Save the adapter to a directory of its own."
        )


def _compacted(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """What is written of these tensors: themselves, or what the method makes of copies."""
    method = registry.method_class(config["peft_type"].lower())
    if not method.overrides("compacted"):
        return dict(tensors)
    copies = {key: t.detach().cpu().clone(memory_format=torch.contiguous_format) for key, t in tensors.items()}
    return method.compacted(copies, config)


def check_values(directory: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError for tensors without their values: a file with them would be worth nothing."""
    # AdaLoRA may leave a layer no rank, but then its tensors have two dimensions.
    empty = [
        key
        for key, tensor in tensors.items()
        if tensor.shape == (0,) or tensor.is_meta or is_divided(tensor) or _is_flat(key, tensor)
    ]
    if empty:
        raise CheckpointError(
            f"{directory}: {shown(empty, 3)} of {len(tensors)} tensors to save are not whole in this process, as FSDP2 and "
            "DeepSpeed's ZeRO-3 shard them. Pass the gathered ones: save_pretrained(..., "
            "state_dict=accelerator.get_state_dict(model)), called on every process."
        )


def _is_flat(key: str, tensor: Tensor) -> bool:
    """Whether this is a matrix as the first FSDP leaves it in a process: a part of it, in one dimension."""
    return tensor.ndim == 1 and MATRIX.search(key) is not None


def warn_if_unreadable(directory: Path, tensors: Mapping[str, Tensor], weights: Pieces, config: bytes) -> None:
    """Warn about a file that is written and that `load_adapter` will refuse; no values are lost that training made."""
    with torch.no_grad():
        broken = [key for key, t in tensors.items() if t.is_floating_point() and not is_finite(t)]
    reasons = {
        f"it holds NaN or infinity in {shown(broken, 3)}, so the training has diverged": broken,
        f"a tensor has more than {MAX_DIMENSIONS} dimensions": any(t.ndim > MAX_DIMENSIONS for t in tensors.values()),
        "it has complex numbers": any(t.is_complex() for t in tensors.values()),
        "the header of its weights is too long": header_is_too_long(weights.header, weights.nbytes),
        f"its configuration is longer than {MAX_CONFIG_BYTES:,} bytes": len(config) > MAX_CONFIG_BYTES,
    }
    found = [reason for reason, holds in reasons.items() if holds]
    if found:
        warn(f"{directory} is saved, but cannot be loaded again: {'; '.join(found)}.")
