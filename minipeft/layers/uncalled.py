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

    @classmethod
    def accepts(cls, base: Any) -> bool:
        weight = getattr(base, cls.reads, None)
        return type(weight) is nn.Parameter and weight.dtype in FLOAT_DTYPES and weight.ndim == 2

    @classmethod
    def shape(cls, base: Any) -> tuple[int, int]:
        out_features, in_features = getattr(base, cls.reads).shape
        return out_features, in_features

    @classmethod
    def read_weight(cls, base: Any) -> Tensor:
        weight: Tensor = getattr(base, cls.reads)
        return weight

    @classmethod
    @torch.no_grad()
    def write_weight(cls, base: Any, weight: Tensor, bias: Tensor | None) -> nn.Module:
        getattr(base, cls.reads).copy_(weight)
        module: nn.Module = base
        return module

    @staticmethod
    def read_bias(base: Any) -> Tensor | None:
        return None  # what is adapted is the weight alone

    @classmethod
    def as_call(cls, base: Any) -> tuple[Tensor, Tensor]:
        """(x, y), a call of the layer that shows its whole weight: the identity and the transposed weight."""
        weight = cls.read_weight(base)
        dtype = accumulation_dtype(weight)
        return torch.eye(weight.shape[1], dtype=dtype, device=weight.device), weight.t().to(dtype)

    @classmethod
    def from_call(cls, base: Any, y: Tensor) -> Tensor:
        """The parameter whose `as_call` gives this y."""
        return y.t().to(cls.read_weight(base).dtype)
