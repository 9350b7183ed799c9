"""What LoHa and LoKr share (LyCORIS; Yeh et al., 2023, arXiv:2309.14859): options, Tucker cores, dropout of output rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from minipeft.config.adapter_config import AdapterConfig
from minipeft.config.options import alpha, number, pattern_table, rank
from minipeft.layers.base import LayerOps
from minipeft.methods.base import Adapter


@dataclass(frozen=True, kw_only=True)
class LycorisConfig(AdapterConfig):
    """Options of the LyCORIS methods, on top of `AdapterConfig`'s; names, meanings and defaults are PEFT's.

    Args:
        r: rank of each factor pair.
        alpha: the update is scaled by ``alpha / r``.
        rank_dropout: probability of dropping an output feature of the update, for the whole batch, in training.
        module_dropout: probability of dropping a layer's whole update, for the whole batch, in training.
        rank_pattern, alpha_pattern: regular expression -> value, for the whole module name or a dotted suffix of it.
        use_effective_conv2d: whether the kernel of a convolution larger than 1 gets a core of its own (Tucker), see
            `through_core`.
    """

    null_in_files = frozenset({"rank_dropout", "module_dropout"})
    pattern_options: ClassVar[Mapping[str, str]] = {"rank_pattern": "r", "alpha_pattern": "alpha"}

    r: int = 8
    alpha: float = 8
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_effective_conv2d: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        rank("r", self.r)
        alpha("alpha", self.alpha)
        number("rank_dropout", self.rank_dropout, at_least=0, below=1)
        number("module_dropout", self.module_dropout, at_least=0, below=1)
        for name, check in (("rank_pattern", rank), ("alpha_pattern", alpha)):
            given = getattr(self, name)
            self._set(name, pattern_table(name, {} if given is None else given, check))


def features_and_kernel(base: nn.Module, ops: LayerOps) -> tuple[int, tuple[int, ...]]:
    """How many input features a layer has, and the size of its kernel; () if it is not a convolution."""
    _, features, *kernel = ops.factor_shapes(base, 1)[0]
    return features, tuple(kernel)


def core_shape(config: LycorisConfig, kernel: tuple[int, ...]) -> tuple[int, ...] | None:
    """The shape of the core for such a kernel, as PEFT stores it; None: there is none."""
    if not config.use_effective_conv2d or all(size == 1 for size in kernel):
        return None
    return (config.r, config.r, *kernel, *(1,) * (len(kernel) == 1))


def through_core(core: Tensor, down: Tensor) -> Tensor:
    """The down projection (r, in * kernel) in Tucker's form: the core (r, r, *kernel) times `down` (r, in), per position."""
    return torch.einsum("ij...,jn->in...", core, down).flatten(1)


class Lycoris(Adapter):
    """An additive update ``alpha / r * D`` of the weight, whose rows may be dropped in training.

    Args:
        base, ops, config, shared: see `Adapter`.
        rescales: whether the remaining rows are scaled up to keep their mean.
    """

    scaling: float

    def __init__(
        self, base: nn.Module, ops: LayerOps, config: LycorisConfig, shared: object | None, rescales: bool
    ) -> None:
        super().__init__(base, ops, config, shared)
        self.out_features, self.in_features = ops.shape(base)
        self.scaling, self.rank = config.alpha / config.r, config.r
        self.rank_dropout, self.module_dropout, self.rescales = config.rank_dropout, config.module_dropout, rescales

    def passes(self, like: Tensor) -> Tensor | None:
        """Factors of the update's rows in this call, shape (out,); None: all are 1."""
        if not self.training or not (self.rank_dropout or self.module_dropout):
            return None
        # A product and not a branch, to compile into one graph.
        passes = (torch.rand(self.out_features, device=like.device) >= self.rank_dropout).to(like.dtype)
        if self.rank_dropout and self.rescales:
            passes = passes / passes.mean().clamp_min(1 / self.out_features)  # not 0 if all are dropped
        return passes * (torch.rand(1, device=like.device) >= self.module_dropout).to(like.dtype)
