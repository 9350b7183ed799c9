"""The forward pass of every method whose update is a product of two factors."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from minipeft.kernels.frozen_linear import can_fuse
from minipeft.kernels.lora_linear import lora_linear
from minipeft.layers.base import LayerOps


def low_rank_forward(
    base: nn.Module,
    ops: LayerOps,
    x: Tensor,
    y: Tensor | None,
    down: Tensor,
    up: Tensor,
    scaling: float | Tensor,
    dropout: float = 0.0,
) -> Tensor:
    """``y + scaling * up down dropout(x)``, shape (..., out); without y, the layer's own output is computed with it.

    Args:
        base: the frozen layer.
        ops: how to read and call it.
        x: its input, shape (..., in), or indices for an embedding.
        y: its output, shape (..., out), or None.
        down: shape (r, in); cast to the dtype of the activations.
        up: shape (out, r); likewise.
        scaling: dimensionless; a tensor if it may change between the runs of a compiled model.
        dropout: probability of dropping an input feature; for an embedding, of dropping a token's whole update.
    """
    if y is None:
        weight, bias = ops.linear_weight(base, x), ops.read_bias(base)
        if weight is not None and can_fuse(x, weight, bias):
            if isinstance(scaling, Tensor):  # the product multiplies by numbers
                up, scaling = up * scaling, 1.0
            return lora_linear(x, weight, bias, down, up, scaling, dropout)
        y = ops.call(base, x)
    assert isinstance(y, Tensor)
    dtype = y.dtype if ops.is_embedding else x.dtype
    if dropout and not ops.is_embedding:
        x = F.dropout(x, dropout)
    h = ops.project_in(base, x, down.to(dtype)) * scaling
    if dropout and ops.is_embedding:
        h = h * F.dropout(h.new_ones(*h.shape[:-1], 1), dropout)
    return y + ops.project_out(base, h, up.to(dtype)).to(y.dtype)
