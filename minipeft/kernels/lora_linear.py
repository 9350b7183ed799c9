"""The low-rank linear map as one autograd node: y = x W^T + b + s (drop(x) A^T) B^T, eq. (3) of arXiv:2106.09685.

Composed from single operations, the adapted layer makes four arrays of the size of its output, and reads and writes
them over and over. Here the output is allocated once, and the low-rank product is accumulated into it by the matrix
product itself, as is the gradient of x. Kept for the backward pass are x, in the storage its producer made (or what x
is cheaply computed from, see `minipeft.kernels.recompute`), and h = drop(x) A^T of shape (rows, r); never a mask.

Where there are more rows than W's own size makes up for, W + s B A is made instead, used, and dropped
(arXiv:2312.03415); only in full precision, where it rounds no worse than the product itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minipeft.errors import StateError
from minipeft.kernels import matmul, recompute
from minipeft.kernels.frozen_linear import Weight, held_or_made
from minipeft.kernels.functional import is_column_major

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]  # of x, A and B
PART_ROWS = 512  # rows whose gradient goes through an activation at once; a multiple of the next
DROPOUT_ROWS = 512  # rows to a seed: fixed, since the backward pass must draw what the forward pass drew


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
        weight: shape (out_features, in_features), any layout, such as the transposed view of a Conv1D's; or what makes
            it. It is then made in the forward and again in the backward pass, and is not kept.
        bias: shape (out_features,), or None.
        lora_A: shape (r, in_features); cast to the dtype of x, never x to its.
        lora_B: shape (out_features, r); likewise.
        scaling: dimensionless.
        dropout: probability of dropping a feature of x on its way into A. The mask comes from a seed drawn from torch's
            CPU generator, so checkpointing replays it, and it is drawn again in the backward pass instead of kept.

    Returns:
        Shape (..., out_features), no view of anything. Where a gradient is wanted it is exact, also that of the gradient.
        Under autocast in its dtype, or, as quantized layers have it, in that of x where the weight is made.
    """
    device, dtype = x.device.type, x.dtype
    if torch.is_autocast_enabled(device):
        x = x if dtype is torch.float64 else x.to(torch.get_autocast_dtype(device))
        with torch.autocast(device, enabled=False):
            y = lora_linear(x, weight, bias, lora_A, lora_B, scaling, dropout)
        return y if isinstance(weight, Tensor) else y.to(dtype)
    if lora_A.dtype is not x.dtype or lora_B.dtype is not x.dtype:
        lora_A, lora_B = lora_A.to(x.dtype), lora_B.to(x.dtype)
    learns = torch.is_grad_enabled() and (x.requires_grad or lora_A.requires_grad or lora_B.requires_grad)
    if dropout == 0 and x.numel() == x.shape[-1] and isinstance(weight, Tensor):
        # One row: there is nothing to save, and a node of our own costs more than it does.
        if weight.dtype is not x.dtype:
            weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        return torch.add(F.linear(x, weight, bias), F.linear(F.linear(x, lora_A), lora_B), alpha=scaling)
    mask = _Mask(dropout) if dropout > 0 else None
    if learns:
        # For the gradient of A alone is x wanted again: a frozen A keeps nothing but h (LoRA-FA, arXiv:2308.03303).
        source = recompute.source_of(x) if lora_A.requires_grad else None
        kept, module = (x if lora_A.requires_grad else None, None)
        if source is not None:
            kept, module = source.input, source.module
        entry = kept if source is not None and recompute.leads_back(x, source) else x
        given = x if entry is x else x.detach()
        return _LoraLinear.apply(  # type: ignore[no-untyped-call]
            entry, given, weight, bias, lora_A, lora_B, scaling, mask, kept, module
        )
    # Where nothing is learned, an adapter that changes nothing leaves every bit as the base has it.
    return _product(x, weight, bias, lora_A, lora_B, scaling, mask, matmul.torch_linear)[0]


