"""Bare parameters of any module, such as the fused experts of a mixture: what ``target_parameters`` names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from minipeft.kernels.functional import concatenated, split_columns, split_rows
from minipeft.kernels.low_rank_sum import LowRankSum
from minipeft.layers.base import is_plain, store
from minipeft.layers.uncalled import UncalledOps
from minipeft.registry.registry import register_layer


@register_layer(nn.Parameter)
class ParameterOps(UncalledOps):
    """A parameter of shape (out, in), (experts, out, in), or (experts, in, out) if its module says `is_transposed`.

    Each expert has its own factors, and the canonical weight of a stack is (experts * out, in). The module is called
    while its parameter is ``W + B A``. LoRA never forms it where the module multiplies by it (see `low_rank_sum`). What
    else the module does with it, and other methods, form it in the parameter's dtype for that one call. Autograd keeps
    it until the backward pass, unless the call is checkpointed: then it is formed again.
    """

    def __init__(self, parameter: str = "") -> None:  # registered without a name; injection gives the parameter's
        super().__init__(parameter)

    def accepts(self, base: Any) -> bool:
        parameter = base._parameters.get(self.parameter)
        return is_plain(parameter) and parameter.ndim in (2, 3) and parameter.numel() > 0

    def shape(self, base: Any) -> tuple[int, int]:
        *stack, rows, columns = getattr(base, self.parameter).shape
        out_features, in_features = (columns, rows) if self._is_transposed(base) else (rows, columns)
        return (stack[0] if stack else 1) * out_features, in_features

    def read_weight(self, base: Any) -> Tensor:
        return self._turned(base).flatten(0, -2)

    def write_weight(self, base: Any, weight: Tensor, bias: Tensor | None) -> nn.Module:
        turned = self._turned(base)
        store(turned, weight.reshape(turned.shape))
        return base

    def factor_shapes(self, base: Any, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        experts, (out_features, in_features) = self._num_experts(base), self.shape(base)
        return (r * experts, in_features), (out_features // experts, r * experts)

    def as_call(self, base: Any) -> tuple[Tensor, Tensor]:
        """An x without rows, since only `project_in` uses it, and the parameter as it is."""
        parameter: Tensor = getattr(base, self.parameter)
        return parameter.new_empty(0, self.shape(base)[1]), parameter

    def from_call(self, base: Any, y: Tensor) -> Tensor:
        return y

    def project_in(self, base: Any, x: Tensor, A: Tensor) -> Tensor:
        """Shape (experts, r, in)."""
        return split_rows(A, self._num_experts(base))

    def project_out(self, base: Any, h: Tensor, B: Tensor) -> Tensor:
        """The shape of the parameter."""
        up = split_columns(B, self._num_experts(base))
        if self._is_transposed(base):
            return torch.bmm(h.mT, up.mT)
        return torch.bmm(up, h).view(getattr(base, self.parameter).shape)

    def low_rank_sum(self, base: Any, factors: Sequence[tuple[Tensor, Tensor, float]]) -> LowRankSum | None:
        own, count = getattr(base, self.parameter), self._num_experts(base)
        if type(own) is not nn.Parameter or own.requires_grad:
            return None
        downs = [split_rows(A, count) for A, _, _ in factors]
        ups = [split_columns(B, count) for _, B, _ in factors]
        scaling = factors[0][2]
        if len(factors) > 1:  # one pair of the ranks of all
            scaling, scaled = 1.0, [up * s for up, (_, _, s) in zip(ups, factors, strict=True)]
            downs, ups = [concatenated(downs, 1)], [concatenated(scaled, 2)]
        (down,), (up,) = downs, ups
        if own.ndim == 2:
            down, up = down[0], up[0]
        left, right = (down.mT, up.mT) if self._is_transposed(base) else (up, down)
        return LowRankSum(own, left, right, scaling)

    def example_input(self, base: Any) -> Tensor:
        weight = next(base.parameters())
        return torch.randn(4, weight.shape[-1], dtype=weight.dtype, device=weight.device)

    def _num_experts(self, base: Any) -> int:
        parameter: Tensor = getattr(base, self.parameter)
        return len(parameter) if parameter.ndim == 3 else 1

    def _is_transposed(self, base: Any) -> bool:
        return getattr(base, self.parameter).ndim == 3 and bool(getattr(base, "is_transposed", False))

    def _turned(self, base: Any) -> Tensor:
        parameter: Tensor = getattr(base, self.parameter)
        return parameter.mT if self._is_transposed(base) else parameter
