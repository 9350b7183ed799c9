"""Rows that are sorted by group, times the matrix of their group, by torch's grouped product or one matrix after the other."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from minipeft.kernels import matmul

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def is_one_call(x: Tensor, stack: Tensor) -> bool:
    """Whether torch has a fast grouped product for these, x (rows, p) and stack (groups, p, q): its rows must fill 16 bytes."""
    if x.dtype not in DTYPES or stack.dtype is not x.dtype or not _is_there(x.device, x.dtype):
        return False
    if x.device.type == "cpu" and not matmul.has_kernels(x.dtype):
        return False
    fills = all(size * x.element_size() % 16 == 0 for size in stack.shape[1:])
    dense = stack.is_contiguous() or stack.mT.is_contiguous()
    return fills and dense and stack.data_ptr() % 16 == 0


@functools.cache
def _is_there(device: torch.device, dtype: torch.dtype) -> bool:
    """On a GPU in bfloat16 on Hopper and its successor for data centres.

    For others torch takes one matrix after the other, and waits in each call for the GPU to tell how many rows each has.
    """
    if device.type == "cuda":
        return dtype is torch.bfloat16 and torch.cuda.get_device_capability(device)[0] in (9, 10)
    return device.type == "cpu"


class Groups:
    """Which rows belong to which group.

    Args:
        ends: the number of rows up to the end of each group, shape (groups,), ascending, int32.
        one_call: as `is_one_call` says. Otherwise the sizes are read, for which a GPU has to be waited for.
    """

    def __init__(self, ends: Tensor, one_call: bool) -> None:
        self.ends = ends
        self.one_call = one_call

    @functools.cached_property
    def sizes(self) -> Sequence[int]:
        """The number of rows of each group."""
        ends: list[int] = self.ends.tolist()
        return [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]

    def times(self, x: Tensor, stack: Tensor) -> Tensor:
        """X (rows, p) times stack (groups, p, q) -> (rows, q); what the rows after the last group get is undefined."""
        if self.one_call:
            return torch._grouped_mm(x, stack, offs=self.ends)
        some = [_product(rows, matrix.to(x.dtype)) for rows, matrix in zip(self._parts(x), stack.unbind(), strict=True)]
        return torch.cat([*some, x.new_zeros(len(x) - sum(self.sizes), stack.shape[-1])])

    def outer(self, x: Tensor, y: Tensor) -> Tensor:
        """``x^T y`` of each group: (rows, p) and (rows, q) -> (groups, p, q)."""
        if self.one_call:
            return torch._grouped_mm(x.t(), y, offs=self.ends)
        return torch.stack([_product(a.t(), b) for a, b in zip(self._parts(x), self._parts(y), strict=True)])

    def _parts(self, rows: Tensor) -> tuple[Tensor, ...]:
        return torch.split(rows[: sum(self.sizes)], list(self.sizes))


def _product(left: Tensor, right: Tensor) -> Tensor:
    free = not torch.is_grad_enabled() and matmul.through_float32(left, right.t())
    return matmul.linear(left, right.t()) if free else left @ right


# The same for a compiler, which cannot look at how many rows a group has: operations of which it knows the shapes alone.
# Where torch has no product of its own, they read how many, which a CUDA graph cannot.
UNSAFE = (torch.Tag.cudagraph_unsafe,)


@torch.library.custom_op(
    "minipeft::grouped_times", mutates_args=(), schema="(Tensor x, Tensor stack, Tensor ends) -> Tensor", tags=UNSAFE
)
@torch.no_grad()
def grouped_times(x: Tensor, stack: Tensor, ends: Tensor) -> Tensor:
    """`Groups.times`, differentiable once. A frozen stack gets no gradient, which would be as large as itself."""
    return Groups(ends, is_one_call(x, stack)).times(x, stack)


@torch.library.custom_op(
    "minipeft::grouped_outer", mutates_args=(), schema="(Tensor x, Tensor y, Tensor ends) -> Tensor", tags=UNSAFE
)
@torch.no_grad()
def grouped_outer(x: Tensor, y: Tensor, ends: Tensor) -> Tensor:
    """`Groups.outer`."""
    one_call = is_one_call(x, x.new_empty(1, x.shape[1], y.shape[1]))
    return Groups(ends, one_call).outer(x, y)


@grouped_times.register_fake
def _times_fake(x: Tensor, stack: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(len(x), stack.shape[-1])


@grouped_outer.register_fake
def _outer_fake(x: Tensor, y: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(len(ends), x.shape[1], y.shape[1])


def _times_setup(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    (x, stack, ends), (wants_x, wants_stack) = inputs, ctx.needs_input_grad[:2]
    ctx.save_for_backward(x if wants_stack else None, stack if wants_x else None, ends)


def _times_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    (x, stack, ends), (wants_x, wants_stack) = ctx.saved_tensors, ctx.needs_input_grad[:2]
    dy = dy.contiguous()
    dx: Tensor | None = grouped_times(dy, stack.mT, ends) if wants_x else None
    dstack: Tensor | None = grouped_outer(x, dy, ends) if wants_stack else None
    return dx, dstack, None


grouped_times.register_autograd(_times_backward, setup_context=_times_setup)
