"""torchao's int8 weight-only layers: a plain ``nn.Linear`` whose weight is a tensor subclass."""

from __future__ import annotations

import importlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minipeft.layers.base import runs_only
from minipeft.layers.quantised import QuantizedLinearOps, with_bias
from minipeft.registry import register_layer


@register_layer(nn.Linear, weight="torchao.quantization.Int8Tensor")
class Int8TensorOps(QuantizedLinearOps):
    """W = C s with a scale for each output feature or group; only where the input stays as it is."""

    kinds = ("int8_weight_only",)

    @staticmethod
    def accepts(base: Any) -> bool:
        weight: Any = base._parameters.get("weight")
        cls = type(weight)
        known = cls.__name__ == "Int8Tensor" and cls.__module__.startswith("torchao.")
        return known and weight.act_quant_kwargs is None and weight.ndim == 2

    @staticmethod
    @torch.no_grad()
    def dequantized(base: Any) -> Tensor:
        weight: Tensor = base.weight.dequantize()
        return weight

    @staticmethod
    def pack(kind: str, weight: Tensor, bias: Tensor | None) -> nn.Module:
        torchao: Any = importlib.import_module("torchao.quantization")
        out_features, in_features = weight.shape
        layer = nn.Linear(in_features, out_features, bias is not None, device="meta")
        layer.weight = nn.Parameter(weight, False)
        torchao.quantize_(with_bias(layer, bias), torchao.Int8WeightOnlyConfig())
        return layer

    @staticmethod
    def run(base: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        plain = runs_only(base, nn.Linear.forward) and not args and not kwargs and not torch.compiler.is_compiling()
        frozen = base.bias is None or not base.bias.requires_grad
        packed = type(base.weight) is not nn.Parameter  # and not the float layer that an adapter was merged into
        if plain and frozen and packed and torch.is_grad_enabled() and x.requires_grad:
            return _FrozenInt8.apply(x, base.weight, base.bias)  # type: ignore[no-untyped-call]
        return base(x, *args, **kwargs)


class _FrozenInt8(torch.autograd.Function):
    """torchao's product, whose own backward pass would be kept waiting with the weight in float."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Any, bias: Tensor | None) -> Tensor:
        ctx.weight, ctx.dtype = weight, x.dtype  # it is frozen and stays the layer's own
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return (dy @ ctx.weight.dequantize().to(dy.dtype)).to(ctx.dtype), None, None
