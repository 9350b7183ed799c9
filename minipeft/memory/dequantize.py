"""From quantized layers to float layers, in a whole model."""

from __future__ import annotations

import torch
from torch import nn

from minipeft.config.options import checked_module
from minipeft.ecosystem.transformers_model import forget_quantization, mark_as_loaded
from minipeft.errors import MergeError, StateError, all_or_nothing
from minipeft.injection.module_tree import candidates
from minipeft.layers.base import layer_ops


@all_or_nothing
@torch.no_grad()
def dequantize(model: nn.Module) -> nn.Module:
    """Replace every quantized layer of a model by a float layer with the dequantized weight; returns the model.

    The layers take the dtype of the model's other parameters. A layer that once replaced a GPT-2 ``Conv1D`` becomes a
    Conv1D again, so transformers can save the model.

    Raises:
        ConfigError: `model` is not a module.
        StateError: the model has adapters (merge or unload them first).
        MergeError: hooks or a patched forward on a quantized layer would be lost.
    """
    checked_module(model)
    found, dtype = candidates(model), float_dtype(model)
    quantized = {name: candidate for name, candidate in found.items() if _is_quantized(candidate.base)}
    for name, candidate in quantized.items():
        if candidate.module is not candidate.base:
            raise StateError(f"{name} has adapters; merge_and_unload(dequantize=True) or unload() them first.")
    check_replaceable(model)
    for candidate in quantized.values():
        ops = layer_ops(candidate.base)
        assert ops is not None
        weight, bias = ops.read_weight(candidate.base).to(dtype), ops.read_bias(candidate.base)
        layer = ops.write_weight(candidate.base, weight, bias)
        mark_as_loaded(layer, candidate.base)
        for parent, attribute in candidate.places:
            setattr(parent, attribute, layer)
    forget_quantization(model)
    return model


def _is_quantized(module: nn.Module) -> bool:
    ops = layer_ops(module)
    return ops is not None and ops.is_quantized


def check_replaceable(model: nn.Module) -> None:
    """Refuse to replace quantized layers if something is attached to them that the replacements would lose.

    Raises:
        MergeError: hooks or a patched forward are.
    """
    for name, candidate in candidates(model).items():
        base = candidate.base
        hooks = base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks
        if (hooks or "forward" in vars(base)) and _is_quantized(base):
            raise MergeError(
                f"{name}: hooks or a patched forward are attached to this {type(base).__name__}, and a float layer in its "
                "place would lose them. Remove them first (accelerate: remove_hook_from_submodules)."
            )


def float_dtype(model: nn.Module) -> torch.dtype:
    """The dtype for float layers of a model: that of its first plain floating-point parameter outside adapters."""
    for name, parameter in model.named_parameters():
        if type(parameter) is nn.Parameter and parameter.is_floating_point() and "adapters" not in name.split("."):
            return parameter.dtype
    return torch.get_default_dtype()
