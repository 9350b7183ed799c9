"""The linear map by a frozen weight, which a layer either holds or makes anew for each use.

A quantized layer makes its float weight to multiply by it, and makes it again in the backward pass; it is never kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from minipeft.kernels import matmul
from minipeft.kernels.transformed import is_transformed

# A tensor (out, in), or a function that makes it in a given dtype: a new tensor without history.
Weight: TypeAlias = "Tensor | Callable[[torch.dtype], Tensor]"


def held_or_made(weight: Weight, dtype: torch.dtype) -> Tensor:
    """The weight in this dtype, shape (out, in)."""
    if not isinstance(weight, Tensor):
        return weight(dtype)
    return weight if weight.dtype is dtype else weight.to(dtype)  # asking is quicker than a cast that does nothing


def can_fuse(x: Tensor, weight: Weight, bias: Tensor | None) -> bool:
    """Whether the product may be one autograd node of ours: what `is_frozen_product` says, and nothing transforms it.

    Compiling, tracing and functorch transforms do.
    """
    return is_frozen_product(x, weight, bias) and not is_transformed()


def is_frozen_product(x: Tensor, weight: Weight, bias: Tensor | None) -> bool:
    """Whether weight and bias are frozen plain tensors that match x, which is not nested.

    If the weight is made, its maker vouches for the dtype (see `LayerOps.linear_weight`).
    """
    if isinstance(weight, Tensor):
        plain = type(weight) in (Tensor, nn.Parameter) and not weight.requires_grad
        if not plain or not (x.dtype == weight.dtype or torch.is_autocast_enabled(x.device.type)):
            return False
    return (bias is None or not bias.requires_grad) and not x.is_nested


def lean_linear(x: Tensor, weight: Weight | None, bias: Tensor | None) -> Tensor | None:
    """`frozen_linear`, or None if it cannot be used or saves nothing.

    It saves time if torch has a faster way to multiply by the weight, and memory if the weight is made and x needs a
    gradient.
    """
    if weight is None or not can_fuse(x, weight, bias):
        return None
    if isinstance(weight, Tensor):
        if torch.is_autocast_enabled(x.device.type):
            saves = x.device.type == "cpu" and not matmul.has_kernels(torch.get_autocast_dtype("cpu"))
        else:
            saves = matmul.beats_torch(x, weight)
    else:
        saves = x.requires_grad
    return frozen_linear(x, weight, bias) if saves else None


def frozen_linear(
    x: Tensor, weight: Weight, bias: Tensor | None, call: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """``x @ weight.T + bias`` for a frozen weight and bias, by the faster matrix library.

    Args:
        x: shape (..., in). Under autocast it is cast.
        weight: shape (out, in).
        bias: shape (out,), or None.
        call: computes the result instead, with its own rounding; the weight then serves the gradient only.

    Returns:
        Shape (..., out), not a view of anything. Under autocast it has autocast's dtype, or the dtype of x if the weight is
        made, as quantized layers do.
    """
    device, dtype = x.device.type, x.dtype
    if torch.is_autocast_enabled(device) and dtype is not torch.float64 and call is None:
        x = x.to(torch.get_autocast_dtype(device))
        with torch.autocast(device, enabled=False):
            y = frozen_linear(x, weight, bias)
        return y if isinstance(weight, Tensor) else y.to(dtype)
    if torch.is_grad_enabled() and x.requires_grad:
        return _FrozenLinear.apply(x, weight, bias, call)  # type: ignore[no-untyped-call,unused-ignore]
    return _forward(x, weight, bias, call)


def _forward(x: Tensor, weight: Weight, bias: Tensor | None, call: Callable[[Tensor], Tensor] | None) -> Tensor:
    if call is not None:
        return call(x)
    return matmul.linear(x, held_or_made(weight, x.dtype), None if bias is None else bias.to(x.dtype))


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Weight, bias: Tensor | None, call: Callable[[Tensor], Tensor] | None
    ) -> Tensor:
        ctx.save_for_backward(weight if isinstance(weight, Tensor) else None)
        ctx.make = None if isinstance(weight, Tensor) else weight
        return _forward(x, weight, bias, call)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_autocast_enabled(dy.device.type):
            with torch.autocast(dy.device.type, enabled=False):
                return _FrozenLinear.backward(ctx, dy)
        weight = held_or_made(ctx.make or ctx.saved_tensors[0], dy.dtype)
        return (dy @ weight if torch.is_grad_enabled() else matmul.linear(dy, weight.t())), None, None, None
