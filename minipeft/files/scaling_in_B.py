"""Adapters of diffusers' models, saved with the scaling in B.

diffusers reads ``adapter_config.json`` nowhere, and takes alpha for the rank if it is given tensors alone, as by
``unet.load_lora_adapter(load_file(...))``. So the file says alpha = rank on every layer, B holds the rest, and each reader
has the same update. The metadata keeps what the user asked for, and minipeft reads that back.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from minipeft.config.adapter_config import AdapterConfig, config_from_dict
from minipeft.ecosystem.packages import is_from
from minipeft.ecosystem.wrapper_names import PREFIX
from minipeft.files.tensor_file import TensorFile, damaged

SCALING = ("lora_alpha", "alpha_pattern", "use_rslora")
ENDS = (".lora_B.weight", ".lora_B.bias", ".lora_embedding_B")


def for_diffusers(
    model: nn.Module, tensors: Mapping[str, Tensor], values: Mapping[str, Any]
) -> tuple[Mapping[str, Tensor], Mapping[str, Any], Mapping[str, Any] | None]:
    """Tensors and configuration of the same update with alpha = rank, and the options that said otherwise.

    As they are, and None, if the model is not diffusers', the method is not LoRA, or a layer is scaled by 0. B is rounded
    once more, unless the scaling is a power of two.
    """
    if not is_from(type(model), "diffusers"):
        return tensors, values, None
    scalings = _scalings(tensors, config_from_dict(dict(values)))
    if set(scalings.values()) <= {1.0} or 0.0 in scalings.values():
        return tensors, values, None
    scaled = {key: (tensors[key].detach().double() * factor).to(tensors[key]) for key, factor in scalings.items()}
    alpha = {"lora_alpha": values["r"], "alpha_pattern": dict(values.get("rank_pattern") or {}), "use_rslora": False}
    asked = {option: values[option] for option in SCALING if option in values}
    return {**tensors, **scaled}, {**values, **alpha}, asked


def _scalings(keys: Iterable[str], config: AdapterConfig) -> dict[str, float]:
    """What each B is multiplied with; empty if the update is not linear in B, or the file subtracts another one."""
    if config.method != "lora" or any(".initial_lora_" in key for key in keys):
        return {}
    names = {key: key.removeprefix(PREFIX).removesuffix(end) for key in keys for end in ENDS if key.endswith(end)}
    configs: Mapping[str, Any] = config.for_modules(list(dict.fromkeys(names.values())))
    return {key: configs[name].scaling for key, name in names.items()}


def with_own_scaling(
    weights: TensorFile, values: Mapping[str, Any], asked: Mapping[str, Any]
) -> tuple[TensorFile, dict[str, Any]]:
    """Weights and configuration with the scaling that the user asked for outside of B.

    `asked` are the options that say so, from the metadata.

    Raises:
        CheckpointError: these cannot have been in B.
        ConfigError: no configuration has such values.
    """
    own = {**values, **{option: asked[option] for option in SCALING if option in asked}}
    scalings = _scalings(weights.shapes, config_from_dict(own, f"{weights.path}"))
    if 0.0 in scalings.values():
        raise damaged(weights.path, "a scaling of 0 cannot have been in B")
    divided = {
        key: weights.making(functools.partial(_divided, scaling=scaling), [key], weights.shapes[key])
        for key, scaling in scalings.items()
    }
    return replace(weights, entries={**weights.entries, **divided}), own


def _divided(B: Tensor, scaling: float) -> Tensor:
    return (B.double() / scaling).to(B)
