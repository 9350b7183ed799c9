"""Bare parameters of any module, such as the fused experts of a mixture: what ``target_parameters`` names."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from minipeft.kernels.functional import split_columns, split_rows
from minipeft.layers.base import FLOAT_DTYPES, LayerOps
from minipeft.layers.uncalled import ReadOps
from minipeft.registry import register_layer


class Experts(nn.Module):
    """An example: two num_experts in one parameter, and a sum that tells them apart."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.randn(2, out_features, in_features) / in_features**0.5)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.experts
        return x @ first.t() + torch.tanh(x @ second.t())


@register_layer(nn.Parameter)
class ParameterOps(ReadOps):
    """A parameter of shape (out, in), or (experts, out, in), or (experts, in, out) where its module says `is_transposed`.

    The experts are num_experts of one shape with factors of their own, so of a stack W is (experts * out, in). The module is
    called while its parameter is ``W + B A``, formed in the parameter's dtype for the one call. Autograd keeps it
    until the backward pass, unless the call is checkpointed: then it is formed again.
    """

    def __init__(self, reads: str = "") -> None:
        self.reads = reads

    def of_parameter(self, name: str) -> LayerOps:
        return type(self)(name)

    def accepts(self, base: Any) -> bool:
        parameter = base._parameters.get(self.reads)
        plain = type(parameter) is nn.Parameter and parameter.dtype in FLOAT_DTYPES
        return plain and parameter.ndim in (2, 3) and parameter.numel() > 0

    def num_experts(self, base: Any) -> int:
        parameter: Tensor = getattr(base, self.reads)
        return len(parameter) if parameter.ndim == 3 else 1

    def shape(self, base: Any) -> tuple[int, int]:
        *stack, rows, columns = getattr(base, self.reads).shape
        out_features, in_features = (columns, rows) if self._is_transposed(base) else (rows, columns)
        return (stack[0] if stack else 1) * out_features, in_features

    def down_shape(self, base: Any, r: int) -> tuple[int, ...]:
        return r * self.num_experts(base), self.shape(base)[1]

    def up_shape(self, base: Any, r: int) -> tuple[int, ...]:
        num_experts = self.num_experts(base)
        return self.shape(base)[0] // num_experts, r * num_experts

    def read_weight(self, base: Any) -> Tensor:
        parameter: Tensor = getattr(base, self.reads)
        return self._turned(base, parameter).flatten(0, -2)

    @torch.no_grad()
    def write_weight(self, base: Any, weight: Tensor, bias: Tensor | None) -> nn.Module:
        parameter: Tensor = getattr(base, self.reads)
        turned = self._turned(base, parameter)
        turned.copy_(weight.reshape(turned.shape))
        return base

    def as_call(self, base: Any) -> tuple[Tensor, Tensor]:
        """An x that has no rows, since only `project_in` has to make something of it, and the parameter as it is."""
        parameter: Tensor = getattr(base, self.reads)
        return parameter.new_empty(0, self.shape(base)[1]), parameter

    def from_call(self, base: Any, y: Tensor) -> Tensor:
        return y

    def project_in(self, base: Any, x: Tensor, A: Tensor) -> Tensor:
        """Shape (num_experts, r, in)."""
        return split_rows(A, self.num_experts(base))

    def project_out(self, base: Any, h: Tensor, B: Tensor) -> Tensor:
        """Shape of the parameter."""
        up = split_columns(B, self.num_experts(base))
        if self._is_transposed(base):
            return torch.bmm(h.mT, up.mT)
        return torch.bmm(up, h).view(getattr(base, self.reads).shape)

    def example_input(self, base: Any) -> Tensor:
        weight = next(base.parameters())
        return torch.randn(4, weight.shape[-1], dtype=weight.dtype, device=weight.device)

    def example(self, in_features: int, out_features: int) -> nn.Module | None:
        return Experts(in_features, out_features)

    def example_selection(self, name: str) -> dict[str, list[str]]:
        return {"target_parameters": [f"{name}.experts"]}

    def _is_transposed(self, base: Any) -> bool:
        return getattr(base, self.reads).ndim == 3 and bool(getattr(base, "is_transposed", False))

    def _turned(self, base: Any, parameter: Tensor) -> Tensor:
        return parameter.mT if self._is_transposed(base) else parameter