# -------------------------------------------------------------------------------------------------------- arithmetic
class _Mask:
    """Which features of which rows pass, drawn from a seed as often as it is asked for.

    A feature is dropped where a random byte lies below its row's threshold. The threshold is one of two neighbouring
    ones, drawn so that the probability is met in the mean: bytes are half the random numbers that 16 bits would take.
    """

    def __init__(self, probability: float) -> None:
        self.probability = probability
        self.gain = 1 / (1 - probability)  # what passes is raised by it
        self.seed = int(torch.randint(2**62, ()))

    def blocks(self, rows: Tensor, first: int = 0) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """(which rows, 1 or 0 for each of their features, these rows with the dropped features at 0); read, not kept.

        `rows` are those from `first` on, a multiple of DROPOUT_ROWS.
        """
        low = int(self.probability * 256)
        generator = torch.Generator(rows.device)
        buffer = rows.new_empty(min(DROPOUT_ROWS, len(rows)), rows.shape[1])
        for start in range(0, len(rows), DROPOUT_ROWS):
            some = rows[start : start + DROPOUT_ROWS]
            generator.manual_seed(self.seed + first + start)
            words = torch.empty((some.numel() + 7) // 8, dtype=torch.int64, device=rows.device)
            words.random_(-(2**63), None, generator=generator)
            above = torch.empty(len(some), 1, device=rows.device).uniform_(generator=generator)
            thresholds = (
                above.lt_(self.probability * 256 - low).add_(low - 128).to(torch.int8 if low < 255 else torch.int16)
            )
            passes = words.view(torch.int8)[: some.numel()].view(some.shape).ge_(thresholds)
            yield slice(start, start + len(some)), passes, torch.mul(some, passes, out=buffer[: len(some)])


def _product(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    mask: _Mask | None,
    linear: Callable[..., Tensor],
) -> tuple[Tensor, Tensor | None]:
    """The output, and h of shape (rows, r); None where the backward pass had better make it."""
    rows = x.reshape(-1, x.shape[-1])
    W = held_or_made(weight, x.dtype)
    merged = mask is None and _merging_pays(rows, W)
    if merged:
        W = _merged(W, lora_A, lora_B, scaling, in_place=W is not weight)
    y = linear(x, W, None if bias is None else bias.to(x.dtype))
    if merged:
        return y, None
    h = _down(rows, lora_A, mask)
    y.view(-1, W.shape[0]).addmm_(h, lora_B.t(), alpha=scaling)
    return y, h


def _down(rows: Tensor, lora_A: Tensor, mask: _Mask | None) -> Tensor:
    """``drop(x) A^T``, shape (rows, r)."""
    if mask is None:
        return matmul.narrow(rows, lora_A.t())
    h = rows.new_empty(len(rows), len(lora_A))
    for block, _, dropped in mask.blocks(rows):
        h[block] = matmul.narrow(dropped, lora_A.t())
    return h.mul_(mask.gain)


def _merging_pays(rows: Tensor, weight: Tensor) -> bool:
    out_features, in_features = weight.shape
    full = rows.dtype in (torch.float32, torch.float64) and rows.device.type == "cpu"
    return full and len(rows) * (in_features + out_features) >= 2 * in_features * out_features


def _merged(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, *, in_place: bool) -> Tensor:
    across = is_column_major(weight)
    W, left, right = (weight.t(), lora_A.t(), lora_B.t()) if across else (weight, lora_B, lora_A)
    W = W.addmm_(left, right, alpha=scaling) if in_place else torch.addmm(W, left, right, alpha=scaling)
    return W.t() if across else W


class _LoraLinear(torch.autograd.Function):
    """`x` is what the map is applied to, and `entry` what the gradient goes to: x, or what an activation made x from.

    `kept` is x or what `module` makes x from; None for a frozen A.
    """

    @staticmethod
    def forward(
        ctx: Any,
        entry: Tensor,
        x: Tensor,
        weight: Weight,
        bias: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
        mask: _Mask | None,
        kept: Tensor | None,
        module: nn.Module | None,
    ) -> Tensor:
        y, h = _product(x, weight, bias, lora_A, lora_B, scaling, mask, matmul.linear)
        if kept is None and h is None:
            h = _down(x.reshape(-1, x.shape[-1]), lora_A, mask)
        held = isinstance(weight, Tensor)
        ctx.save_for_backward(kept, weight if held else None, lora_A, lora_B, h)
        ctx.make = None if held else weight
        ctx.scaling, ctx.mask, ctx.module, ctx.goes_through = scaling, mask, module, entry is not x
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_autocast_enabled(dy.device.type):
            with torch.autocast(dy.device.type, enabled=False):
                return _LoraLinear.backward(ctx, dy)
        gradients: Callable[..., Gradients] = _in_parts if ctx.goes_through else _at_once
        if torch.is_grad_enabled():
            gradients = _second_order
        kept, weight, *others = ctx.saved_tensors
        dx, dA, dB = gradients(dy, kept, ctx.make or weight, *others, ctx)
        return dx, None, None, None, dA, dB, *[None] * 4


def _at_once(
    dy: Tensor, kept: Tensor | None, weight: Weight, lora_A: Tensor, lora_B: Tensor, h: Tensor | None, ctx: Any
) -> Gradients:
    x = kept if kept is None or ctx.module is None else recompute.output(ctx.module, kept)
    shape = (*dy.shape[:-1], lora_A.shape[1])
    rows, dy = None if x is None else x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    W, merged = _for_backward(dy, weight, lora_A, lora_B, ctx)
    dx, dA, dB = _first_order(dy, rows, W, merged, lora_A, lora_B, h, ctx)
    return None if dx is None else dx.view(shape), dA, dB


def _in_parts(
    dy: Tensor, kept: Tensor, weight: Weight, lora_A: Tensor, lora_B: Tensor, h: Tensor | None, ctx: Any
) -> Gradients:
    """Through the activation before, whose arrays are the widest of all: never whole, but some rows at a time."""
    into, dy = kept.reshape(-1, kept.shape[-1]), dy.reshape(-1, dy.shape[-1])
    W, merged = _for_backward(into, weight, lora_A, lora_B, ctx)
    gradient, sums = torch.empty_like(into), [torch.zeros_like(lora_A), torch.zeros_like(lora_B)]
    for start in range(0, len(into), PART_ROWS):
        some = slice(start, start + PART_ROWS)
        part = into[some].detach().requires_grad_()
        with torch.enable_grad():
            rows = recompute.output(ctx.module, part)
        found = _first_order(
            dy[some], rows.detach(), W, merged, lora_A, lora_B, None if h is None else h[some], ctx, start
        )
        for total, more in zip(sums, found[1:], strict=True):
            if more is not None:
                total += more
        assert found[0] is not None
        (gradient[some],) = torch.autograd.grad(rows, part, found[0])
    _, _, _, _, wants_A, wants_B, *_ = ctx.needs_input_grad
    return gradient.view(kept.shape), sums[0] if wants_A else None, sums[1] if wants_B else None


def _for_backward(rows: Tensor, weight: Weight, lora_A: Tensor, lora_B: Tensor, ctx: Any) -> tuple[Tensor | None, bool]:
    """What the gradient of the output is multiplied by, if that of x is wanted, and whether it is W + s B A."""
    if not ctx.needs_input_grad[0]:
        return None, False
    W = held_or_made(weight, rows.dtype)
    if ctx.mask is not None or not _merging_pays(rows, W):
        return W, False
    return _merged(W, lora_A, lora_B, ctx.scaling, in_place=W is not weight), True


def _first_order(
    dy: Tensor,
    rows: Tensor | None,
    W: Tensor | None,
    merged: bool,
    lora_A: Tensor,
    lora_B: Tensor,
    h: Tensor | None,
    ctx: Any,
    start: int = 0,
) -> Gradients:
    """Gradients of some rows, from `start` on, shapes (rows, in), (r, in) and (out, r); without the rows none of A."""
    wants_x, _, _, _, wants_A, wants_B, *_ = ctx.needs_input_grad
    s, mask = ctx.scaling, ctx.mask
    dx = dA = dB = None
    if wants_B:
        if h is None and rows is not None:
            h = _down(rows, lora_A, mask)
        assert h is not None
        dB = matmul.narrow(dy.t(), h).mul(s).contiguous()
    g = matmul.narrow(dy, lora_B) if wants_A or (wants_x and not merged) else None  # (rows, r)
    if wants_x and W is not None:
        dx = matmul.linear(dy, W.t())
        if mask is None and g is not None and not merged:
            dx.addmm_(g, lora_A, alpha=s)
    if mask is None:
        if wants_A and g is not None and rows is not None:
            dA = matmul.narrow(rows.t(), g).t().mul(s).contiguous()
    elif g is not None:
        dA = torch.zeros_like(lora_A)
        shaped = dx if rows is None else rows
        for block, passes, dropped in mask.blocks(shaped, start) if shaped is not None else ():
            if wants_A:
                dA.addmm_(g[block].t(), dropped, alpha=s * mask.gain)
            if dx is not None:
                dx[block].add_(torch.mm(g[block], lora_A).mul_(passes), alpha=s * mask.gain)
        dA = dA if wants_A else None
    return dx, dA, dB


def _second_order(
    dy: Tensor, kept: Tensor | None, weight: Weight, lora_A: Tensor, lora_B: Tensor, h: Tensor | None, ctx: Any
) -> Gradients:
    """The same as differentiable operations: a gradient of the gradient is wanted, and the h that was kept has no history.

    Raises:
        StateError: the gradient of B is wanted, and x was not kept, since A is frozen.
    """
    x = kept if kept is None or ctx.module is None else recompute.output(ctx.module, kept)
    if x is None and ctx.needs_input_grad[5]:
        raise StateError("with lora_A frozen the input is not kept, and a gradient of the gradient of lora_B needs it.")
    shape, dy = (*dy.shape[:-1], lora_A.shape[1]), dy.reshape(-1, dy.shape[-1])
    rows = dy.new_empty(len(dy), lora_A.shape[1]) if x is None else x.reshape(-1, x.shape[-1])
    passes = None
    if ctx.mask is not None:
        passes = torch.empty_like(rows)
        for block, bits, _ in ctx.mask.blocks(rows.detach()):
            passes[block] = bits * ctx.mask.gain
    g = dy @ lora_B * ctx.scaling
    through_A = g @ lora_A
    dx = (dy @ held_or_made(weight, dy.dtype) + (through_A if passes is None else through_A * passes)).view(shape)
    if x is None:
        return dx, None, None
    if ctx.goes_through and kept is not None:
        (dx,) = torch.autograd.grad(x, kept, dx, create_graph=True)
    into_A = rows if passes is None else rows * passes
    return dx, g.t() @ into_A, ctx.scaling * dy.t() @ (into_A @ lora_A.t())
