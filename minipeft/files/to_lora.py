"""Any low-rank update as plain LoRA, which every reader of PEFT's files understands."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from minipeft.config.adapter_config import AdapterConfig
from minipeft.ecosystem.wrapper_names import PREFIX
from minipeft.errors import CheckpointError
from minipeft.files.save import file_config
from minipeft.injection.adapted_layer import AdaptedLayer
from minipeft.injection.module_tree import layers_of, wrappers
from minipeft.layers.offloaded import check_values_here
from minipeft.methods.base import Adapter

# What a plain LoRA configuration takes over from that of another method, besides `AdapterConfig`'s own options.
KEPT = {"lora_dropout", "target_parameters", "trainable_token_indices", "ensure_weight_tying"}


@torch.no_grad()
def as_lora(model: nn.Module, config: AdapterConfig, adapter_name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An adapter as plain LoRA: one rank for all layers, the scaling in B, no pattern tables.

    The file adapts the plain base: the starting values that PiSSA takes out of the base, for example, are subtracted
    from the update, which doubles its rank. Updates of a lower rank are padded with zeros. So servers that know one rank
    and one scaling can read it.

    Returns:
        Tensors and configuration for `minipeft.files.save.save_adapter`. The update equals the live one up to the
        rounding of ``scaling * B``.

    Raises:
        CheckpointError: on some layer the adapter is more than a low-rank update, or also trains a bias.
        StateError: its values are not here as a whole: offloaded, or divided over processes.
    """
    layers = dict(layers_of(model, adapter_name))
    pairs = {path: _pair(path, layer, layer.adapter(adapter_name)) for path, layer in layers.items()}
    rank = max(down.shape[1] for _, down in pairs.values())
    tensors = {
        f"{PREFIX}{path}.{key}": tensor
        for path, wrapper in wrappers(model)
        if path not in layers
        for key, tensor in wrapper.file_tensors(adapter_name).items()
    }
    for path, (up, down) in pairs.items():
        key = f"{PREFIX}{path}.lora_{{}}.weight"
        if layers[path].ops.is_embedding:
            key = f"{PREFIX}{path}.lora_embedding_{{}}"
        tensors[key.format("A")], tensors[key.format("B")] = _as_stored(layers[path], up, down, rank)
    kept = {f.name for f in dataclasses.fields(AdapterConfig)} | KEPT | {"auto_mapping"} | config.other_keys.keys()
    plain = {key: value for key, value in file_config(model, config, adapter_name).items() if key in kept}
    orientation = any(layer.ops.fan_in_fan_out for layer in layers.values())
    lora = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "fan_in_fan_out": orientation, "bias": "none"}
    return tensors, {**plain, **lora}


def _pair(path: str, layer: AdaptedLayer, adapter: Adapter) -> tuple[Tensor, Tensor]:
    """(up, down) of a layer's whole update, shapes (matrices, out, r) and (matrices, r, in); CheckpointError if it is more."""
    check_values_here(path, adapter)
    factors = adapter.stacked_factors()
    if factors is None or (adapter.factors() is None and len(factors[0]) == 1):  # a stack has no bias to train
        raise CheckpointError(
            f"{path}: {type(adapter).__name__} is more than a low-rank update of the weight here, so it is not plain "
            "LoRA. Save it as it is."
        )
    up, down = factors
    return up / layer.ops.update_count, down


def _as_stored(layer: AdaptedLayer, up: Tensor, down: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(A, B) of this rank in the shapes of a file; a kernel's factors are kernels, too."""
    first, second = layer.ops.factor_shapes(layer.base_layer, 1)
    up, down = up.flatten(2), down.flatten(2)
    missing = rank - down.shape[1]
    down = torch.cat([down, down.new_zeros(len(down), missing, down.shape[2])], 1)
    up = torch.cat([up, up.new_zeros(*up.shape[:2], missing)], 2).permute(1, 2, 0)  # as `split_columns` reads it
    return down.reshape(-1, *first[1:]), up.reshape(len(up), -1, *second[2:])
