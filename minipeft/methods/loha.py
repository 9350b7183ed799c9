"""LoHa: the Hadamard product of two low-rank matrices (FedPara; Hyeon-Woo et al., 2022, arXiv:2108.06098)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from minipeft.kernels.functional import lora_factors
from minipeft.layers.base import LayerOps
from minipeft.methods.low_rank import low_rank_forward
from minipeft.methods.lycoris import Lycoris, LycorisConfig, core_shape, features_and_kernel, through_core
from minipeft.registry.registry import register_method


@dataclass(frozen=True, kw_only=True)
class LoHaConfig(LycorisConfig):
    """LoHa's options, on top of `LycorisConfig`'s; names, meanings and defaults are PEFT's.

    Args:
        init_weights: True: three factors Kaiming-uniform, the last zero. False: all four random, so the model differs
            from the base at once (for tests).
    """

    method: ClassVar[str] = "loha"

    init_weights: bool = True


@register_method("loha")
class LoHa(Lycoris):
    """y = W x + b + alpha / r * ((A1 B1) o (A2 B2)) x, with o elementwise; proposition 1 of arXiv:2108.06098.

    A1 is `hada_w1_a` (out, r), B1 `hada_w1_b` (r, in), likewise for 2. The product is never formed: it is the product
    of the row-wise Kronecker products of the A, (out, r^2), and the column-wise ones of the B, (r^2, in).

    With a core `hada_t1` (r, r, *kernel), `hada_w1_a` is (r, out) and `hada_w1_b` (r, channels), and B1 is `through_core`.
    """

    config_class = LoHaConfig
    runs_base = True
    hada_w2_b: nn.Parameter

    def __init__(self, base: nn.Module, ops: LayerOps, config: LoHaConfig, shared: object | None) -> None:
        super().__init__(base, ops, config, shared, rescales=True)
        weight, (features, kernel) = ops.read_weight(base), features_and_kernel(base, ops)
        core = core_shape(config, kernel)
        up = (config.r, self.out_features) if core else (self.out_features, config.r)
        down = (config.r, features if core else self.in_features)
        for which in ("1", "2"):
            for name, shape in ((f"w{which}_a", up), (f"w{which}_b", down), (f"t{which}", core)):
                if shape is not None:
                    self.register_parameter(f"hada_{name}", nn.Parameter(weight.new_empty(shape)))
        for factor in self.parameters():
            nn.init.kaiming_uniform_(factor, a=math.sqrt(5))
        if config.init_weights:
            nn.init.zeros_(self.hada_w2_b)

    def _factors(self, which: str) -> tuple[Tensor, Tensor]:
        """(A, B) of one of the two matrices, shapes (out, r) and (r, in)."""
        up, down = getattr(self, f"hada_w{which}_a"), getattr(self, f"hada_w{which}_b")
        core = self._parameters.get(f"hada_t{which}")
        return (up, down) if core is None else (up.t(), through_core(core, down))

    def _pair(self) -> tuple[Tensor, Tensor]:
        """(up, down), shapes (out, r^2) and (r^2, in)."""
        (A1, B1), (A2, B2) = self._factors("1"), self._factors("2")
        return (A1.unsqueeze(2) * A2.unsqueeze(1)).flatten(1), (B1.unsqueeze(1) * B2.unsqueeze(0)).flatten(0, 1)

    def forward(self, base: nn.Module, ops: LayerOps, x: Tensor, y: Tensor | None) -> Tensor:
        up, down = self._pair()
        passes = self.passes(up)
        up = up if passes is None else passes.unsqueeze(1) * up
        return low_rank_forward(base, ops, x, y, down, up, self.scaling)

    def factors(self) -> tuple[Tensor, Tensor]:
        up, down = self._pair()
        return lora_factors(down, up, self.scaling)
