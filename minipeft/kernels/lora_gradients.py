"""The gradients of `minipeft.kernels.lora_linear`.

`ctx` is the context of its autograd node: `scaling`, `mask`, `again` (which makes x from what was kept, or None),
`goes_through` (whether the gradient goes through what made x, too) and `dtypes` (those of A and B, and of their gradients).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from minipeft.errors import StateError
from minipeft.kernels import matmul, merged_weight, recompute
from minipeft.kernels.dropout_mask import project_down
from minipeft.kernels.frozen_linear import Weight, held_or_made

Kept = tuple[Tensor, ...]
Gradients = tuple[tuple[Tensor | None, ...], Tensor | None, Tensor | None]  # of x or what it was made from, A and B
KEPT = 9  # where `kept` begins among the node's inputs
# Rows whose gradient goes through an activation at once; multiples of `dropout_mask.ROWS`.
SLICE = {"cpu": 512, "cuda": 8192}


def gradients(
    dy: Tensor, kept: Kept, weight: Weight, lora_A: Tensor, lora_B: Tensor, h: Tensor | None, ctx: Any
) -> Gradients:
    """The gradients that are needed, in the shapes of what they are for.

    Args:
        dy: gradient of the output, shape (..., out).
        kept: the input, or what it is made from, each of shape (..., in); nothing with a frozen A.
        weight: shape (out, in), or a function that makes it.
        lora_A: shape (r, in), in the dtype of x.
        lora_B: shape (out, r), likewise.
        h: ``drop(x) A^T``, shape (rows, r), if it was kept.
        ctx: see above.

    Returns:
        The gradient of the input alone, or of each of `kept` if it goes through what made x; and those of A and B.

    Raises:
        StateError: a gradient of a gradient needs an input that was not kept.
    """
    if torch.is_grad_enabled():
        return _second_order(dy, kept, weight, lora_A, lora_B, ctx)
    shape = (*dy.shape[:-1], lora_A.shape[1])
    dy = dy.reshape(-1, dy.shape[-1])
    first = _FirstOrder(dy, weight, lora_A, lora_B, ctx)
    if ctx.goes_through:
        return _in_slices(first, dy, kept, h)
    x = None if not kept else kept[0] if ctx.again is None else ctx.again.output(kept)
    dx, dA, dB = first.of(dy, None if x is None else x.reshape(-1, x.shape[-1]), h)
    return (None if dx is None else dx.view(shape),), dA, dB


class _FirstOrder:
    """The gradients of some rows at a time, with what is the same for all rows.

    Attributes:
        W: what dy is multiplied by to give dx; None if that is not needed.
        merged: whether it is W + s B A instead of W.
    """

    def __init__(self, dy: Tensor, weight: Weight, lora_A: Tensor, lora_B: Tensor, ctx: Any) -> None:
        self.lora_A, self.lora_B, self.ctx = lora_A, lora_B, ctx
        wants_x, _, _, self.wants_A, self.wants_B, *_ = ctx.needs_input_grad
        self.W, self.merged = None, False
        if any(ctx.needs_input_grad[KEPT:]) if ctx.goes_through else wants_x:
            self.W = W = held_or_made(weight, dy.dtype)
            if ctx.mask is None and merged_weight.pays(dy, W):
                self.W = merged_weight.merged(W, lora_A, lora_B, ctx.scaling, in_place=W is not weight)
                self.merged = True

    def of(
        self, dy: Tensor, rows: Tensor | None, h: Tensor | None, start: int = 0
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of some rows from `start` on, shapes (rows, in), (r, in) and (out, r); without the rows none of A."""
        s, mask, dtypes = self.ctx.scaling, self.ctx.mask, self.ctx.dtypes
        dx = dA = dB = None
        if self.wants_B:
            if h is None and rows is not None:
                h = project_down(rows, self.lora_A, mask)
            assert h is not None
            dB = matmul.scaled(dy.t(), h, s, dtypes[1])
        needs_g = self.wants_A or (self.W is not None and not self.merged)
        g = matmul.narrow(dy, self.lora_B) if needs_g else None  # (rows, r)
        if self.W is not None:
            dx = matmul.times(dy, self.W)
            if mask is None and g is not None and not self.merged:
                matmul.add_product(dx, g, self.lora_A, s)
        if mask is not None and g is not None:
            dA = self._through_mask(dx, rows, g, start)
        elif self.wants_A and g is not None and rows is not None:
            dA = matmul.scaled(g.t(), rows, s, dtypes[0])
        return dx, dA, dB

    def _through_mask(self, dx: Tensor | None, rows: Tensor | None, g: Tensor, start: int) -> Tensor | None:
        """Add to dx what comes through A and the mask, and return the gradient of A, if it is needed."""
        mask, factor = self.ctx.mask, self.ctx.scaling * self.ctx.mask.scale
        dA, shaped = torch.zeros_like(self.lora_A), dx if rows is None else rows
        for block, survives, dropped in mask.blocks(shaped, start) if shaped is not None else ():
            if self.wants_A:
                matmul.add_product(dA, g[block].t(), dropped, alpha=factor)
            if dx is not None:
                through = matmul.outer(g[block], self.lora_A)
                if dx.device.type == "cpu":
                    dx[block].add_(through.mul_(survives), alpha=factor)
                else:  # in one pass, which casts the mask as it reads
                    dx[block].addcmul_(through, survives, value=factor)
        return dA.to(self.ctx.dtypes[0]) if self.wants_A else None


