"""The one place that rounds a merged weight: what `rounded` returns is checked, reported, written and undone."""

from __future__ import annotations

import torch
from torch import Tensor

from minipeft.kernels.functional import is_column_major

# Values of a half-precision weight that are widened at a time: on a CPU 1 MiB, for the cache of one core.
BLOCK = {"cpu": 2**18, "cuda": 2**26}
ROWS = 64  # at least: the product is slow by a few rows


def rounded(value: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """A merged weight or bias, computed in float32 or float64, rounded to the dtype that its layer stores.

    Args:
        value: any shape.
        dtype: of the result.
        out: where to write it; None: a new tensor, or `value` itself if it has this dtype.
    """
    if out is not None:
        return out.copy_(value)
    return value.to(dtype)


def add_product(weight: Tensor, up: Tensor, down: Tensor) -> None:
    """``weight += up @ down`` in place, accumulated in the factors' dtype and rounded once.

    A narrower weight is widened a block of rows at a time. The memory for that is allocated before the first write, so
    running out of memory leaves the weight as it was.

    Args:
        weight: shape (out, in).
        up: shape (out, r), float32 or float64.
        down: shape (r, in), of the same dtype.
    """
    if weight.dtype == up.dtype:
        weight.addmm_(up, down)
        return
    if is_column_major(weight):
        weight, up, down = weight.t(), down.t(), up.t()
    rows = max(ROWS, BLOCK.get(weight.device.type, BLOCK["cuda"]) // max(1, weight.shape[1]))
    wide = up.new_empty(min(rows, len(weight)), weight.shape[1])
    for start in range(0, len(weight), rows):
        part = weight[start : start + rows]
        block = wide[: len(part)].copy_(part)
        rounded(block.addmm_(up[start : start + rows], down), weight.dtype, out=part)
