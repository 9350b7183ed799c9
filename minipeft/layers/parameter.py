"""Bare parameters of any module, such as the fused experts of a mixture: what ``target_parameters`` names."""

from __future__ import annotations

import copyreg
import functools
from abc import ABCMeta
from typing import Any

import torch
from torch import Tensor, nn

from minipeft.kernels.functional import split_columns, split_rows
from minipeft.layers.base import FLOAT_DTYPES, LayerOps
from minipeft.layers.uncalled import ReadOps
from minipeft.registry import register_layer


class _OneParameter(ABCMeta):
    """The class of the ops for one parameter name: they are made at run time, and pickled by that name."""


class Experts(nn.Module):
    """An example: two maps in one parameter, and a sum that tells them apart."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.randn(2, out_features, in_features) / in_features**0.5)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.experts
        y: Tensor = x @ first.t() + torch.tanh(x @ second.t())
        return y


@register_layer(nn.Parameter)
class ParameterOps(ReadOps, metaclass=_OneParameter):
    """A parameter of shape (out, in), or (experts, out, in), or (experts, in, out) where its module says `is_transposed`.

    The experts are maps of one shape with factors of their own, so of a stack W is (experts * out, in). The module is
    called while its parameter is ``W + B A``, formed in the parameter's dtype for the one call. Autograd keeps it
    until the backward pass, unless the call is checkpointed: then it is formed again.
    """

    @classmethod
    def of_parameter(cls, name: str) -> type[LayerOps]:
        ops: type[LayerOps] = _ops_of(name)
        return ops

    @classmethod
    def accepts(cls, base: Any) -> bool:
        parameter = base._parameters.get(cls.reads)
        plain = type(parameter) is nn.Parameter and parameter.dtype in FLOAT_DTYPES
        return plain and parameter.ndim in (2, 3) and parameter.numel() > 0

    @classmethod
    def maps(cls, base: Any) -> int:
        parameter: Tensor = getattr(base, cls.reads)
        return len(parameter) if parameter.ndim == 3 else 1

    @classmethod
    def shape(cls, base: Any) -> tuple[int, int]:
        *stack, rows, columns = getattr(base, cls.reads).shape
        out_features, in_features = (columns, rows) if cls._is_transposed(base) else (rows, columns)
        return (stack[0] if stack else 1) * out_features, in_features

    @classmethod
    def down_shape(cls, base: Any, r: int) -> tuple[int, ...]:
        return r * cls.maps(base), cls.shape(base)[1]

    @classmethod
    def up_shape(cls, base: Any, r: int) -> tuple[int, ...]:
        maps = cls.maps(base)
        return cls.shape(base)[0] // maps, r * maps

    @classmethod
    def read_weight(cls, base: Any) -> Tensor:
        parameter: Tensor = getattr(base, cls.reads)
        return cls._turned(base, parameter).flatten(0, -2)

    @classmethod
    @torch.no_grad()
    def write_weight(cls, base: Any, weight: Tensor, bias: Tensor | None) -> nn.Module:
        parameter: Tensor = getattr(base, cls.reads)
        turned = cls._turned(base, parameter)
        turned.copy_(weight.reshape(turned.shape))
        module: nn.Module = base
        return module

    @classmethod
    def as_call(cls, base: Any) -> tuple[Tensor, Tensor]:
        """An x that has no rows, since only `project_in` has to make something of it, and the parameter as it is."""
        parameter: Tensor = getattr(base, cls.reads)
        return parameter.new_empty(0, cls.shape(base)[1]), parameter

    @classmethod
    def from_call(cls, base: Any, y: Tensor) -> Tensor:
        return y

    @classmethod
    def project_in(cls, base: Any, x: Tensor, A: Tensor) -> Tensor:
        """Shape (maps, r, in)."""
        return split_rows(A, cls.maps(base))

    @classmethod
    def project_out(cls, base: Any, h: Tensor, B: Tensor) -> Tensor:
        """Shape of the parameter."""
        up = split_columns(B, cls.maps(base))
        if cls._is_transposed(base):
            return torch.bmm(h.mT, up.mT)
        return torch.bmm(up, h).view(getattr(base, cls.reads).shape)

    @classmethod
    def example_input(cls, base: Any) -> Tensor:
        weight = next(base.parameters())
        return torch.randn(4, weight.shape[-1], dtype=weight.dtype, device=weight.device)

    @classmethod
    def example(cls, in_features: int, out_features: int) -> nn.Module | None:
        return Experts(in_features, out_features)

    @classmethod
    def example_selection(cls, name: str) -> dict[str, list[str]]:
        return {"target_parameters": [f"{name}.experts"]}

    @classmethod
    def _is_transposed(cls, base: Any) -> bool:
        return getattr(base, cls.reads).ndim == 3 and bool(getattr(base, "is_transposed", False))

    @classmethod
    def _turned(cls, base: Any, parameter: Tensor) -> Tensor:
        return parameter.mT if cls._is_transposed(base) else parameter


@functools.cache
def _ops_of(name: str) -> Any:
    return _OneParameter("ParameterOps", (ParameterOps,), {"reads": name, "__doc__": ParameterOps.__doc__})


def _reduced(ops: Any) -> Any:
    return (_ops_of, (ops.reads,)) if ops.reads else ops.__qualname__


copyreg.pickle(_OneParameter, _reduced)
