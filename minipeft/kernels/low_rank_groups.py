"""Products of rows with ``W + s L R``, where each row has one matrix of a stack, as one autograd node.

The node keeps x and ``h = x L``, shape (rows, r), besides W and the factors as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minipeft.kernels.grouped_product import DTYPES, Groups, grouped_times, is_one_call
from minipeft.kernels.low_rank_sum import LowRankSum
from minipeft.kernels.transformed import is_compiled

Product = Callable[[Tensor, Tensor, Tensor], Tensor]  # (rows, p), (groups, p, q), ends -> (rows, q)


def grouped(x: Tensor, stack: LowRankSum, ends: Tensor, product: Product | None = None) -> Tensor:
    """Rows times the matrix of their group: x (rows, p), sorted by group, -> (rows, q). Autocast is to be off.

    Args:
        x: cast nowhere; the matrices and factors are cast to its dtype.
        stack: one matrix (p, q) a group.
        ends: the number of rows up to the end of each group, shape (groups,), ascending, int32. What the rows after the
            last group get is undefined.
        product: computes this for a plain stack. Without gradients W is multiplied by it, so a zero adapter reproduces
            the base bit for bit.
    """
    if is_compiled():
        return _composed(x.contiguous(), stack, ends)
    x, groups = x.contiguous(), Groups(ends, is_one_call(x, stack.own))
    if stack.learns or (torch.is_grad_enabled() and x.requires_grad):
        return _Grouped.apply(x, stack.own, stack.left, stack.right, stack.scaling, groups)  # type: ignore[no-untyped-call,unused-ignore]
    y = groups.times(x, stack.own) if product is None else product(x, stack.own, ends)
    return _added(y, x, stack.left, stack.right, stack.scaling, groups)[0]


def gathered(x: Tensor, stack: LowRankSum, index: Tensor) -> Tensor:
    """Each row times the matrix (p, q) that it names: x (rows, p), index (rows,) -> (rows, q); differentiable.

    The rows are sorted, so that no matrix is copied.

    Raises:
        IndexError: there is no such matrix; on a GPU and by a compiler, where no value is looked at, the result is
            undefined instead.
    """
    count = len(stack.own)
    index, order = torch.sort(torch.where(index < 0, index + count, index), stable=True)
    if x.device.type == "cpu" and not is_compiled() and len(index) and not 0 <= int(index[0]) <= int(index[-1]) < count:
        raise IndexError(f"an index is out of range for {count} matrices")
    ends = torch.searchsorted(index, torch.arange(count, device=index.device), right=True).to(torch.int32)
    y = grouped(x[order], stack, ends)
    return y[torch.argsort(order)]


def _composed(x: Tensor, stack: LowRankSum, ends: Tensor) -> Tensor:
    """For a compiler: of operations that it knows, of which none keeps or makes anything of the size of W."""
    left, right = _padded(stack.left, stack.right, x, x.dtype in DTYPES)
    update = grouped_times(grouped_times(x, left, ends), right, ends)
    return torch.add(grouped_times(x, stack.own, ends), update, alpha=stack.scaling)


def _added(y: Tensor, x: Tensor, left: Tensor, right: Tensor, scaling: float, groups: Groups) -> tuple[Tensor, Tensor]:
    """``y + s (x L) R``, written into y, and ``x L``."""
    left, right = _padded(left, right, x, groups.one_call)
    h = groups.times(x, left)
    return y.add_(groups.times(h, right), alpha=scaling), h


def _padded(left: Tensor, right: Tensor, x: Tensor, one_call: bool) -> tuple[Tensor, Tensor]:
    """The factors in the dtype of x; for torch's grouped product dense, with ranks of zeros until they fill 16 bytes."""
    left, right = left.to(x.dtype), right.to(x.dtype)
    if not one_call:
        return left, right
    spare = -left.shape[-1] % (16 // x.element_size())
    if spare:
        left, right = F.pad(left.mT, (0, 0, 0, spare)).mT, F.pad(right, (0, 0, 0, spare))
    return left if left.mT.is_contiguous() else left.contiguous(), right.contiguous()


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, own: Tensor, left: Tensor, right: Tensor, scaling: float, groups: Groups
    ) -> Tensor:
        y, h = _added(groups.times(x, own), x, left, right, scaling, groups)
        ctx.save_for_backward(x, own, left, right, h)
        ctx.scaling, ctx.groups = scaling, groups
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(dy.device.type, enabled=False):
            return *_gradients(ctx, dy.contiguous(), *ctx.saved_tensors), None, None


def _gradients(
    ctx: Any, dy: Tensor, x: Tensor, own: Tensor, left: Tensor, right: Tensor, h: Tensor
) -> tuple[Tensor | None, ...]:
    """Of x, W (none), L and R. Of torch's differentiable operations, so that they have gradients too."""
    groups, r = ctx.groups, left.shape[-1]
    wants_x, _, wants_left, wants_right, *_ = ctx.needs_input_grad
    down, up = _padded(left, right, x, groups.one_call)
    if torch.is_grad_enabled():
        h = groups.times(x, down)
    dh = groups.times(dy, up.mT) * ctx.scaling
    dx = groups.times(dy, own.mT) + groups.times(dh, down.mT) if wants_x else None
    dleft = groups.outer(x, dh)[..., :r].to(left.dtype) if wants_left else None
    dright = (groups.outer(h, dy)[:, :r] * ctx.scaling).to(right.dtype) if wants_right else None
    return dx, None, dleft, dright
