"""What a tensor was cheaply computed from, so that the backward pass may keep that instead, which is often kept anyway.

A layer norm keeps its input, and an adapter keeps its own, the norm's output: two arrays where one would do. A module
that marks its output here lets the adapter keep the module's input, and compute the output again when it is needed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

_ATTRIBUTE = "_minipeft_source"


@dataclass(frozen=True)
class Source:
    """``module(input)`` gave the tensor, when that was at this version."""

    module: nn.Module
    input: Tensor
    version: int
    pointwise: bool


def mark(output: Tensor, module: nn.Module, input: Tensor, *, pointwise: bool = False) -> Tensor:
    """Note on a module's output what it came from; the module must be a pure function of one tensor, row by row.

    Args:
        output: what the module gave.
        module: has no parameters that train.
        input: what it was given.
        pointwise: it is an activation, so that the gradient may go through it a few rows at a time, too.
    """
    if not torch.compiler.is_compiling() and output is not input:
        output.__dict__[_ATTRIBUTE] = Source(module, input, output._version, pointwise)
    return output


def source_of(tensor: Tensor) -> Source | None:
    """What the tensor came from, or None where that is not known, or cannot be computed again.

    That is where the tensor has been written since, or the module's parameters have been sharded again (by FSDP2).
    """
    source = getattr(tensor, _ATTRIBUTE, None)
    if not isinstance(source, Source) or source.version != tensor._version:
        return None
    whole = all(type(parameter) is nn.Parameter for parameter in source.module.parameters())
    return source if whole else None


def leads_back(tensor: Tensor, source: Source) -> bool:
    """Whether the gradient of the tensor may go straight to what it came from, since nobody wants to see it on its way."""
    return source.pointwise and source.input.requires_grad and not tensor.retains_grad and not tensor._backward_hooks


def output(module: nn.Module, input: Tensor) -> Tensor:
    """The tensor again; differentiable where gradients are on."""
    return type(module).forward(module, input)
