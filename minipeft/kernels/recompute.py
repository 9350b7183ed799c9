"""What a tensor was cheaply computed from, so that the backward pass can keep that instead.

A layer norm keeps its input, and the adapter behind it keeps the norm's output: two arrays instead of one. A module that
marks its output here lets the adapter keep the module's input, and recompute the output when it is needed.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from minipeft.kernels.transformed import is_transformed

_ATTRIBUTE = "_minipeft_source"


@dataclass(frozen=True)
class Source:
    """``module(input)`` gave the tensor, when it had this version."""

    module: nn.Module
    input: Tensor
    version: int
    pointwise: bool


def mark(output: Tensor, module: nn.Module, input: Tensor, *, pointwise: bool = False) -> Tensor:
    """Note on a module's output what it came from.

    Args:
        output: what the module returned.
        module: a pure function of one tensor, row by row, without trainable parameters.
        input: what it was given.
        pointwise: it is an activation, so that the gradient can also go through it a few rows at a time.
    """
    if not is_transformed() and output is not input:
        output.__dict__[_ATTRIBUTE] = Source(module, input, output._version, pointwise)
    return output


def source_of(tensor: Tensor) -> Source | None:
    """What the tensor came from, or None if that is unknown or the tensor cannot be recomputed.

    It cannot if it was written to since, or the module's parameters have been sharded again (by FSDP2).
    """
    source = getattr(tensor, _ATTRIBUTE, None)
    if not isinstance(source, Source) or source.version != tensor._version:
        return None
    whole = all(type(parameter) is nn.Parameter for parameter in source.module.parameters())
    return source if whole else None


def leads_back(tensor: Tensor, source: Source) -> bool:
    """Whether the gradient may go straight to what the tensor came from, since nothing looks at the tensor's own."""
    return source.pointwise and source.input.requires_grad and not tensor.retains_grad and not tensor._backward_hooks


def output(module: nn.Module, input: Tensor) -> Tensor:
    """The tensor recomputed; differentiable if gradients are enabled."""
    return type(module).forward(module, input)
