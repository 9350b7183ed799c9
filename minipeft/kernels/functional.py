"""Pure tensor maths of low-rank adaptation (Hu et al., 2021, arXiv:2106.09685)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.amp import is_autocast_available

HALF = frozenset({torch.bfloat16, torch.float16})


def lora_scaling(r: int, lora_alpha: float, use_rslora: bool = False) -> float:
    """``lora_alpha / r``, or ``lora_alpha / sqrt(r)`` for rank-stabilised LoRA (Kalajdzievski, 2023, arXiv:2312.03732)."""
    return lora_alpha / math.sqrt(r) if use_rslora else lora_alpha / r


def lora_factors(lora_A: Tensor, lora_B: Tensor, scaling: float | Tensor) -> tuple[Tensor, Tensor]:
    """The pair (up, down) whose product is the update of a LoRA pair: ``up @ down == scaling * B A``.

    Args:
        lora_A: down projection, shape (r, in_features).
        lora_B: up projection, shape (out_features, r).
        scaling: see `lora_scaling`, dimensionless.

    Returns:
        Shapes (out_features, r) and (r, in_features), in float32, or float64 if a factor is: half precision would lose
        the small updates that merging is about.

    Raises:
        ValueError: the factors disagree on r.
    """
    if lora_A.shape[0] != lora_B.shape[1]:
        raise ValueError(
            f"rank mismatch: lora_A is {tuple(lora_A.shape)}, lora_B is {tuple(lora_B.shape)}; "
            "lora_A.shape[0] must equal lora_B.shape[1]"
        )
    if not lora_A.dtype == lora_B.dtype == torch.float32:  # as they nearly always are
        dtype = torch.promote_types(torch.promote_types(lora_A.dtype, lora_B.dtype), torch.float32)
        lora_A, lora_B = lora_A.to(dtype), lora_B.to(dtype)
    return lora_B * scaling, lora_A  # scale the small one


def lora_delta(lora_A: Tensor, lora_B: Tensor, scaling: float | Tensor, *, column_major: bool = False) -> Tensor:
    """Dense weight update of a LoRA pair, ``scaling * B A``, eq. (3) of arXiv:2106.09685.

    Arguments and errors as for `lora_factors` and `low_rank_product`; shape (out_features, in_features).
    """
    return low_rank_product(*lora_factors(lora_A, lora_B, scaling), column_major=column_major)


def split_rows(lora_A: Tensor, num_experts: int) -> Tensor:
    """Each expert's down projection, (r * experts, in) -> (experts, r, in): PEFT stores one expert after the other."""
    return lora_A.view(num_experts, -1, lora_A.shape[1])


def split_columns(lora_B: Tensor, num_experts: int) -> Tensor:
    """Each expert's up projection, (out, r * experts) -> (experts, out, r): PEFT stores one rank after the other."""
    return lora_B.view(len(lora_B), -1, num_experts).permute(2, 0, 1)


def stacked_delta(lora_A: Tensor, lora_B: Tensor, scaling: float | Tensor, num_experts: int) -> Tensor:
    """The updates of all experts, one below the other, shape (experts * out, in), from stacked factors (see `split_rows`)."""
    up, down = lora_factors(lora_A, lora_B, scaling)
    return torch.bmm(split_columns(up, num_experts), split_rows(down, num_experts)).flatten(0, 1)


def low_rank_product(up: Tensor, down: Tensor, *, column_major: bool = False) -> Tensor:
    """``up @ down``, shapes (out, r) and (r, in) -> (out, in).

    Args:
        up: left factor.
        down: right factor.
        column_major: store the result as the transpose of a contiguous (in, out) array, as a Conv1D's weight is stored;
            adding arrays of the same memory order is several times faster.
    """
    return (down.t() @ up.t()).t() if column_major else up @ down


def low_rank_bound(up: Tensor, down: Tensor) -> float:
    """An upper bound of the values of ``up @ down``, from one pass over the factors; inf or NaN if they are not finite."""
    return down.shape[0] * largest(up) * largest(down)


