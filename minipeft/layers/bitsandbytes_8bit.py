"""bitsandbytes' ``Linear8bitLt``: int8 with one scale per output feature (LLM.int8(), arXiv:2208.07339)."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from minipeft.layers.base import runs_only
from minipeft.layers.quantized import QuantizedLinearOps, with_bias
from minipeft.registry.registry import register_layer

OUTLIER = 6.0  # input features beyond it stay in half precision; the paper's threshold, and transformers'


@register_layer("bitsandbytes.nn.Linear8bitLt")
class Linear8bitLtOps(QuantizedLinearOps):
    """W = C s / 127, row by row. In eval mode, and always on a GPU, the layer rounds its input to int8 too.

    So its call is a plain product by W only in training on a CPU, and there its own backward pass would keep the input.
    """

    kinds = ("int8",)

    def accepts(self, base: Any) -> bool:
        return base.weight.dtype is torch.int8 and _scales(base) is not None

    @torch.no_grad()
    def dequantized(self, base: Any, dtype: torch.dtype | None = None) -> Tensor:
        scales = _scales(base)
        assert scales is not None
        weight: Tensor = base.weight.data.to(dtype or torch.float32)
        return weight.mul_(scales.float().unsqueeze(1).mul(1 / 127))  # rounded as bitsandbytes rounds it

    def calls_linear(self, base: Any, x: Tensor) -> bool:
        bnb: Any = importlib.import_module("bitsandbytes.nn")
        device = x.device.type
        if not runs_only(base, bnb.Linear8bitLt.forward) or not x.is_floating_point():
            return False
        # Under autocast its output does not have the dtype of x.
        return base.training and device in ("cpu", "xpu") and not torch.is_autocast_enabled(device)

    def quantize(self, kind: str, weight: Tensor, bias: Tensor | None) -> nn.Module:
        bnb: Any = importlib.import_module("bitsandbytes.nn")
        out_features, in_features = weight.shape
        layer: nn.Module = bnb.Linear8bitLt(
            in_features, out_features, bias is not None, has_fp16_weights=False, threshold=OUTLIER, device="meta"
        )
        # It is quantized when it leaves the CPU.
        layer.weight = bnb.Int8Params(weight.cpu(), requires_grad=False).to(weight.device)
        return with_bias(layer, bias)

    def transformers_config(self, kind: str, dtype: torch.dtype, in_float: Sequence[str], transposed: bool) -> Any:
        transformers: Any = importlib.import_module("transformers")
        return transformers.BitsAndBytesConfig(
            load_in_8bit=True, llm_int8_threshold=OUTLIER, llm_int8_skip_modules=list(in_float)
        )


def _scales(base: Any) -> Tensor | None:
    """The largest absolute value of each row, shape (out,); the first call moves it from the weight to the layer's state."""
    scales: Tensor | None = getattr(base.weight, "SCB", None)
    return base.state.SCB if scales is None else scales
