"""W + s B A as one matrix, made for a single product (arXiv:2312.03415)."""

from __future__ import annotations

import torch
from torch import Tensor

from minipeft.kernels.functional import is_column_major


def pays(rows: Tensor, weight: Tensor) -> bool:
    """Whether making W + s B A costs less than two products by A and B: if the rows outnumber W's own size.

    Only in full precision, where it rounds no worse than the products, and on a CPU.
    """
    if not rows.is_cpu or rows.dtype not in (torch.float32, torch.float64):
        return False
    out_features, in_features = weight.shape
    return rows.shape[0] * (in_features + out_features) >= 2 * in_features * out_features


def merged(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, *, in_place: bool) -> Tensor:
    """``W + s B A``, shape (out, in), in the memory order of W; `in_place` writes it into W."""
    across = is_column_major(weight)
    W, left, right = (weight.t(), lora_A.t(), lora_B.t()) if across else (weight, lora_B, lora_A)
    W = W.addmm_(left, right, alpha=scaling) if in_place else torch.addmm(W, left, right, alpha=scaling)
    return W.t() if across else W
