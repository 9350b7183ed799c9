"""Which package a class comes from, and whether compressed-tensors or torchao has changed a module."""

from __future__ import annotations

from torch import nn


def is_from(cls: type, package: str) -> bool:
    """Whether a class, or a class that it derives from, comes from a package."""
    return any(base.__module__.partition(".")[0] == package for base in cls.__mro__)


def is_compressed(module: nn.Module) -> bool:
    """Whether compressed-tensors quantizes a module, or holds its parameters, of which it may hand out copies."""
    table = type(module._parameters)
    return "quantization_scheme" in vars(module) or (table is not dict and is_from(table, "compressed_tensors"))


def rounds_inputs(module: nn.Module) -> bool:
    """Whether torchao quantizes what goes into a layer, too. The gradient ends there (torchao 0.18)."""
    weight = getattr(module, "weight", None)
    return is_from(type(weight), "torchao") and getattr(weight, "act_quant_kwargs", None) is not None
