"""Any low-rank update as plain LoRA, which every reader of PEFT's files understands."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from minipeft.config import AdapterConfig
from minipeft.errors import CheckpointError
from minipeft.files.save import adapters_of, file_config
from minipeft.injection.adapted_layer import AdaptedLayer
from minipeft.injection.build import PREFIX
from minipeft.injection.module_tree import wrappers


@torch.no_grad()
def as_lora(model: nn.Module, config: AdapterConfig, adapter_name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What to save of an adapter so that it is plain LoRA: of one rank, with the scaling in B and no pattern tables.

    PiSSA's start, for one, is taken off the update, so that the file adapts the base as it is, by twice the rank. An
    update of lower rank than another is filled up with zeros. Servers that know one rank and one scaling read the file.

    Args:
        model: the adapted model; it is only read.
        config: that of the adapter.
        adapter_name: which of its adapters.

    Returns:
        Tensors and configuration as `minipeft.files.save.save_adapter` takes them; the update is the live one up to the
        rounding of ``scaling * B``.

    Raises:
        CheckpointError: on some layer the adapter is no low-rank sum, or trains a bias too.
    """
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    adapters = adapters_of(model, adapter_name)
    tensors: dict[str, Tensor] = {}
    for path, wrapper in wrappers(model):
        if path in adapters and isinstance(wrapper, AdaptedLayer):
            factors = wrapper.adapter(adapter_name).factors()
            if factors is None:
                raise CheckpointError(
                    f"{path}: what {type(wrapper.adapter(adapter_name)).__name__} does here is more than a low-rank "
                    "update of the weight, so it is no plain LoRA. Save it as it is."
                )
            lookup = wrapper.ops.is_embedding
            pairs[f"{path}.lora_embedding_{{}}" if lookup else f"{path}.lora_{{}}.weight"] = factors
        else:
            tensors |= {f"{PREFIX}{path}.{key}": tensor for key, tensor in wrapper.file_tensors(adapter_name).items()}
    rank = max(len(down) for _, down in pairs.values())
    for name, (up, down) in pairs.items():
        missing = rank - len(down)
        tensors[PREFIX + name.format("A")] = torch.cat([down, down.new_zeros(missing, down.shape[1])])
        tensors[PREFIX + name.format("B")] = torch.cat([up, up.new_zeros(len(up), missing)], 1)
    values = file_config(model, config, adapter_name)
    kept = {f.name for f in dataclasses.fields(AdapterConfig)} | {"lora_dropout", "trainable_token_indices"}
    plain = {key: value for key, value in values.items() if key in kept}
    orientation = any(
        wrapper.ops.fan_in_fan_out
        for path, wrapper in wrappers(model)
        if path in adapters and isinstance(wrapper, AdaptedLayer)
    )
    lora = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "fan_in_fan_out": orientation, "bias": "none"}
    return tensors, {**plain, **lora}
