"""The loss of a causal language model from its last hidden states, a few rows of logits at a time.

The logits of a batch are often the largest array of a training step, and at its peak there are four of that size. Here
they never exist as a whole: the gradient of the hidden states is computed in the forward pass, chunk by chunk, as in
Liger-Kernel (arXiv:2410.10989), and rows whose label is ignored skip the output head.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minipeft.errors import LeanError
from minipeft.kernels import matmul
from minipeft.kernels.transformed import is_compiled

CHUNK_BYTES = {"cpu": 12 * 2**20, "cuda": 256 * 2**20}  # of logits
# At least: each chunk reads the whole head, which takes longer than multiplying by it for a few rows. And a multiple of
# it: a GPU multiplies in tiles of 128 or 256 rows, and works on one that is nearly empty as long as on a full one.
CHUNK_ROWS = 256


def causal_lm_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    changed_rows: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Cross entropy of ``hidden @ weight.T + bias`` against the labels, as in transformers' ``ForCausalLMLoss``.

    Args:
        hidden: shape (..., tokens, features).
        weight: the frozen output head, shape (vocabulary, features).
        bias: shape (vocabulary,), frozen, or None.
        labels: shape (..., tokens); the label at t is predicted from the hidden state at t - 1.
        num_items_in_batch: what the sum is divided by. None: the number of labels that are not ignored.
        ignore_index: the label of rows that do not count.
        shift_labels: labels that are shifted already, instead of `labels`.
        changed_rows: (indices (n,), change (n, features)), added to those rows of the weight; the change may train.

    Returns:
        A scalar, float32 or wider. Its gradient is exact.

    Raises:
        LeanError: labels and hidden states differ in shape; or in a backward pass with ``create_graph=True``.
    """
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    if shift_labels.shape != hidden.shape[:-1]:
        raise LeanError(
            f"the labels have the shape {tuple(shift_labels.shape)}, and the tokens {tuple(hidden.shape[:-1])}; "
            "one label per token is expected."
        )
    targets = shift_labels.reshape(-1).to(hidden.device)
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype is not torch.float64:
        hidden = hidden.to(torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False):
        rows, change = (None, None) if changed_rows is None else changed_rows
        args = hidden, weight, bias, targets, ignore_index, rows, change
        total: Tensor = summed_in_graph(*args) if is_compiled() else _Summed.apply(*args)  # type: ignore[no-untyped-call,unused-ignore]
    count = (targets != ignore_index).sum() if num_items_in_batch is None else num_items_in_batch
    return total / (count.to(total.device) if isinstance(count, Tensor) else count)


class _Summed(torch.autograd.Function):
    """The sum over all tokens. The gradients are kept for the backward pass, which only scales them."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        total, *gradients = _summed(*args, wanted=ctx.needs_input_grad[0], trains=ctx.needs_input_grad[6])
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise LeanError("the loss in chunks has no second derivative; for create_graph=True, unlean(model) first.")
        of_hidden, of_change = (None if g is None else g * scale.to(g.dtype) for g in ctx.saved_tensors)
        return of_hidden, None, None, None, None, None, of_change


def _summed(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ignore_index: int,
    rows_changed: Tensor | None,
    change: Tensor | None,
    *,
    wanted: bool,
    trains: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The sum, its gradient in `hidden` if that is wanted, and its gradient in `change` if that trains."""
    rows, weight = hidden.reshape(-1, hidden.shape[-1]), weight.to(hidden.dtype)
    kept = (targets != ignore_index).nonzero().flatten()
    exact = torch.promote_types(hidden.dtype, torch.float32)
    total = torch.zeros((), dtype=torch.float64, device=hidden.device)
    gradient = torch.zeros_like(rows) if wanted else None
    added = None if change is None else change.to(hidden.dtype)
    of_change = torch.zeros_like(change, dtype=exact) if change is not None and trains else None
    chunks = torch.split(kept, rows_per_chunk(hidden, weight))
    head = _Head(weight, None if bias is None else bias.to(rows.dtype), len(chunks[0]))
    for some in chunks:
        x, target = rows[some], targets[some, None]
        logs = head.logits(x)
        if rows_changed is not None and added is not None:
            logs.index_add_(1, rows_changed, matmul.linear(x, added).to(exact))
        torch.log_softmax(logs, 1, out=logs)
        total -= (of_target := logs.gather(1, target)).sum(dtype=torch.float64)
        if gradient is None and of_change is None:
            continue
        probabilities = head.exp(logs, rounded=rows_changed is None)
        probabilities.scatter_(1, target, of_target.expm1_().to(probabilities.dtype))
        of_rows = None if rows_changed is None else probabilities[:, rows_changed]
        if gradient is not None:
            gradient[some] = head.back(probabilities)
            if of_rows is not None and added is not None:
                gradient[some] += matmul.linear(of_rows.to(x.dtype), added.t())
        if of_change is not None and of_rows is not None:
            of_change += of_rows.t() @ x.to(exact)
    return total.to(exact), None if gradient is None else gradient.view(hidden.shape), of_change


