"""Any low-rank update as plain LoRA, which every reader of PEFT's files understands."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from minipeft.config import AdapterConfig
from minipeft.errors import CheckpointError
from minipeft.files.save import file_config
from minipeft.injection.build import PREFIX
from minipeft.injection.module_tree import layers_of, wrappers

# What a plain LoRA configuration takes over from that of another method, besides `AdapterConfig`'s own options.
KEPT = {"lora_dropout", "trainable_token_indices", "ensure_weight_tying"}


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
    """
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    layers = dict(layers_of(model, adapter_name))
    for path, layer in layers.items():
        adapter = layer.adapter(adapter_name)
        factors = adapter.factors()
        if factors is None:
            raise CheckpointError(
                f"{path}: {type(adapter).__name__} is more than a low-rank update of the weight here, so it is not plain "
                "LoRA. Save it as it is."
            )
        pairs[f"{path}.lora_embedding_{{}}" if layer.ops.is_embedding else f"{path}.lora_{{}}.weight"] = factors
    tensors = {
        f"{PREFIX}{path}.{key}": tensor
        for path, wrapper in wrappers(model)
        if path not in layers
        for key, tensor in wrapper.file_tensors(adapter_name).items()
    }
    rank = max(len(down) for _, down in pairs.values())
    for name, (up, down) in pairs.items():
        missing = rank - len(down)
        tensors[PREFIX + name.format("A")] = torch.cat([down, down.new_zeros(missing, down.shape[1])])
        tensors[PREFIX + name.format("B")] = torch.cat([up, up.new_zeros(len(up), missing)], 1)
    kept = {f.name for f in dataclasses.fields(AdapterConfig)} | KEPT | {"auto_mapping"} | config.other_keys.keys()
    plain = {key: value for key, value in file_config(model, config, adapter_name).items() if key in kept}
    orientation = any(layer.ops.fan_in_fan_out for layer in layers.values())
    lora = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "fan_in_fan_out": orientation, "bias": "none"}
    return tensors, {**plain, **lora}
