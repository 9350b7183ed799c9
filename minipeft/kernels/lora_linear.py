"""The low-rank linear map as one autograd node: y = x W^T + b + s (drop(x) A^T) B^T, eq. (3) of arXiv:2106.09685.

Composed of single operations, an adapted layer makes four arrays as large as its output, and reads and writes them again
and again. Here the output is allocated once, and the matrix product itself accumulates the low-rank product into it; the
same goes for the gradient of x. The backward pass keeps x, as its producer stored it (or what x is cheaply computed from,
see `minipeft.kernels.recompute`), and h = drop(x) A^T of shape (rows, r); never a mask.

With enough rows W + s B A is made instead, used, and dropped (see `minipeft.kernels.merged_weight`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minipeft.kernels import lora_gradients, matmul, merged_weight, recompute
from minipeft.kernels.dropout_mask import DropoutMask, project_down
from minipeft.kernels.frozen_linear import Weight, held_or_made

FEW_ROWS = 64  # up to which a call takes as long as its number of operations, and not as their size


def lora_linear(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout: float = 0.0,
) -> Tensor:
    """``x @ weight.T + bias + scaling * (drop(x) @ lora_A.T) @ lora_B.T`` for a frozen weight and bias.

    Args:
        x: shape (..., in_features), any layout. Under autocast it is cast once, for weight and factors together.
        weight: shape (out_features, in_features), any layout, such as the transposed view of a Conv1D's; or a function
            that makes it, which is called in the forward and again in the backward pass.
        bias: shape (out_features,), or None.
        lora_A: shape (r, in_features); cast to the dtype of x.
        lora_B: shape (out_features, r); likewise.
        scaling: dimensionless.
        dropout: probability of dropping a feature of x on its way into A. The mask's seed comes from torch's CPU generator,
            so gradient checkpointing replays it.

    Returns:
        Shape (..., out_features), not a view of anything. Its gradient is exact, and so is the gradient of that.
        Under autocast it has autocast's dtype, or the dtype of x if the weight is made, as quantized layers do.
    """
    device, dtype = x.device.type, x.dtype
    if torch.is_autocast_enabled(device):
        x = x if dtype is torch.float64 else x.to(torch.get_autocast_dtype(device))
        with torch.autocast(device, enabled=False):
            y = lora_linear(x, weight, bias, lora_A, lora_B, scaling, dropout)
        return y if isinstance(weight, Tensor) else y.to(dtype)
    learns = torch.is_grad_enabled() and (x.requires_grad or lora_A.requires_grad or lora_B.requires_grad)
    size, features = x.numel(), x.shape[-1]
    if dropout == 0 and (size == features if learns else size <= FEW_ROWS * features) and isinstance(weight, Tensor):
        rows = x.reshape(-1, features)
        if not merged_weight.pays(rows, weight):
            return _few_rows(x, rows, weight, bias, lora_A.to(x.dtype), lora_B.to(x.dtype), scaling, learns)
    mask = DropoutMask(dropout) if dropout > 0 else None
    if not learns:  # use torch's own kernel, so that a zero adapter reproduces the base bit for bit
        A, B = held_or_made(lora_A, x.dtype), held_or_made(lora_B, x.dtype)
        return _shaped(_product(x.reshape(-1, features), weight, bias, A, B, scaling, mask, matmul.torch_linear)[0], x)
    # Only the gradient of A needs x again: with a frozen A only h is kept (LoRA-FA, arXiv:2308.03303).
    source = recompute.source_of(x) if lora_A.requires_grad else None
    kept: tuple[Tensor, ...] = (x,) if lora_A.requires_grad else ()
    again, goes_through = None, False
    if source is not None:
        kept, again, goes_through = source.inputs, source.again, recompute.leads_back(x, source)
        again.users += 1
    given = x.detach() if goes_through else x
    return _LoraLinear.apply(  # type: ignore[no-untyped-call,unused-ignore]
        given, weight, bias, lora_A, lora_B, scaling, mask, again, goes_through, *kept
    )


def _few_rows(
    x: Tensor,
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    learns: bool,
) -> Tensor:
    """With few rows, as in decoding, each call to torch counts; and a node of our own for one row would save nothing."""
    if weight.dtype is not x.dtype:
        weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    y = F.linear(x, weight, bias)
    h = matmul.torch_narrow(rows, lora_A.t())  # as `project_down` has it: training and evaluation give the same bits
    flat = y.view(-1, y.shape[-1])
    if learns:
        return torch.addmm(flat, h, lora_B.t(), alpha=scaling).view(y.shape)
    flat.addmm_(h, lora_B.t(), alpha=scaling)
    return y


def _shaped(y: Tensor, x: Tensor) -> Tensor:
    """Rows of the output in the shape that x asks for; by `.data`, since autograd would forbid writing later into a view."""
    return y.view(*x.shape[:-1], y.shape[-1]).data


def _product(
    rows: Tensor,
    weight: Weight,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    mask: DropoutMask | None,
    linear: Callable[..., Tensor],
) -> tuple[Tensor, Tensor | None]:
    """The output of some rows, and h of shape (rows, r), or None if the backward pass had better make it."""
    W, bias = held_or_made(weight, rows.dtype), None if bias is None else held_or_made(bias, rows.dtype)
    if mask is None and merged_weight.pays(rows, W):
        return linear(rows, merged_weight.merged(W, lora_A, lora_B, scaling, in_place=W is not weight), bias), None
    if mask is None and matmul.torch_suffices(rows, max(lora_B.shape)):  # for each of the three products
        h = F.linear(rows, lora_A)
        return F.linear(rows, W, bias).addmm_(h, lora_B.t(), alpha=scaling), h
    y, h = linear(rows, W, bias), project_down(rows, lora_A, mask)
    return matmul.add_product(y, h, lora_B.t(), scaling), h


class _LoraLinear(torch.autograd.Function):
    """The map is applied to `x`; with `goes_through` the gradient skips x, and goes to the inputs of what made x.

    `kept` is x, or the inputs that `again` makes x from; nothing with a frozen A.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Weight,
        bias: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
        mask: DropoutMask | None,
        again: recompute.Again | None,
        goes_through: bool,
        *kept: Tensor,
    ) -> Tensor:
        A, B = held_or_made(lora_A, x.dtype), held_or_made(lora_B, x.dtype)  # in here, so autograd has no nodes for it
        rows = x.reshape(-1, x.shape[-1])
        y, h = _product(rows, weight, bias, A, B, scaling, mask, matmul.linear)
        if not kept and h is None:
            h = project_down(rows, A, mask)
        held = isinstance(weight, Tensor)
        ctx.save_for_backward(weight if held else None, lora_A, lora_B, A, B, h, *kept)
        ctx.make = None if held else weight
        ctx.scaling, ctx.mask, ctx.again, ctx.goes_through = scaling, mask, again, goes_through
        ctx.dtypes = lora_A.dtype, lora_B.dtype
        return _shaped(y, x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_autocast_enabled(dy.device.type):
            with torch.autocast(dy.device.type, enabled=False):
                return _LoraLinear.backward(ctx, dy)
        weight, lora_A, lora_B, A, B, h, *kept = ctx.saved_tensors
        if torch.is_grad_enabled():
            A, B = lora_A.to(dy.dtype), lora_B.to(dy.dtype)  # with a history
        into, dA, dB = lora_gradients.gradients(dy, tuple(kept), ctx.make or weight, A, B, h, ctx)
        through = into if ctx.goes_through else (None,) * len(kept)
        return None if ctx.goes_through else into[0], None, None, dA, dB, *[None] * 4, *through
