"""Products with ``W + s L R`` for a frozen W, without making that sum: ``x (W + s L R) = x W + s (x L) R``.

By one matrix (`linear`), or by all matrices of a stack (`matmul`). Rows that each have a matrix of their own are in
`minipeft.kernels.low_rank_groups`. The backward pass keeps x and ``x L``, never anything of the size of W.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from minipeft.kernels import matmul as products
from minipeft.kernels.lora_linear import lora_linear
from minipeft.kernels.transformed import is_transformed

FEW = 2**24  # multiplications below which a node of our own costs more than it saves


@dataclass(frozen=True)
class LowRankSum:
    """``own + scaling * left @ right``, not computed; one matrix, or a stack of them.

    Args:
        own: frozen, shape (..., p, q).
        left: shape (..., p, r); cast to the dtype of what is multiplied.
        right: shape (..., r, q); likewise.
        scaling: dimensionless.
    """

    own: Tensor
    left: Tensor
    right: Tensor
    scaling: float

    @property
    def mT(self) -> LowRankSum:
        """With the last two dimensions swapped."""
        # Not by `Tensor.mT`, of which a compiler cannot make a `TracedWeight`.
        own, left, right = (part.transpose(-2, -1) for part in (self.own, self.left, self.right))
        return LowRankSum(own, right, left, self.scaling)

    @cached_property
    def matrices(self) -> tuple[LowRankSum, ...]:
        """`split`, done once; not for a compiler, which does not go past the lock of this cache."""
        return self.split()

    def split(self) -> tuple[LowRankSum, ...]:
        """The matrices of a stack. All at once: the gradient of a single index would be as large as the stack."""
        parts = zip(self.own.unbind(), self.left.unbind(), self.right.unbind(), strict=True)
        return tuple(LowRankSum(*part, self.scaling) for part in parts)

    @property
    def learns(self) -> bool:
        """Whether a product with it is to be differentiated."""
        return torch.is_grad_enabled() and (self.left.requires_grad or self.right.requires_grad)

    def to(self, dtype: torch.dtype) -> LowRankSum:
        """With W in another dtype. The factors follow what they multiply."""
        return LowRankSum(self.own.to(dtype), self.left, self.right, self.scaling)

    def picked(self, index: Tensor) -> LowRankSum:
        """The matrices of a stack with these indices, copied; shape of the index (n,)."""
        return LowRankSum(self.own[index], self.left[index], self.right[index], self.scaling)

    def formed(self) -> Tensor:
        """The sum itself, in the dtype of W."""
        dtype = self.own.dtype
        return self.own + (self.left.to(dtype) * self.scaling) @ self.right.to(dtype)


def linear(x: Tensor, weight: LowRankSum, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias`` for one matrix (q, p): x (..., p) -> (..., q)."""
    own, down, up = weight.own, weight.right, weight.left
    if not is_transformed() and (_is_much(x, own) or torch.is_autocast_enabled(x.device.type)):
        return lora_linear(x, own, bias, down, up, weight.scaling)
    h = F.linear(x, down.to(x.dtype))
    return torch.add(F.linear(x, own, bias), F.linear(h, up.to(x.dtype)), alpha=weight.scaling)


def _is_much(x: Tensor, own: Tensor) -> bool:
    return x.numel() * len(own) >= FEW or x.dtype is not own.dtype or products.through_float32(x, own)


def matmul(
    left: Tensor | LowRankSum, right: Tensor | LowRankSum, product: Callable[..., Tensor] = torch.matmul
) -> Tensor:
    """``product(left, right)``, one of them a sum; `product` is ``torch.matmul``, or one that is as associative."""
    if isinstance(right, LowRankSum):
        assert isinstance(left, Tensor)
        dtype = left.dtype
        added = product(product(left, right.left.to(dtype)), right.right.to(dtype))
        return torch.add(product(left, right.own), added, alpha=right.scaling)
    assert isinstance(left, LowRankSum)
    dtype = right.dtype
    added = product(left.left.to(dtype), product(left.right.to(dtype), right))
    return torch.add(product(left.own, right), added, alpha=left.scaling)
