"""Starting factors of a low-rank update B A that are more than noise and zeros.

The first three are parts of the weight itself; whoever starts from them takes their product off the weight, so that
the sum is the weight still. All are computed in float32, or float64 for a float64 weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minipeft.errors import ConfigError
from minipeft.kernels.functional import accumulation_dtype

Factors = tuple[Tensor, Tensor]  # A (r, in) and B (out, r)


def pissa_factors(weight: Tensor, r: int, scaling: float, iterations: int | None = None) -> Factors:
    """The r principal components of the weight, ``scaling * B A = U_r S_r V_r`` (Meng et al., 2024, arXiv:2404.02948).

    The square root of the singular values goes to either factor, eqs. (2) and (3).

    Args:
        weight: shape (out, in).
        r: rank.
        scaling: of the update, dimensionless.
        iterations: None: the exact decomposition. Else that many power iterations of a randomised one, which is far
            faster, and draws from torch's generator.

    Raises:
        ConfigError: r exceeds what the weight has.
    """
    weight = _of_rank(weight, r)
    if iterations is None:
        U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    else:
        U, S, V = torch.svd_lowrank(weight, r, niter=iterations)
        Vh = V.t()
    roots = (S[:r] / scaling).sqrt()
    return roots.unsqueeze(1) * Vh[:r], U[:, :r] * roots


def olora_factors(weight: Tensor, r: int) -> Factors:
    """The first r of ``W = Q R``: ``B = Q[:, :r]``, orthonormal, and ``A = R[:r]`` (Buyukakyuz, 2024, arXiv:2406.01775).

    Args and errors are those of `pissa_factors`.
    """
    Q, R = torch.linalg.qr(_of_rank(weight, r))
    return R[:r], Q[:, :r]


def orthogonal_factors(weight: Tensor, r: int) -> Factors:
    """Factors with ``B A = 0`` of which neither is zero: through the even and the odd rows of one orthogonal matrix.

    https://datta0.github.io/posts/rethink-lora-init/#orthogonal-initialisation

    Raises:
        ConfigError: r is odd.
    """
    if r % 2:
        raise ConfigError(f"init_lora_weights='orthogonal' splits the rank in two, and r = {r} is odd.")
    out_features, in_features = weight.shape
    options = {"dtype": accumulation_dtype(weight), "device": weight.device}
    Q, _ = torch.linalg.qr(torch.randn(r, r, **options))  # type: ignore[call-overload]
    A = Q[0::2].t() @ torch.randn(in_features, r // 2, **options).t()  # type: ignore[call-overload]
    B = torch.randn(r // 2, out_features, **options).t() @ Q[1::2]  # type: ignore[call-overload]
    return A / 10, B / 10


def _of_rank(weight: Tensor, r: int) -> Tensor:
    if r > min(weight.shape):
        raise ConfigError(
            f"r = {r} exceeds the rank of a weight of shape {tuple(weight.shape)}, whose parts init_lora_weights asks for. "
            "Lower r, by rank_pattern for single modules."
        )
    return weight.detach().to(accumulation_dtype(weight))
