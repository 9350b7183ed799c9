"""Weights that a module reads without calling a layer; the module runs with the adapted weight in their place.

The adapter still sees `LayerOps` only. Its input is the identity and the output it is given is the transposed weight, so
what it returns is the transposed adapted weight. That way every method works, and computes the weight that a merge would
write, up to rounding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from minipeft.kernels.functional import accumulation_dtype
from minipeft.kernels.low_rank_sum import LowRankSum
from minipeft.layers.base import LayerOps, is_plain, store
from minipeft.registry import registry


class UncalledOps(LayerOps):
    """Ops for one parameter of a module, a plain (out, in) tensor."""

    children: ClassVar[Mapping[str, UncalledOps]] = {}  # child modules that are read and adapted with it, by name

    def __init__(self, parameter: str, update_count: int = 1) -> None:
        self.parameter, self.update_count = parameter, update_count

    def accepts(self, base: Any) -> bool:
        weight = getattr(base, self.parameter, None)
        return is_plain(weight) and weight.ndim == 2

    def shape(self, base: Any) -> tuple[int, int]:
        out_features, in_features = getattr(base, self.parameter).shape
        return out_features, in_features

    def read_weight(self, base: Any) -> Tensor:
        return getattr(base, self.parameter)

    def write_weight(self, base: Any, weight: Tensor, bias: Tensor | None) -> nn.Module:
        store(getattr(base, self.parameter), weight)
        return base

    def read_bias(self, base: Any) -> Tensor | None:
        return None  # only the weight is adapted

    def as_call(self, base: Any) -> tuple[Tensor, Tensor]:
        """(x, y) of a call that shows the whole weight: the identity (in, in) and the transposed weight (in, out)."""
        weight = self.read_weight(base)
        dtype = accumulation_dtype(weight)
        return torch.eye(weight.shape[1], dtype=dtype, device=weight.device), weight.t().to(dtype)

    def from_call(self, base: Any, y: Tensor) -> Tensor:
        """The parameter for which `as_call` gives this y."""
        return y.t().to(self.read_weight(base).dtype)

    def low_rank_sum(self, base: Any, factors: Sequence[tuple[Tensor, Tensor, float]]) -> LowRankSum | None:
        """The parameter plus the updates ``scaling * B A`` of these (A, B, scaling), not computed; None if it must be."""
        return None


def parameter_ops(base: nn.Module, parameter: str) -> UncalledOps | None:
    """The ops for a parameter of a module by itself; None if it is not a plain floating-point one of 2 or 3 dimensions."""
    kinds = registry.layer_candidates(type(base._parameters[parameter]))
    named = (type(ops)(parameter) for _, ops in kinds if isinstance(ops, UncalledOps))
    return next((ops for ops in named if ops.accepts(base)), None)


def matrices(base: nn.Module) -> list[str]:
    """The parameters of a module that a user may want to name in ``target_parameters``; the biases of a stack look like one."""
    if isinstance(base, torch.jit.ScriptModule):
        return []  # its parameters are not Python's to replace
    return [name for name in base._parameters if not name.endswith("bias") and parameter_ops(base, name) is not None]
