"""bitsandbytes' ``Linear8bitLt``: int8 with a scale for each output feature (LLM.int8(), arXiv:2208.07339)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from minipeft.layers.quantised import QuantizedLinearOps
from minipeft.registry import register_layer


@register_layer("bitsandbytes.nn.Linear8bitLt")
class Linear8bitLtOps(QuantizedLinearOps):
    """W = C s / 127 row by row. In eval mode, and on a GPU, the layer rounds its input to int8 as well."""

    @staticmethod
    def accepts(base: Any) -> bool:
        return base.weight.dtype is torch.int8 and _scales(base) is not None

    @staticmethod
    @torch.no_grad()
    def dequantized(base: Any) -> Tensor:
        scales = _scales(base)
        assert scales is not None
        weight: Tensor = base.weight.data.float()
        return weight.mul_(scales.float().unsqueeze(1) / 127)


def _scales(base: Any) -> Tensor | None:
    """Largest absolute value of each row, shape (out,); the first call moves it from the weight to the layer's state."""
    scales: Tensor | None = getattr(base.weight, "SCB", None)
    return base.state.SCB if scales is None else scales
