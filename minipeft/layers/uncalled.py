"""Weights that a module reads: there is no call to follow, so the module runs with the adapted weight in its place.

The adapter still only sees `LayerOps`: it is given the identity as its input, and as the output what the weight makes
of it, the transposed weight; what it returns is the adapted weight. So every method works, and computes the very weight
that a merge would write, but for the rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from minipeft.kernels.functional import accumulation_dtype
from minipeft.layers.base import FLOAT_DTYPES, LayerOps


class ReadOps(LayerOps):
    """Ops for the parameter `reads` of a module, a plain (out, in) tensor."""

    def accepts(self, base: Any) -> bool:
        weight = getattr(base, self.reads, None)
        return type(weight) is nn.Parameter and weight.dtype in FLOAT_DTYPES and weight.ndim == 2

    def shape(self, base: Any) -> tuple[int, int]:
        out_features, in_features = getattr(base, self.reads).shape
        return out_features, in_features

    def read_weight(self, base: Any) -> Tensor:
        return getattr(base, self.reads)

    @torch.no_grad()
    def write_weight(self, base: Any, weight: Tensor, bias: Tensor | None) -> nn.Module:
        getattr(base, self.reads).copy_(weight)
        return base

    def read_bias(self, base: Any) -> Tensor | None:
        return None  # what is adapted is the weight alone

    def as_call(self, base: Any) -> tuple[Tensor, Tensor]:
        """(x, y), a call of the layer that shows its whole weight: the identity and the transposed weight."""
        weight = self.read_weight(base)
        dtype = accumulation_dtype(weight)
        return torch.eye(weight.shape[1], dtype=dtype, device=weight.device), weight.t().to(dtype)

    def from_call(self, base: Any, y: Tensor) -> Tensor:
        """The parameter whose `as_call` gives this y."""
        return y.t().to(self.read_weight(base).dtype)
