"""Layers that are read instead of called, and adapters that act at all."""

from __future__ import annotations

import copy
from typing import Any

import torch

from minipeft.errors import StateError
from minipeft.testing.case import Case, layers_of


def reads(case: Case) -> str | None:
    """Code that reads the layer's weight and bias gets the merged ones, with gradients for the adapter."""
    if not case.ops.can_merge:
        return f"{type(case.ops).__name__}.can_merge is False, and merging is refused"
    model = case.adapted()
    merged = copy.deepcopy(model)
    if all(layer.stored is None for layer in layers_of(model)):
        return f"{case.layer} does not hold a weight that could be read as it is"
    merged.merge_adapter(untie=True)
    for layer, wanted in zip(layers_of(model), layers_of(merged), strict=True):
        values = {name: getattr(layer, name) for name in _names(layer)}
        for name, value in values.items():
            case.same("reads", f"{name}, read", value, getattr(wanted, name))
        total = torch.stack([(value * value.detach().cos()).sum() for value in values.values()]).sum()
        if not total.requires_grad:
            raise case.fail("reads", "reading the weight gives the adapter no gradient; is merge differentiable?")
        torch.autograd.backward(total)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.grad is None:
            raise case.fail("reads", f"{name} gets no gradient from code that reads; is merge differentiable?")
    return None


def _names(layer: Any) -> list[str]:
    return [layer.stored.name] + ["bias"] * (layer.ops.read_bias(layer.base_layer) is not None)


def acts(case: Case) -> str | None:
    """A forward pass calls or reads every adapted layer."""
    model = case.adapted()
    model._state.refuses_idle = True
    try:
        model(case.input(case.base()))
    except StateError as error:
        raise case.fail("acts", str(error)) from None
    return None
