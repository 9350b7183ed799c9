"""The low-rank linear map as one autograd node: y = x W^T + b + s (x A^T) B^T, eq. (3) of arXiv:2106.09685.

Composed from single operations, the adapted layer makes four arrays of the size of its output, and reads and writes
them over and over. Here the output is allocated once, and the low-rank product is accumulated into it by the matrix
product itself, as is the gradient of x. Kept for the backward pass are x, in the storage its producer made, and
h = x A^T of shape (rows, r).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float
) -> Tensor:
    """``x @ weight.T + bias + scaling * (x @ lora_A.T) @ lora_B.T`` for a frozen weight and bias.

    Args:
        x: shape (..., in_features), any layout.
        weight: shape (out_features, in_features), any layout, such as the transposed view of a Conv1D's.
        bias: shape (out_features,), or None.
        lora_A: shape (r, in_features), of the dtype of x.
        lora_B: shape (out_features, r), of the dtype of x.
        scaling: dimensionless.

    Returns:
        Shape (..., out_features), no view of anything. Where a gradient is wanted it is exact, also that of the gradient.
    """
    if torch.is_grad_enabled() and (x.requires_grad or lora_A.requires_grad or lora_B.requires_grad):
        result: Tensor = _LoraLinear.apply(x, weight, bias, lora_A, lora_B, scaling)  # type: ignore[no-untyped-call]
        return result
    return _product(x, weight, bias, lora_A, lora_B, scaling)[0]


def can_fuse(*tensors: Tensor) -> bool:
    """Whether these may go through `lora_linear` now: one dtype, no autocast, no tracing, no functorch transform."""
    return (
        all(tensor.dtype == tensors[0].dtype for tensor in tensors)
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled(tensors[0].device.type)
        and not torch._C._are_functorch_transforms_active()
    )


def _product(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    rows = x.reshape(-1, x.shape[-1])
    # Made in its final shape: a view of a flat result could not be written in place by the code that comes after.
    y = x.new_empty(*x.shape[:-1], weight.shape[0])
    flat = y.view(-1, weight.shape[0])
    if bias is None:
        torch.mm(rows, weight.t(), out=flat)
    else:
        torch.addmm(bias, rows, weight.t(), out=flat)
    h = torch.mm(rows, lora_A.t())
    flat.addmm_(h, lora_B.t(), alpha=scaling)
    return y, h


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float
    ) -> Tensor:
        y, h = _product(x, weight, bias, lora_A, lora_B, scaling)
        ctx.save_for_backward(x, weight, lora_A, lora_B, h)
        ctx.scaling = scaling
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, lora_A, lora_B, h = ctx.saved_tensors
        wants_x, _, _, wants_A, wants_B, _ = ctx.needs_input_grad
        rows, dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
        s = ctx.scaling
        if torch.is_grad_enabled():  # a gradient of this gradient is wanted, and the h that was kept has no history
            h, g = rows @ lora_A.t(), dy @ lora_B
            dx = (dy @ weight + s * (g @ lora_A)).view(x.shape)
            return dx, None, None, s * (g.t() @ rows), s * (dy.t() @ h), None
        dx = dA = dB = None
        if wants_B:
            dB = torch.mm(dy.t(), h).mul_(s)
        if wants_x or wants_A:
            g = torch.mm(dy, lora_B)
            if wants_A:
                dA = torch.mm(g.t(), rows).mul_(s)
            if wants_x:
                dx = torch.mm(dy, weight).addmm_(g, lora_A, alpha=s).view(x.shape)
        return dx, None, None, dA, dB, None