def _in_slices(first: _FirstOrder, dy: Tensor, kept: Kept, h: Tensor | None) -> Gradients:
    """Through the activation before, whose arrays are the widest of all, a slice of the rows at a time."""
    into = [tensor.reshape(-1, tensor.shape[-1]) for tensor in kept]

    def of_slice(some: slice) -> tuple[Sequence[Tensor], Tensor | None, Tensor | None]:
        x, back = recompute.with_back(first.ctx.again.module, *(rows[some] for rows in into))
        dx, dA, dB = first.of(dy[some], x, None if h is None else h[some], some.start)
        assert dx is not None
        return back(dx), dA, dB

    size = SLICE.get(dy.device.type, SLICE["cuda"])
    parts = [slice(start, start + size) for start in range(0, len(dy), size)]
    if len(parts) == 1:  # a copy would be one more pass over the widest arrays
        found, dA, dB = of_slice(parts[0])
    else:
        found = [torch.empty_like(rows) for rows in into]
        dtypes = first.ctx.dtypes
        dA = torch.zeros_like(first.lora_A, dtype=dtypes[0]) if first.wants_A else None
        dB = torch.zeros_like(first.lora_B, dtype=dtypes[1]) if first.wants_B else None
        for some in parts:
            through, *more = of_slice(some)
            for whole, part in zip((dA, dB), more, strict=True):
                if whole is not None and part is not None:
                    whole += part
            for rows, gradient in zip(found, through, strict=True):
                rows[some] = gradient
    return tuple(rows.view(tensor.shape) for rows, tensor in zip(found, kept, strict=True)), dA, dB


def _second_order(dy: Tensor, kept: Kept, weight: Weight, lora_A: Tensor, lora_B: Tensor, ctx: Any) -> Gradients:
    """The same in differentiable operations, for a gradient of the gradient; the h that was kept has no history."""
    x = None if not kept else kept[0] if ctx.again is None else recompute.output(ctx.again.module, *kept)
    if x is None and ctx.needs_input_grad[4]:
        raise StateError("with lora_A frozen the input is not kept, and a gradient of the gradient of lora_B needs it.")
    shape, dy = (*dy.shape[:-1], lora_A.shape[1]), dy.reshape(-1, dy.shape[-1])
    rows = dy.new_empty(len(dy), lora_A.shape[1]) if x is None else x.reshape(-1, x.shape[-1])
    factors = None  # of the mask, for every feature
    if ctx.mask is not None:
        factors = torch.empty_like(rows)
        for block, survives, _ in ctx.mask.blocks(rows.detach()):
            factors[block] = survives * ctx.mask.scale
    g = dy @ lora_B * ctx.scaling
    through_A = g @ lora_A
    dx = (dy @ held_or_made(weight, dy.dtype) + (through_A if factors is None else through_A * factors)).view(shape)
    if x is None:
        return (dx,), None, None
    through = torch.autograd.grad(x, kept, dx, create_graph=True) if ctx.goes_through else (dx,)
    into_A = rows if factors is None else rows * factors
    return through, g.t() @ into_A, ctx.scaling * dy.t() @ (into_A @ lora_A.t())
