"""Weighted sums of whole tensors, with values left out: magnitude pruning, DARE and TIES.

TIES: Yadav et al., 2023, arXiv:2306.01708. DARE: Yu et al., 2023, arXiv:2311.03099. What is left out, and the order in
which random numbers are drawn, are as in PEFT's ``merge_utils``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

PRUNED = {"ties": "magnitude", "magnitude_prune": "magnitude", "dare_linear": "random", "dare_ties": "random"}
ELECTS = frozenset({"ties", "dare_ties"})


def weighted_sum(
    tensors: Sequence[Tensor], weights: Sequence[float], scheme: str, density: float | None, majority: str
) -> Tensor:
    """``sum_i w_i t_i``, in which each t_i may lose values, and each element those of the sign that loses an election.

    Args:
        tensors: of one shape.
        weights: one each.
        scheme: a key of `PRUNED`; "linear" is the plain sum.
        density: share of the values that each tensor keeps.
        majority: which sign wins, see `elected`.
    """
    kept = [_pruned(tensor, PRUNED.get(scheme, ""), density) for tensor in tensors]
    voters = elected(kept, majority) if scheme in ELECTS else None
    total = torch.zeros_like(kept[0])
    for place, (tensor, weight) in enumerate(zip(kept, weights, strict=True)):
        part = tensor * weight
        total += part if voters is None else part * voters[place]
    return total if voters is None else total / sum(voters).clamp(min=1)  # type: ignore[union-attr]


def elected(tensors: Sequence[Tensor], majority: str) -> list[Tensor]:
    """For each tensor where its sign is the winning one, as booleans: eq. (2) of TIES.

    "total": the sign of the sum of all values wins; "frequency": the sign that more of them have. A draw is for plus.
    """
    votes = tensors if majority == "total" else [tensor.sign() for tensor in tensors]
    total = torch.zeros_like(tensors[0])
    for vote in votes:
        total += vote
    winner = torch.where(total >= 0, 1.0, -1.0).to(total.dtype)
    return [tensor.sign() == winner for tensor in tensors]


def _pruned(tensor: Tensor, how: str, density: float | None) -> Tensor:
    if not how or density is None or density >= 1:
        return tensor
    if how == "random":
        return tensor * torch.bernoulli(torch.full_like(tensor, density)) / density
    largest = tensor.abs().flatten().topk(int(density * tensor.numel())).indices
    mask = torch.zeros(tensor.numel(), dtype=torch.bool, device=tensor.device)
    mask[largest] = True
    return tensor * mask.view(tensor.shape)
