"""Frozen weights, as a layer holds them or as it makes them anew for each use, and the linear map by one of them.

A quantized layer's float weight is made when it is multiplied by, and again in the backward pass; it is never kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from minipeft.kernels import matmul

# A tensor (out, in), or what makes it in the dtype it is given: without history, and nobody else's to read or write.
Weight: TypeAlias = "Tensor | Callable[[torch.dtype], Tensor]"


def held_or_made(weight: Weight, dtype: torch.dtype) -> Tensor:
    """The weight in this dtype, shape (out, in)."""
    return weight.to(dtype) if isinstance(weight, Tensor) else weight(dtype)


def can_fuse(x: Tensor, weight: Weight, bias: Tensor | None) -> bool:
    """Whether these may go through one autograd node now: plain frozen tensors that match, no nested x, no tracing, no functorch transform.

    That a weight which is made goes with x, its maker has to know (see `LayerOps.weight_of_call`).
    """
    if isinstance(weight, Tensor):
        plain = type(weight) in (Tensor, nn.Parameter) and not weight.requires_grad
        if not plain or not (x.dtype == weight.dtype or torch.is_autocast_enabled(x.device.type)):
            return False
    return (
        (bias is None or not bias.requires_grad)
        and not x.is_nested
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
    )


def frozen_linear(
    x: Tensor, weight: Weight, bias: Tensor | None, call: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """``x @ weight.T + bias`` for a frozen weight and bias, by the faster matrix library; shapes as for `lora_linear`.

    Under autocast x is cast, and the result has the dtype that x had. Where `call` is given, it computes the result,
    with what it has of its own rounding, and `weight` is for the gradient alone.
    """
    device, dtype = x.device.type, x.dtype
    if torch.is_autocast_enabled(device) and dtype is not torch.float64 and call is None:
        x = x.to(torch.get_autocast_dtype(device))
        with torch.autocast(device, enabled=False):
            return frozen_linear(x, weight, bias).to(dtype)
    if torch.is_grad_enabled() and x.requires_grad:
        return _FrozenLinear.apply(x, weight, bias, call)  # type: ignore[no-untyped-call]
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
