"""Maths of low-rank products, by QR of their factors: no array is as large as the product, (out, in)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Factors = tuple[Tensor, Tensor]


def joined(pairs: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """The factors of ``sum_i w_i up_i down_i``, exactly: one next to the other.

    Args:
        pairs: (up, down) of each product, shapes (..., out, r_i) and (..., r_i, in).
        weights: w_i.

    Returns:
        Shapes (..., out, r) and (..., r, in), r the sum of all r_i.
    """
    down = [weight * down for (_, down), weight in zip(pairs, weights, strict=True)]
    return torch.cat([up for up, _ in pairs], -1), torch.cat(down, -2)


def product_norm(pairs: Sequence[Factors], weights: Sequence[float]) -> float:
    """Frobenius norm of ``sum_i w_i up_i down_i``, also if the products nearly cancel: ``|Q1 R1 (Q2 R2)^T| = |R1 R2^T|``."""
    up, down = joined(pairs, weights)
    left, right = torch.linalg.qr(up, "r").R, torch.linalg.qr(down.mT, "r").R
    return float(torch.linalg.vector_norm(left @ right.mT))


def truncated(up: Tensor, down: Tensor, rank: int, driver: str | None = None) -> Factors:
    """The product of this rank that is nearest to ``up @ down`` (Eckart and Young, 1936), as (U S, V^T).

    Args:
        up: shape (..., out, r).
        down: shape (..., r, in).
        rank: of the result; less if the product has less.
        driver: of ``torch.linalg.svd``, on CUDA only.
    """
    Q, R = torch.linalg.qr(up)
    P, S = torch.linalg.qr(down.mT)
    left, right = truncated_matrix(R @ S.mT, rank, driver)
    return Q @ left, right @ P.mT


def truncated_matrix(matrix: Tensor, rank: int, driver: str | None = None) -> Factors:
    """As `truncated`, for a dense matrix, shape (..., out, in)."""
    U, s, Vh = torch.linalg.svd(matrix, full_matrices=False, driver=driver)
    return U[..., :rank] * s[..., None, :rank], Vh[..., :rank, :]


def padded(up: Tensor, down: Tensor, rank: int) -> Factors:
    """The same product with this rank: more factors, of zeros."""
    more = rank - down.shape[-2]
    if more == 0:
        return up, down
    return torch.nn.functional.pad(up, (0, more)), torch.nn.functional.pad(down, (0, 0, 0, more))


def clamped(up: Tensor, down: Tensor, quantile: float) -> Factors:
    """Both factors with their values limited to plus or minus this quantile of all of them, as PEFT and kohya do it."""
    ordered = torch.cat([up.flatten(), down.flatten()]).sort().values  # torch.quantile takes 16 million values at most
    place = quantile * (len(ordered) - 1)
    below = int(place)
    limit = float(torch.lerp(ordered[below], ordered[min(below + 1, len(ordered) - 1)], place - below))
    return up.clamp(-limit, limit), down.clamp(-limit, limit)
