"""What LoHa and LoKr share (LyCORIS; Yeh et al., 2023, arXiv:2309.14859): options, and dropout of output rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from typing_extensions import Self

from minipeft.config import AdapterConfig, integer, number, one_of, pattern_table
from minipeft.layers.base import LayerOps
from minipeft.methods.base import Adapter
from minipeft.patterns import first_keys


@dataclass(frozen=True, kw_only=True)
class LycorisConfig(AdapterConfig):
    """Options of the LyCORIS methods, on top of `AdapterConfig`'s; names, meanings and defaults are PEFT's.

    Args:
        r: rank of each factor pair.
        alpha: the update is scaled by ``alpha / r``.
        rank_dropout: probability of dropping an output feature of the update, for the whole batch, in training.
        module_dropout: probability of dropping a layer's update, for the whole batch, in training.
        rank_pattern, alpha_pattern: regular expression -> value, for the whole module name or a dotted suffix of it.
        use_effective_conv2d: False only.
    """

    r: int = 8
    alpha: float = 8
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_effective_conv2d: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _rank("r", self.r)
        _alpha("alpha", self.alpha)
        number("rank_dropout", self.rank_dropout, at_least=0, below=1)
        number("module_dropout", self.module_dropout, at_least=0, below=1)
        self._set("rank_pattern", pattern_table("rank_pattern", self.rank_pattern or {}, _rank))
        self._set("alpha_pattern", pattern_table("alpha_pattern", self.alpha_pattern or {}, _alpha))
        one_of("use_effective_conv2d", self.use_effective_conv2d, (False,))

    def for_modules(self, names: Sequence[str]) -> dict[str, Self]:
        ranks = first_keys(self.rank_pattern, names, "rank_pattern")
        alphas = first_keys(self.alpha_pattern, names, "alpha_pattern")
        resolved = {}
        for name in names:
            r = self.rank_pattern[ranks[name]] if name in ranks else self.r
            alpha = self.alpha_pattern[alphas[name]] if name in alphas else self.alpha
            resolved[name] = replace(self, r=r, alpha=alpha, rank_pattern={}, alpha_pattern={})
        return resolved

    def unused_options(self, names: Sequence[str]) -> list[str]:
        tables = {"rank_pattern": self.rank_pattern, "alpha_pattern": self.alpha_pattern}
        used = {option: set(first_keys(table, names, option).values()) for option, table in tables.items()}
        return [f"{option}: {key}" for option, table in tables.items() for key in table if key not in used[option]]


def _rank(name: str, value: object) -> int:
    return integer(name, value, at_least=1, at_most=2**16)


def _alpha(name: str, value: object) -> float:
    return number(name, value, above=0)


class Lycoris(Adapter):
    """An additive update ``alpha / r * D`` of the weight, whose rows may be dropped in training.

    Args:
        base, ops, config, shared: see `Adapter`.
        rescales: whether the rows that pass are raised by what dropping takes from their mean.
    """

    def __init__(
        self, base: nn.Module, ops: LayerOps, config: LycorisConfig, shared: object | None, rescales: bool
    ) -> None:
        super().__init__(base, ops, config, shared)
        self.out_features, self.in_features = ops.shape(base)
        self.scaling = config.alpha / config.r
        self.rank_dropout, self.module_dropout, self.rescales = config.rank_dropout, config.module_dropout, rescales

    def passes(self, like: Tensor) -> Tensor | None:
        """Factors of the update's rows in this call, shape (out,), or None where all pass."""
        if not self.training or not (self.rank_dropout or self.module_dropout):
            return None
        # A product instead of a branch, so that there is one compiled graph.
        passes = (torch.rand(self.out_features, device=like.device) >= self.rank_dropout).to(like.dtype)
        if self.rank_dropout and self.rescales:
            passes = passes / passes.mean().clamp_min(1 / self.out_features)  # if none passes, nothing is divided by 0
        return passes * (torch.rand(1, device=like.device) >= self.module_dropout).to(like.dtype)

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        update = self.delta(weight)
        assert update is not None
        return weight + update.to(weight.dtype), bias
