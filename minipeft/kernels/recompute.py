"""What a tensor was cheaply computed from, so that the backward pass can keep that instead.

A layer norm keeps its input, and the adapter behind it keeps the norm's output: two arrays instead of one. A module that
marks its output here lets the adapter keep the module's input, and recompute the output when it is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from minipeft.kernels.transformed import is_transformed

_ATTRIBUTE = "_minipeft_source"
# What a function gives, and what turns the gradient of that into those of the inputs.
WithBack: TypeAlias = "tuple[Tensor, Callable[[Tensor], Sequence[Tensor]]]"


class Function(Protocol):
    """A module, or what computes by the modules in its attributes: making a module takes as long as several products."""

    @property
    def forward(self) -> Any:
        """The function."""


class Again:
    """A module's output, computed again in the backward pass: once for all layers that were given it, as q, k and v are."""

    def __init__(self, module: Function) -> None:
        self.module = module
        self.users = 0  # how many layers are going to ask for the output
        self._left = 0  # how many of them have not done so yet in this backward pass
        self._output: Tensor | None = None

    def output(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """The output, without a history."""
        if self._output is None:
            with torch.no_grad():
                self._output, self._left = output(self.module, *inputs), self.users
        found, self._left = self._output, self._left - 1
        if self._left <= 0:
            self._output = None
        return found

    @cached_property  # asked by each of the layers, and nothing changes between them
    def is_whole(self) -> bool:
        """Whether the module's parameters are plain.

        FSDP2 may have sharded them again since the module was called. The first FSDP has other tensors in their places, and
        in the backward pass as attributes.
        """
        parts = [self.module] if isinstance(self.module, nn.Module) else vars(self.module).values()
        modules = [module for part in parts for module in part.modules()]
        held = [value for module in modules for value in (*module._parameters.values(), *vars(module).values())]
        return all(type(value) is nn.Parameter for value in held if isinstance(value, Tensor))


class Source(NamedTuple):
    """``module(*inputs)`` gave the tensor, when it had this version."""

    module: Function
    inputs: tuple[Tensor, ...]
    version: int
    pointwise: bool
    again: Again


def mark(output: Tensor, module: Function, *inputs: Tensor, pointwise: bool = False) -> Tensor:
    """Note on a module's output what it came from.

    Args:
        output: what the module returned.
        module: a pure function, row by row, without trainable parameters.
        inputs: what it was given, tensors of one shape.
        pointwise: it works element by element, so that the gradient can also go through it a few rows at a time.
    """
    if not any(output is input for input in inputs) and not is_transformed():
        output.__dict__[_ATTRIBUTE] = Source(module, inputs, output._version, pointwise, Again(module))
    return output


def forget(tensor: Tensor) -> None:
    """Take the mark off a tensor, so that what is given it keeps the tensor itself."""
    if not is_transformed():  # and then nothing was marked
        tensor.__dict__.pop(_ATTRIBUTE, None)


def source_of(tensor: Tensor) -> Source | None:
    """What the tensor came from, or None if that is unknown or the tensor cannot be recomputed.

    It cannot if it was written to since, or the module's parameters have been sharded again.
    """
    source = getattr(tensor, _ATTRIBUTE, None)
    if not isinstance(source, Source) or source.version != tensor._version or not source.again.is_whole:
        return None
    return source


def leads_back(tensor: Tensor, source: Source) -> bool:
    """Whether the gradient may go straight to what the tensor came from, since nothing looks at the tensor's own."""
    free = not tensor.retains_grad and not tensor._backward_hooks
    return source.pointwise and free and all(input.requires_grad for input in source.inputs)


def output(module: Function, *inputs: Tensor) -> Tensor:
    """The tensor recomputed; differentiable if gradients are enabled."""
    forward: Any = type(module).forward
    y: Tensor = forward(module, *inputs)
    return y


def with_back(function: Any, *inputs: Tensor) -> WithBack:
    """``function(*inputs)`` without a history, and the way back, outside autograd.

    A function that knows a formula for its gradient says so by a method of this name; the others are asked of autograd.
    """
    own: Callable[..., WithBack] | None = getattr(function, "with_back", None)
    if own is not None:
        return own(*inputs)
    entries = [tensor.detach().requires_grad_() for tensor in inputs]
    with torch.enable_grad():
        y: Tensor = output(function, *entries) if isinstance(function, nn.Module) else function(*entries)
    return y.detach(), lambda dy: torch.autograd.grad(y, entries, dy)