def largest(tensor: Tensor) -> float:
    """The largest absolute value, NaN if there is a NaN, 0 if empty; one pass and no temporary arrays."""
    if tensor.numel() == 0:
        return 0.0
    # Much slower against the memory order.
    low, high = torch.aminmax(tensor if tensor.is_contiguous() or not is_column_major(tensor) else tensor.t())
    return max(-low.item(), high.item())


def is_column_major(weight: Tensor) -> bool:
    """Whether a canonical weight is the transposed view of a contiguous array."""
    # Most are contiguous, and one question is enough for those.
    return weight.ndim == 2 and not weight.is_contiguous() and weight.stride(0) < weight.stride(1)


def accumulation_dtype(weight: Tensor) -> torch.dtype:
    """The dtype in which a weight is merged: float32, or float64 for a float64 weight."""
    return torch.promote_types(weight.dtype, torch.float32)


def is_finite(tensor: Tensor) -> bool:
    """Whether no element of a floating-point tensor is NaN or infinite."""
    # One that is makes the sum so; only a sum that overflows by itself needs the closer look. Half precision is summed
    # in float32 all the same; asking for a result in float32 would convert all elements first.
    return math.isfinite(tensor.sum().item()) or bool(tensor.isfinite().all())


def agree(one: Tensor, other: Tensor) -> Tensor:
    """Where two tensors hold the same values, each rounded to its own dtype; NaN is equal to NaN.

    Neither half precision holds the other's values, so between the two half a unit in the last place of each is allowed.
    """
    if {one.dtype, other.dtype} == {torch.float16, torch.bfloat16}:
        a, b = one.float(), other.float()
        same = (a == b) | ((a - b).abs() <= _half_unit(a, one.dtype) + _half_unit(b, other.dtype))
    else:
        narrow = min(one.dtype, other.dtype, key=lambda dtype: dtype.itemsize)
        a, b = one.to(narrow), other.to(narrow)
        same = a == b
    return same | ((a != a) & (b != b))


def _half_unit(values: Tensor, dtype: torch.dtype) -> Tensor:
    """At least half of what the last place of these values counts in a dtype."""
    info = torch.finfo(dtype)
    return values.abs().clamp(min=info.smallest_normal) * (info.eps / 2)


def is_divided(tensor: Tensor) -> bool:
    """Whether each process has a part of this tensor (DTensor)."""
    return hasattr(tensor, "full_tensor")


def is_flat_part(tensor: Tensor) -> bool:
    """Whether a part of a parameter, or nothing, is left in its place, as the first FSDP and DeepSpeed's ZeRO-3 do."""
    # The first FSDP marks it (torch/distributed/fsdp/_common_utils.py, 2.13).
    return tensor.ndim == 1 and (len(tensor) == 0 or getattr(tensor, "_fsdp_flattened", False))


def is_in_parts(tensor: Tensor) -> bool:
    """Whether this process has not all of a parameter, as with FSDP2, the first FSDP and DeepSpeed's ZeRO-3."""
    return is_flat_part(tensor) or is_divided(tensor)


def concatenated(pieces: Sequence[Tensor], dim: int = 0) -> Tensor:
    """``torch.cat``, which under autocast refuses pieces in another half precision than autocast's."""
    device = pieces[0].device.type
    if not (is_autocast_available(device) and torch.is_autocast_enabled(device)):  # meta tensors know none
        return torch.cat(list(pieces), dim)
    with torch.autocast(device, enabled=False):
        return torch.cat(list(pieces), dim)


def whole(tensor: Tensor) -> Tensor:
    """A tensor without its gradient; of one that is sharded over processes (DTensor), all of it on each of them."""
    gather = getattr(tensor, "full_tensor", None)
    full: Tensor = tensor if gather is None else gather()
    return full.detach()


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in nested tuples, lists and mappings."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, tuple | list):
        return []
    return [tensor for item in value for tensor in tensors_in(item)]