class _Head:
    """The output head on one chunk after the other; all use the same memory, since new memory costs more than it seems.

    In half precision the logits are rounded as they would be, and their softmax is taken in float32.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: int) -> None:
        self.weight, self.bias = weight, bias
        like = weight.new_empty(rows, weight.shape[1])
        self.by_float32 = matmul.through_float32(like, weight)
        dtype = torch.float32 if self.by_float32 else weight.dtype
        exact = torch.promote_types(dtype, torch.float32)
        writes_elsewhere = matmul.through_onednn(like, weight)
        self.room = None if writes_elsewhere else weight.new_empty(rows, len(weight), dtype=dtype)
        self.wide = None if exact is dtype else weight.new_empty(rows, len(weight), dtype=exact)

    def logits(self, x: Tensor) -> Tensor:
        """Shape (rows, vocabulary), float32 or wider."""
        room = None if self.room is None else self.room[: len(x)]
        if self.by_float32 and room is not None:
            return matmul.in_float32(x, self.weight, self.bias, room)
        made = matmul.linear(x, self.weight, self.bias, room=room)
        return made if self.wide is None else self.wide[: len(x)].copy_(made)

    def exp(self, logs: Tensor, *, rounded: bool) -> Tensor:
        """The exponentials in memory of the logits; they may be rounded to the dtype of the weight where that spares a pass."""
        if rounded and logs.is_cuda and self.wide is not None and self.room is not None:
            return torch.exp(logs, out=self.room[: len(logs)])
        return logs.exp_()

    def back(self, gradient: Tensor) -> Tensor:
        """The gradient of the rows, shape (rows, features), from that of their logits."""
        if self.by_float32:
            y = self.weight.new_empty(len(gradient), self.weight.shape[1])
            return matmul.in_float32(gradient, self.weight.t(), None, y)
        if self.room is not None and gradient.dtype is not self.room.dtype:
            gradient = self.room[: len(gradient)].copy_(gradient)
        return matmul.linear(gradient, self.weight.t())


def rows_per_chunk(hidden: Tensor, weight: Tensor) -> int:
    """How many rows of logits are made at a time."""
    budget = CHUNK_BYTES.get(hidden.device.type, CHUNK_BYTES["cuda"])
    fit = budget // (4 * len(weight))
    return max(CHUNK_ROWS, fit - fit % CHUNK_ROWS)


# The same for a compiler: one operation of which it knows the shapes alone, since labels decide what is computed.
SCHEMA = """(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, int ignore_index, Tensor? rows_changed, Tensor? change,
    bool wanted, bool trains) -> (Tensor, Tensor, Tensor)"""


# It reads which labels count, which a CUDA graph cannot, so a compiler leaves it out of those.
@torch.library.custom_op(
    "minipeft::chunked_cross_entropy", mutates_args=(), schema=SCHEMA, tags=(torch.Tag.cudagraph_unsafe,)
)
@torch.no_grad()
def _operation(hidden: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *others, wanted, trains = args
    total, *gradients = _summed(hidden, *others, wanted=wanted, trains=trains)
    of_hidden, of_change = (hidden.new_empty(0) if found is None else found for found in gradients)
    return total, of_hidden, of_change


@_operation.register_fake
def _shapes(hidden: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, change, wanted, trains = args
    exact, none = torch.promote_types(hidden.dtype, torch.float32), hidden.new_empty(0)
    of_hidden = hidden.new_empty(hidden.shape) if wanted else none
    return hidden.new_empty((), dtype=exact), of_hidden, torch.empty_like(change, dtype=exact) if trains else none


def _keep(ctx: Any, inputs: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*output[1:])
    ctx.wanted, ctx.trains = inputs[-2:]


def _scaled(ctx: Any, scale: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    of_hidden, of_change = (gradient * scale.to(gradient.dtype) for gradient in ctx.saved_tensors)
    return of_hidden if ctx.wanted else None, *[None] * 5, of_change if ctx.trains else None, None, None


_operation.register_autograd(_scaled, setup_context=_keep)


def summed_in_graph(hidden: Tensor, *args: Any) -> Tensor:
    """The sum over all tokens, as one operation of a compiled graph."""
    learns, change = torch.is_grad_enabled(), args[-1]
    trains = learns and change is not None and change.requires_grad
    total: Tensor = _operation(hidden, *args, learns and hidden.requires_grad, trains)[0]
    return total
