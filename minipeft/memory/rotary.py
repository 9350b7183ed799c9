"""Attention that rotates its queries and keys by `minipeft.kernels.rotary` instead of transformers' single operations."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import CellType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from minipeft.kernels.rotary import by_torch, rotary
from minipeft.kernels.transformed import is_transformed
from minipeft.memory.modules import learns
from minipeft.python.class_swap import SameFunction, plain_class

NAME = "apply_rotary_pos_emb"  # by which transformers' attention modules call it, a function of their file


class FastRotary(SameFunction):
    """An attention module whose queries and keys are rotated by one node."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        own: Any = super().forward
        if learns(self) and not is_transformed():
            return with_fast_rotary(own.__func__)(self, *args, **kwargs)
        return own(*args, **kwargs)


def is_rotary_attention(module: nn.Module) -> bool:
    """Whether the module's forward method calls a function of this name that computes what ours does."""
    cls: Any = plain_class(type(module))
    own = cls.forward
    while (inner := _held(own)) is not None:
        own = inner
    if not isinstance(own, FunctionType) or NAME not in own.__code__.co_names:
        return False
    function = own.__globals__.get(NAME)
    return isinstance(function, FunctionType) and _is_rotary(function)


def _held(function: Any) -> FunctionType | None:
    """The method that a decorator's function holds in order to call it, or None."""
    inner = getattr(function, "__wrapped__", None)
    cells = function.__closure__ or () if isinstance(function, FunctionType) else ()
    return inner if any(cell.cell_contents is inner for cell in cells) else None


@functools.cache
def _is_rotary(function: FunctionType) -> bool:
    """Whether a function of q, k, cos and sin rotates both: tried in float64."""
    if list(inspect.signature(function).parameters) != ["q", "k", "cos", "sin", "unsqueeze_dim"]:
        return False
    # On a CPU, whatever the default device is, and without torch's generators.
    q, k, cos, sin = (
        torch.linspace(-1, step, 8 * 3 * size, device="cpu", dtype=torch.float64).view(-1, *shape)
        for step, size, shape in ((2, 8, (4, 3, 8)), (3, 4, (2, 3, 8)), (5, 2, (3, 8)), (7, 2, (3, 8)))
    )
    try:
        found = function(q, k, cos, sin)
    except Exception:  # whatever it wants, it is another function
        return False
    wanted = by_torch(q, k, cos[:, None], sin[:, None], False)
    return all(a.dtype is b.dtype and torch.allclose(a, b, rtol=1e-12) for a, b in zip(found, wanted, strict=True))


@functools.cache
def with_fast_rotary(forward: FunctionType) -> FunctionType:
    """A copy of a forward method in which the name stands for our function."""
    inner, names, cells = _held(forward), forward.__globals__, forward.__closure__
    if inner is not None:
        made = CellType(with_fast_rotary(inner))
        cells = tuple(made if cell.cell_contents is inner else cell for cell in cells or ())
    else:
        names = {**names, NAME: _in_place_of(names[NAME])}
    copied = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, cells)
    copied.__kwdefaults__ = forward.__kwdefaults__
    return copied


def _in_place_of(own: Callable[..., Any]) -> Callable[..., Any]:
    def apply(q: Tensor, k: Any = None, cos: Any = None, sin: Any = None, unsqueeze_dim: int = 1) -> Any:
        if k is None:  # some rotate queries alone
            return own(q, k, cos, sin, unsqueeze_dim)
        same = q.dtype is k.dtype is cos.dtype is sin.dtype and q.shape[-1] == cos.shape[-1]
        if not same or unsqueeze_dim != 1 or cos.ndim != 3 or cos.requires_grad or sin.requires_grad:
            return own(q, k, cos, sin, unsqueeze_dim)
        return rotary(q, k, cos.unsqueeze(1), sin.unsqueeze(1))

    return apply
