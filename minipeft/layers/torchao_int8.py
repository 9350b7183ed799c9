"""torchao's int8 weight-only layers: a plain ``nn.Linear`` whose weight is a tensor subclass."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from minipeft.layers.base import runs_only
from minipeft.layers.quantized import QuantizedLinearOps, with_bias
from minipeft.registry.registry import register_layer


@register_layer(nn.Linear, weight="torchao.quantization.Int8Tensor")
class Int8TensorOps(QuantizedLinearOps):
    """W = C s with one scale per output feature or group; not if the input is quantized or scaled too.

    torchao's own backward pass would keep the weight in float until then.
    """

    kinds = ("int8_weight_only",)

    def accepts(self, base: Any) -> bool:
        weight: Any = base._parameters.get("weight")
        cls = type(weight)
        known = cls.__name__ == "Int8Tensor" and cls.__module__.startswith("torchao.")
        return known and weight.act_quant_kwargs is None and weight.act_pre_scale is None and weight.ndim == 2

    @torch.no_grad()
    def dequantized(self, base: Any, dtype: torch.dtype | None = None) -> Tensor:
        weight = base.weight
        if dtype is None:
            return weight.dequantize()
        if weight.scale.shape != (len(weight), 1):
            return weight.dequantize(dtype)
        # As torchao's own product, which skips the zero points: they are 0. `dequantize` makes three arrays.
        return weight.qdata.to(dtype).mul_(weight.scale)

    def calls_linear(self, base: Any, x: Tensor) -> bool:
        # While an adapter is merged, `base` is a float layer.
        quantized = type(base._parameters.get("weight")) is not nn.Parameter
        return quantized and runs_only(base, nn.Linear.forward) and x.is_floating_point()

    def quantize(self, kind: str, weight: Tensor, bias: Tensor | None) -> nn.Module:
        torchao: Any = importlib.import_module("torchao.quantization")
        out_features, in_features = weight.shape
        layer = nn.Linear(in_features, out_features, bias is not None, device="meta")
        layer.weight = nn.Parameter(weight, False)
        torchao.quantize_(with_bias(layer, bias), torchao.Int8WeightOnlyConfig())
        return layer

    def transformers_config(self, kind: str, dtype: torch.dtype, in_float: Sequence[str], transposed: bool) -> Any:
        if transposed:
            return None  # transformers would load them the wrong way round
        torchao: Any = importlib.import_module("torchao.quantization")
        transformers: Any = importlib.import_module("transformers")
        return transformers.TorchAoConfig(torchao.Int8WeightOnlyConfig(), modules_to_not_convert=list(in_float))
