"""Pure tensor maths of low-rank adaptation (Hu et al., 2021, arXiv:2106.09685)."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def lora_scaling(r: int, lora_alpha: float, use_rslora: bool = False) -> float:
    """``lora_alpha / r``, or ``lora_alpha / sqrt(r)`` for rank-stabilised LoRA (Kalajdzievski, 2023, arXiv:2312.03732)."""
    return lora_alpha / math.sqrt(r) if use_rslora else lora_alpha / r


def lora_delta(lora_A: Tensor, lora_B: Tensor, scaling: float, *, column_major: bool = False) -> Tensor:
    """Dense weight update of a LoRA pair, ``scaling * B A``, eq. (3) of arXiv:2106.09685.

    Args:
        lora_A: down projection, shape (r, in_features).
        lora_B: up projection, shape (out_features, r).
        scaling: see `lora_scaling`, dimensionless.
        column_major: lay the result out as the transpose of a contiguous (in_features, out_features) array, which is
            how a Conv1D's weight lies in memory; adding arrays that lie alike is several times faster.

    Returns:
        Shape (out_features, in_features), in float32 (float64 where a factor is): half precision would lose the small
        updates that merging is about.

    Raises:
        ValueError: the factors disagree on r.
    """
    if lora_A.shape[0] != lora_B.shape[1]:
        raise ValueError(
            f"rank mismatch: lora_A is {tuple(lora_A.shape)}, lora_B is {tuple(lora_B.shape)}; "
            "lora_A.shape[0] must equal lora_B.shape[1]"
        )
    dtype = torch.promote_types(torch.promote_types(lora_A.dtype, lora_B.dtype), torch.float32)
    down, up = lora_A.to(dtype), lora_B.to(dtype) * scaling  # scaled while it is small
    return (down.t() @ up.t()).t() if column_major else up @ down


def is_column_major(weight: Tensor) -> bool:
    """Whether a canonical weight is the transposed view of a contiguous array."""
    return weight.ndim == 2 and weight.stride(0) < weight.stride(1)


def accumulation_dtype(weight: Tensor) -> torch.dtype:
    """The dtype in which a weight is merged: float32, or float64 for a float64 weight."""
    return torch.promote_types(weight.dtype, torch.float32)
