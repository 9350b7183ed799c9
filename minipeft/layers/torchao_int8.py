"""torchao's int8 weight-only layers: a plain ``nn.Linear`` whose weight is a tensor subclass."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from minipeft.layers.base import runs_only
from minipeft.layers.quantized import QuantizedLinearOps, with_bias
from minipeft.registry import register_layer


@register_layer(nn.Linear, weight="torchao.quantization.Int8Tensor")
class Int8TensorOps(QuantizedLinearOps):
    """W = C s with a scale for each output feature or group; only where the input stays as it is.

    torchao's own backward pass would be kept waiting with the weight in float.
    """

    kinds = ("int8_weight_only",)

    def accepts(self, base: Any) -> bool:
        weight: Any = base._parameters.get("weight")
        cls = type(weight)
        known = cls.__name__ == "Int8Tensor" and cls.__module__.startswith("torchao.")
        return known and weight.act_quant_kwargs is None and weight.act_pre_scale is None and weight.ndim == 2

    @torch.no_grad()
    def dequantized(self, base: Any) -> Tensor:
        return base.weight.dequantize()

    def quantize(self, kind: str, weight: Tensor, bias: Tensor | None) -> nn.Module:
        torchao: Any = importlib.import_module("torchao.quantization")
        out_features, in_features = weight.shape
        layer = nn.Linear(in_features, out_features, bias is not None, device="meta")
        layer.weight = nn.Parameter(weight, False)
        torchao.quantize_(with_bias(layer, bias), torchao.Int8WeightOnlyConfig())
        return layer

    @torch.no_grad()
    def dequantized_in(self, base: Any, dtype: torch.dtype) -> Tensor:
        packed = base.weight
        row_by_row = packed.scale.shape == (len(packed), 1)
        # As torchao's own product has it, which passes over the zero points: they are 0. `dequantize` makes three arrays.
        return packed.qdata.to(dtype).mul_(packed.scale) if row_by_row else packed.dequantize(dtype)

    def is_float_call(self, base: Any, x: Tensor) -> bool:
        # An adapter may be merged, and `base` the float layer that then stands there.
        packed = type(base._parameters.get("weight")) is not nn.Parameter
        return packed and runs_only(base, nn.Linear.forward) and x.is_floating_point()
