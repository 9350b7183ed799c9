"""The linear map with another low-rank update for each block of rows: y_i = x_i W^T + b + (x_i A_i^T) B_i^T.

The blocks are the rows of a batch whose adapters differ (Punica, arXiv:2310.18547, calls the two products shrink and expand).
A block meets the factors of its own adapter only, so nothing that is not finite passes from one adapter to another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minipeft.kernels import matmul
from minipeft.kernels.frozen_linear import Weight, held_or_made
from minipeft.kernels.functional import concatenated


def stacked(factors: Sequence[tuple[Tensor, Tensor] | None], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(down, up) of several updates, shapes (n, r, in) and (n, out, r); lower ranks are padded with zeros.

    Args:
        factors: (up, down) of each, shapes (out, r) and (r, in); None: no update. At least one is an update.
        dtype: of the result.
    """
    given = [pair for pair in factors if pair is not None]
    r = max(len(down) for _, down in given)
    none = given[0][0].new_zeros(len(given[0][0]), 0), given[0][1].new_zeros(0, given[0][1].shape[1])
    pairs = [none if pair is None else pair for pair in factors]
    downs = [F.pad(down, (0, 0, 0, r - len(down))) if len(down) < r else down for _, down in pairs]
    ups = [F.pad(up, (0, r - up.shape[1])) if up.shape[1] < r else up for up, _ in pairs]
    down, up = (concatenated([factor.to(dtype)[None] for factor in each]) for each in (downs, ups))
    return down, up


def block_linear(x: Tensor, weight: Weight, bias: Tensor | None, down: Tensor, up: Tensor) -> Tensor:
    """``x[i] @ weight.T + bias + (x[i] @ down[i].T) @ up[i].T`` for a frozen weight and bias, as one autograd node.

    Args:
        x: shape (blocks, rows, in). Under autocast it is cast once, for weight and factors together.
        weight: shape (out, in), or a function that makes it, as for `minipeft.kernels.lora_linear.lora_linear`.
        bias: shape (out,), or None.
        down: shape (blocks, r, in); cast to the dtype of x.
        up: shape (blocks, out, r); likewise.

    Returns:
        Shape (blocks, rows, out), not a view of anything.
    """
    device, dtype = x.device.type, x.dtype
    if torch.is_autocast_enabled(device):
        x = x if dtype is torch.float64 else x.to(torch.get_autocast_dtype(device))
        with torch.autocast(device, enabled=False):
            y = block_linear(x, weight, bias, down, up)
        return y if isinstance(weight, Tensor) else y.to(dtype)
    result: Tensor = _BlockLinear.apply(  # type: ignore[no-untyped-call,unused-ignore]
        x, weight, bias, down.to(x.dtype), up.to(x.dtype)
    )
    return result


def block_update(x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """The update alone, of any operations that autograd and compilers know; shapes as for `block_linear`."""
    return torch.bmm(torch.bmm(x, down.transpose(1, 2)), up.transpose(1, 2))  # ONNX has no mT


class _BlockLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Weight, bias: Tensor | None, down: Tensor, up: Tensor) -> Tensor:
        y = matmul.linear(x, held_or_made(weight, x.dtype), None if bias is None else bias.to(x.dtype))
        h = matmul.bmm(x, down.mT)
        matmul.add_bmm(y, h, up.mT)
        learns = any(ctx.needs_input_grad[3:])
        held = weight if isinstance(weight, Tensor) else None
        ctx.save_for_backward(x if learns else None, held, down, up, h if learns else None)
        ctx.make = None if held is not None else weight
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_autocast_enabled(dy.device.type):
            with torch.autocast(dy.device.type, enabled=False):
                return _BlockLinear.backward(ctx, dy)
        x, weight, down, up, h = ctx.saved_tensors
        g = matmul.bmm(dy, up)
        dx = d_down = d_up = None
        if ctx.needs_input_grad[0]:
            W = held_or_made(ctx.make or weight, dy.dtype)
            if torch.is_grad_enabled():  # the gradient of a gradient
                dx = torch.baddbmm(dy @ W, g, down)
            else:
                dx = matmul.add_bmm(matmul.linear(dy, W.t()), g, down)
        if ctx.needs_input_grad[3]:
            d_down = matmul.bmm(g.mT, x)
        if ctx.needs_input_grad[4]:
            d_up = matmul.bmm(dy.mT, matmul.bmm(x, down.mT) if torch.is_grad_enabled() else h)
        return dx, None, None, d_down, d_up
