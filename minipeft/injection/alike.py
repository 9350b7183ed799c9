"""Layers that look alike, and their adapters on the meta device: a model has many layers, of a few kinds."""

from __future__ import annotations

from collections import OrderedDict
from typing import TypeVar

import torch
from torch import nn

from minipeft.layers.offloaded import HOOK

SCALARS = {bool, float, int, str, type(None)}
TABLES = {dict, list, set, OrderedDict}  # most that a module has are empty
Look = tuple[object, ...]
M = TypeVar("M", bound=nn.Module)


def stand_in(layer: nn.Module, known: dict[Look, nn.Module]) -> nn.Module:
    """A stand-in for a layer, with parameters that have a shape only: the same one for all layers that look alike."""
    look = _look(layer)
    if look not in known:
        known[look] = _without_values(layer)
    return known[look]


def _look(layer: nn.Module) -> Look:
    """All that an adapter can see of a layer, except the values of its parameters."""
    seen: list[object] = [type(layer)]
    for name, value in vars(layer).items():
        if name == "_parameters":
            seen += [(own, p if p is None else (type(p), p.shape, p.dtype)) for own, p in value.items()]
        elif type(value) in SCALARS:
            seen += (name, value)
        elif value or type(value) not in TABLES:
            seen += (name, id(value))
    return tuple(seen)


def _without_values(layer: nn.Module) -> nn.Module:
    # Made anew: a quantized weight, a subclass of Tensor, may not be able to move to the meta device.
    parameters = {
        name: None if own is None else nn.Parameter(torch.empty(own.shape, dtype=own.dtype, device="meta"), False)
        for name, own in layer._parameters.items()
    }
    other: nn.Module = object.__new__(type(layer))
    vars(other).update(vars(layer), _parameters=parameters)
    vars(other).pop(HOOK, None)
    return other


def is_simple(module: nn.Module) -> bool:
    """Whether the module has nothing but tensors, numbers, texts and such modules."""
    tables = ("_parameters", "_buffers", "_modules")
    return all(
        type(value) in SCALARS or (type(value) in TABLES and (not value or name in tables))
        for inner in module.modules()
        for name, value in vars(inner).items()
    )


def twin(module: M) -> M:
    """Another module that has the same tensors as this one, which `is_simple`."""
    own = vars(module).copy()
    for name, value in vars(module).items():
        if type(value) in TABLES:
            own[name] = value.copy() if value else type(value)()  # a copy of an empty one takes five times as long
    for name, inner in module._modules.items():
        own["_modules"][name] = None if inner is None else twin(inner)
    other: M = object.__new__(type(module))
    object.__setattr__(other, "__dict__", own)
    return other
