"""OFT: blocks of the input are rotated (Qiu et al., 2023, arXiv:2306.07280; Cayley-Neumann: arXiv:2506.19847)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from minipeft.config.adapter_config import AdapterConfig
from minipeft.config.options import integer, number, one_of
from minipeft.errors import ConfigError, TargetError
from minipeft.layers.base import LayerOps, takes_vectors
from minipeft.methods.base import Adapter
from minipeft.registry.registry import register_method


@dataclass(frozen=True, kw_only=True)
class OFTConfig(AdapterConfig):
    """OFT's options, on top of `AdapterConfig`'s; names, meanings and defaults are PEFT's.

    Args:
        oft_block_size: size of the blocks; if it does not divide a layer's size, the nearest divisor.
        r: number of blocks, instead of their size, with ``oft_block_size=0``; likewise rounded to a divisor.
        module_dropout: share of the blocks that are left unrotated in a call, in training. (PEFT ignores it.)
        coft: keep every rotation small: its generator within `eps` of zero.
        eps: see `coft`.
        block_share: one rotation for all blocks of a layer.
        use_cayley_neumann: a series instead of the exact inverse.
        num_cayley_neumann_terms: length of the series.
        init_weights: True: no rotation. False: random ones, so the model differs from the base at once (for tests).
        bias, fan_in_fan_out: accepted for compatibility with PEFT: "none" only, and ignored.
    """

    method: ClassVar[str] = "oft"
    null_in_files = frozenset({"module_dropout", "eps"})

    r: int = 0
    oft_block_size: int = 32
    module_dropout: float = 0.0
    coft: bool = False
    eps: float = 6e-5
    block_share: bool = False
    use_cayley_neumann: bool = True
    num_cayley_neumann_terms: int = 5
    init_weights: bool = True
    bias: str = "none"
    fan_in_fan_out: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        integer("r", self.r, at_least=0)
        integer("oft_block_size", self.oft_block_size, at_least=0)
        if (self.r == 0) == (self.oft_block_size == 0):
            raise ConfigError(
                f"give r = {self.r} or oft_block_size = {self.oft_block_size} and the other as 0, since their product is "
                "the layer's size."
            )
        number("module_dropout", self.module_dropout, at_least=0, below=1)
        number("eps", self.eps, above=0)
        integer("num_cayley_neumann_terms", self.num_cayley_neumann_terms, at_least=2, at_most=1000)
        one_of("bias", self.bias, ("none",))

    def block_size(self, size: int) -> int:
        """Size of the blocks of a layer of that size."""
        return size // _divisor(size, self.r) if self.r else _divisor(size, self.oft_block_size)


def _divisor(size: int, wanted: int) -> int:
    """The divisor of `size` nearest to `wanted`, the smaller of two."""
    wanted = min(wanted, size)
    below = next(n for n in range(wanted, 0, -1) if size % n == 0)
    above = next(n for n in range(wanted, size + 1) if size % n == 0)
    return below if wanted - below <= above - wanted else above


@register_method("oft")
class OFT(Adapter):
    """y = W R x + b, R block-diagonal, its blocks (I + Q)(I - Q)^-1 for skew Q: eqs. (2) and (6) of arXiv:2306.07280.

    `oft_R.weight` is (blocks, k (k - 1) / 2), the upper triangles of the transposed Q of size k. For an embedding, whose
    input is not a vector, the output is rotated, as in PEFT: y = R^T W x, with `oft_embedding_R.weight`.
    """

    config_class = OFTConfig

    def __init__(self, base: nn.Module, ops: LayerOps, config: OFTConfig, shared: object | None) -> None:
        super().__init__(base, ops, config, shared)
        if not ops.is_embedding and not takes_vectors(ops):
            raise TargetError(f"OFT rotates vectors, which {type(base).__name__} does not take.")
        self.config, self.is_embedding = config, ops.is_embedding
        self.size = ops.shape(base)[0 if ops.is_embedding else 1]
        self.block = config.block_size(self.size)
        blocks = 1 if config.block_share else self.size // self.block
        self.weight = nn.Parameter(ops.read_weight(base).new_zeros(blocks, self.block * (self.block - 1) // 2))
        if not config.init_weights:
            nn.init.normal_(self.weight, std=0.1)

    def _skew(self, upper: Tensor) -> Tensor:
        """The generators, shape (blocks, k, k), from their upper triangles."""
        rows, columns = torch.triu_indices(self.block, self.block, 1, device=upper.device)
        which = torch.arange(len(upper), device=upper.device).unsqueeze(1)
        half = upper.new_zeros(len(upper), self.block, self.block).index_put((which, rows, columns), upper)
        return half - half.transpose(1, 2)

    def _constrained(self, upper: Tensor) -> Tensor:
        """The triangles within the ball of radius eps. The gradient passes unchanged, and training moves the parameter itself."""
        with torch.no_grad():
            norms = torch.linalg.matrix_norm(self._skew(upper), keepdim=True).squeeze(2)
            most = self.config.eps / len(upper) ** 0.5
            slack = 1 + 8 * torch.finfo(norms.dtype).eps  # a value that was moved in before stays the same, bit for bit
            inside = upper * torch.where(norms <= most * slack, 1.0, most / norms)
            if self.training and upper.requires_grad:  # as in PEFT, where the next step starts from there
                self.weight.copy_(inside)
        return upper + (inside - upper).detach()

    def rotations(self, *, dropped: bool = False) -> Tensor:
        """The blocks by which vectors are multiplied from the right, shape (size / k, k, k), in float32 or float64.

        With `dropped`, some of them are the identity in training, by `module_dropout`.
        """
        upper = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))
        Q = self._skew(self._constrained(upper) if self.config.coft else upper)
        one = torch.eye(self.block, dtype=Q.dtype, device=Q.device)
        if self.config.use_cayley_neumann:
            R = _series(one, Q, self.config.num_cayley_neumann_terms)
        else:
            # I + Q can always be inverted; `solve` would wait for a GPU to say so.
            R = torch.linalg.solve_ex(one + Q, one - Q, left=False).result
        if dropped and self.training and self.config.module_dropout and len(R) > 1:
            still = torch.randperm(len(R), device=R.device) < int(self.config.module_dropout * len(R))
            R = torch.where(still.view(-1, 1, 1), one, R)
        return R.expand(self.size // self.block, -1, -1)

    def _rotated(self, x: Tensor) -> Tensor:
        R = self.rotations(dropped=True).to(x.dtype)
        rows = x.reshape(-1, len(R), self.block).transpose(0, 1)
        return torch.bmm(rows, R).transpose(0, 1).reshape(x.shape).to(x.dtype)

    def before(self, base: nn.Module, ops: LayerOps, x: Tensor) -> Tensor:
        return x if self.is_embedding else self._rotated(x)

    def forward(self, base: nn.Module, ops: LayerOps, x: Tensor, y: Any) -> Tensor:
        return self._rotated(y) if self.is_embedding else y

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        R, (out, into) = self.rotations().to(weight.dtype), weight.shape
        if self.is_embedding:
            return torch.bmm(R.transpose(1, 2), weight.reshape(len(R), self.block, into)).reshape(out, into), bias
        blocks = weight.reshape(out, len(R), self.block).transpose(0, 1)
        return torch.bmm(blocks, R.transpose(1, 2)).transpose(0, 1).reshape(out, into), bias

    def file_tensors(self) -> dict[str, Tensor]:
        return {f"oft_{'embedding_' if self.is_embedding else ''}R.weight": self.weight}


def _series(one: Tensor, Q: Tensor, terms: int) -> Tensor:
    """``I + 2 Q + 2 Q^2 + ... + Q^n`` up to n = max(3, terms - 1), and ``I + 2 Q`` for two terms, as in PEFT."""
    R, power = one + 2 * Q, Q
    last = max(3, terms - 1) if terms > 2 else 1
    for exponent in range(2, last + 1):
        power = torch.bmm(power, Q)
        R = R + (power if exponent == last else 2 * power)
    return R
