"""From quantized layers to float ones: in a whole model, and what it costs in one layer."""

from __future__ import annotations

import torch
from torch import nn

from minipeft.errors import MergeError, StateError, all_or_nothing
from minipeft.injection.adapted_layer import AdaptedLayer
from minipeft.injection.module_tree import candidates
from minipeft.layers.base import layer_ops

# What transformers keeps of a quantization: on the model, and in its config.
NOTES = ("hf_quantizer", "is_quantized", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit")


@all_or_nothing
@torch.no_grad()
def dequantize(model: nn.Module) -> nn.Module:
    """Replace every quantized layer of a model by a float one that holds the dequantized weight; returns the model.

    The layers take the dtype of the model's other parameters. One that replaced a GPT-2 ``Conv1D`` becomes a Conv1D
    again, so that the model is what its class says and can be saved by transformers.

    Raises:
        StateError: the model has adapters (merge or unload them first).
        MergeError: hooks or a patched forward sit on a quantized layer, and would be lost.
    """
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
        for parent, attribute in candidate.places:
            setattr(parent, attribute, layer)
    for module in model.modules():
        for note in NOTES:
            vars(module).pop(note, None)
        vars(getattr(module, "config", module)).pop("quantization_config", None)
    return model


def _is_quantized(module: nn.Module) -> bool:
    ops = layer_ops(module)
    return ops is not None and ops.is_quantized


def check_replaceable(model: nn.Module) -> None:
    """Refuse to replace quantized layers to which something is attached that their replacements would not have.

    Raises:
        MergeError: so it is.
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
    """The dtype that float layers of a model should have: that of its first own parameter that is not packed."""
    for name, parameter in model.named_parameters():
        if type(parameter) is nn.Parameter and parameter.is_floating_point() and "adapters" not in name.split("."):
            return parameter.dtype
    return torch.get_default_dtype()


def dtype_to_merge_in(path: str, layer: AdaptedLayer, model: nn.Module, dequantize: bool) -> torch.dtype:
    """The dtype a layer's merged weight is rounded to: its own, or for a quantized layer that of the float one to come.

    Raises:
        MergeError: the layer is quantized and `dequantize` is False.
    """
    base = layer.base_layer
    if not layer.ops.is_quantized:
        return layer.ops.read_weight(base).dtype
    if not dequantize:
        raise MergeError(
            f"{path}: {type(base).__name__} is quantized, and rounding to its few values would lose most of an update. "
            "Keep the adapter beside it, or pass dequantize=True for float layers."
        )
    return float_dtype(model)


def output_error(layer: AdaptedLayer, names: tuple[str, ...], replacement: nn.Module) -> float:
    """How far a replacement's output lies from that of a layer with these adapters, at most, as a share of the largest.

    Both get the same random input, in eval mode; torch's generator stays where it is.
    """
    base, ops = layer.base_layer, layer.ops
    modules = [base, *map(layer.adapter, names)]
    modes = [(part, part.training) for module in modules for part in module.modules()]
    try:
        for part, _ in modes:
            part.training = False
        with torch.random.fork_rng(devices=[]):
            x = ops.example_input(base)
        y = layer.run_with(names, x)
        merged = replacement(x.to(next(replacement.parameters()).dtype)).to(y.dtype)
    finally:
        for part, mode in modes:
            part.training = mode
    return float((merged - y).abs().max() / y.abs().max().clamp_min(1e-12))
