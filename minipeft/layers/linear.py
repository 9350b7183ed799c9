"""Linear maps: ``torch.nn.Linear`` and GPT-2's ``Conv1D``, which stores its weight the other way round."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from minipeft.class_swap import plain_class
from minipeft.layers.base import LayerOps, has_plain_weight, runs_only
from minipeft.registry import register_layer


@register_layer(nn.Linear)
class LinearOps(LayerOps):
    """``nn.Linear`` and its subclasses, as long as their weight is an ordinary (out, in) tensor."""

    in_all_linear = True

    def accepts(self, base: Any) -> bool:
        # nn.MultiheadAttention reads the weight of its out_proj and never calls it, so an adapter there would do nothing.
        read_not_called = isinstance(base, nn.modules.linear.NonDynamicallyQuantizableLinear)
        return not read_not_called and has_plain_weight(base, (base.out_features, base.in_features))

    def is_linear_call(self, base: Any) -> bool:
        return runs_only(base, nn.Linear.forward)

    def shape(self, base: Any) -> tuple[int, int]:
        return base.out_features, base.in_features

    def read_weight(self, base: Any) -> Tensor:
        return base.weight

    @torch.no_grad()
    def write_weight(self, base: Any, weight: Tensor, bias: Tensor | None) -> nn.Module:
        base.weight.copy_(weight)
        if bias is not None:
            base.bias.copy_(bias)
        return base

    def example(self, in_features: int, out_features: int) -> nn.Module | None:
        return nn.Linear(in_features, out_features)


@register_layer("transformers.pytorch_utils.Conv1D")
class Conv1DOps(LinearOps):
    """The ``Conv1D`` of GPT-2's family: y = x W + b with W stored as (in, out)."""

    fan_in_fan_out = True

    def accepts(self, base: Any) -> bool:
        return has_plain_weight(base, (base.nx, base.nf))

    def is_linear_call(self, base: Any) -> bool:
        cls: Any = plain_class(type(base))
        return cls.__module__ == "transformers.pytorch_utils" and runs_only(base, cls.forward)

    def shape(self, base: Any) -> tuple[int, int]:
        return base.nf, base.nx

    def read_weight(self, base: Any) -> Tensor:
        return base.weight.t()

    def write_weight(self, base: Any, weight: Tensor, bias: Tensor | None) -> nn.Module:
        return super().write_weight(base, weight.t(), bias)

    def example(self, in_features: int, out_features: int) -> nn.Module | None:
        return importlib.import_module("transformers.pytorch_utils").Conv1D(out_features, in_features)
