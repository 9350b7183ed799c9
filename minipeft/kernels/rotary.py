"""Rotary position embedding (arXiv:2104.09864, eq. 34) of queries and keys as one autograd node.

Composed of single operations it takes ten passes over them, and as many backward: on a GPU, a tenth of a training step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Turn = Callable[[Tensor, Tensor, Tensor, Tensor, bool], "tuple[Tensor, Tensor]"]


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """``x * cos + rotate_half(x) * sin`` of both, where the halves (a, b) of the features become (-b, a).

    Args:
        q: shape (batch, heads, tokens, features), any layout.
        k: likewise, with as many heads as it has.
        cos: shape (batch or 1, 1, tokens, features), of the same dtype; nothing is learned through it.
        sin: likewise.

    Returns:
        Both, token by token in memory, as projections make them. Each product is rounded as when it is an operation of its
        own, so values and gradients have the same bits; otherwise 32 blocks of half precision would be another model.
    """
    return _Rotary.apply(q, k, cos, sin, False)  # type: ignore[no-untyped-call,unused-ignore]


class _Rotary(torch.autograd.Function):
    """The gradient of a rotation is the rotation back, whose gradient is the rotation."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, back: bool) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.back = back
        fused = type(q) is Tensor and q.is_cuda and torch.version.hip is None and q.dtype is not torch.float64
        return ((by_triton() if fused else None) or by_torch)(q, k, cos, sin, back)

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
        return *_Rotary.apply(dq, dk, *ctx.saved_tensors, not ctx.back), None, None, None  # type: ignore[no-untyped-call,unused-ignore]


@functools.cache
def by_triton() -> Turn | None:
    """Both in one call, if Triton is here, as it is with torch for CUDA."""
    try:
        from minipeft.kernels.rotary_triton import turned
    except ImportError:
        return None
    return turned


def by_torch(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, back: bool) -> tuple[Tensor, Tensor]:
    """Each in three passes."""
    half = cos.shape[-1] // 2
    into_first, into_second = (sin[..., half:], sin[..., :half]) if back else (sin[..., :half], sin[..., half:])

    def turned(x: Tensor) -> Tensor:
        y = torch.mul(x, cos, out=token_major(x))
        y[..., :half].add_(x[..., half:] * into_first, alpha=1 if back else -1)
        y[..., half:].add_(x[..., :half] * into_second, alpha=-1 if back else 1)
        return y

    return turned(q), turned(k)


def token_major(x: Tensor) -> Tensor:
    """Memory for a tensor of this shape, (batch, heads, tokens, features), in which all heads of a token lie together."""
    batch, heads, tokens, features = x.shape
    return x.new_empty(batch, tokens, heads, features).transpose(1, 2)
