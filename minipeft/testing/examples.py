"""What the contract suite tries: a small layer of each built-in type, and the options that a method cannot do without.

A plugin adds its own with `register_example` and `register_options`, or passes them to `check_layer` and `check_method`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from minipeft.errors import TargetError
from minipeft.layers.base import LayerOps
from minipeft.layers.quantized import QuantizedLinearOps
from minipeft.registry import registry
from minipeft.registry.type_names import qualified

Make = Callable[[int, int], nn.Module]
Call = Callable[[nn.Module, Tensor], Tensor]


@dataclass(frozen=True)
class Example:
    """A layer to try.

    Args:
        make: (in_features, out_features) -> a small layer with about these sizes.
        call: (layer, x) -> output, for the input x of `LayerOps.example_input`. A function that can be pickled.
        parameter: name of the bare parameter to adapt; "" adapts the layer itself.
    """

    make: Make
    call: Call
    parameter: str = ""

    def selection(self, name: str) -> dict[str, list[str]]:
        """The options of a configuration that select the layer that has this name in its model."""
        return {"target_parameters": [f"{name}.{self.parameter}"]} if self.parameter else {"target_modules": [name]}


def call_layer(layer: nn.Module, x: Tensor) -> Tensor:
    """``layer(x)``."""
    return layer(x)


def register_example(layer: type | str, make: Make, *, call: Call = call_layer, parameter: str = "") -> None:
    """Let `check_method` and `check_layer` try a layer type with what `make` makes; arguments are those of `Example`."""
    _examples[layer if isinstance(layer, str) else qualified(layer)] = Example(make, call, parameter)


def register_options(method: str, **options: Any) -> None:
    """Let `check_layer` and `check_method` try a method with these options, if it has no defaults for them."""
    _options[method] = options


def example_of(layer: str) -> Example:
    """The example of a layer type, by its name in `registry.layers`; raises TargetError if there is none."""
    known = _by_key()
    if layer not in known:
        raise TargetError(f"{layer}: there is no example to try; pass make=..., or call testing.register_example.")
    return known[layer]


def example_like(ops: LayerOps, make: Make) -> Example:
    """What `make` makes, called as the example of a layer type with these ops, if there is one."""
    known, names = _by_key(), [name for name, other in registry.layers().items() if other == ops]
    like = next((known[name] for name in names if name in known), Example(make, call_layer))
    return replace(like, make=make)


def _by_key() -> dict[str, Example]:
    return {registry.layer_key(name): example for name, example in _examples.items()}


def options_of(method: str) -> Mapping[str, Any]:
    """The options without which the method cannot be tried."""
    return _options.get(method, {})


class Experts(nn.Module):
    """Two experts in one parameter, and a sum that tells them apart."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.randn(2, out_features, in_features) / in_features**0.5)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.experts.unbind()
        return x @ first.t() + torch.tanh(x @ second.t())


def _attention(in_features: int, out_features: int) -> nn.Module:
    return nn.MultiheadAttention(in_features, 2)


def _attend(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x, x.flip(0), x)[0]


def _conv1d(in_features: int, out_features: int) -> nn.Module:
    return importlib.import_module("transformers.pytorch_utils").Conv1D(out_features, in_features)


def _quantized(layer: str, in_features: int, out_features: int) -> nn.Module:
    ops = registry.layers()[registry.layer_key(layer)]
    assert isinstance(ops, QuantizedLinearOps)
    linear = nn.Linear(8 * in_features, 8 * out_features)  # whole blocks of 64 weights
    return ops.quantize(ops.kinds[0], linear.weight.detach(), linear.bias.detach())


_examples: dict[str, Example] = {}
_options: dict[str, dict[str, Any]] = {}

register_example(nn.Linear, nn.Linear)
register_example(nn.Embedding, nn.Embedding)
register_example(nn.Conv1d, partial(nn.Conv1d, kernel_size=2, stride=1, padding=1, groups=2))
register_example(nn.Conv2d, partial(nn.Conv2d, kernel_size=2, stride=2, padding=1, groups=2))
register_example(nn.Conv3d, partial(nn.Conv3d, kernel_size=2, stride=1, padding=1, groups=2))
register_example(nn.MultiheadAttention, _attention, call=_attend)
register_example(nn.Parameter, Experts, parameter="experts")
register_example("transformers.pytorch_utils.Conv1D", _conv1d)
for _layer in (
    "bitsandbytes.nn.Linear4bit",
    "bitsandbytes.nn.Linear8bitLt",
    "torch.nn.modules.linear.Linear[Int8Tensor]",
):
    register_example(_layer, partial(_quantized, _layer))

register_options("adalora", total_step=10)
register_options("dora", use_dora=True)
register_options("trainable_tokens", token_indices=[6, 0, 3, 4])
