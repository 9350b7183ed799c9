"""LoRA: low-rank updates of frozen linear maps (Hu et al., 2021, arXiv:2106.09685)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from minipeft.config import AdapterConfig, flag, integer, names, number, one_of, pattern_table
from minipeft.errors import StateError
from minipeft.functional import is_column_major, lora_delta, lora_factors, lora_scaling, stacked_delta
from minipeft.fused import can_fuse, lora_linear
from minipeft.layers.base import LayerOps
from minipeft.methods.base import Adapter
from minipeft.patterns import first_keys
from minipeft.registry import register_method

MAX_RANK = 2**16
INITIALISATIONS = (True, False, "gaussian")


@dataclass(frozen=True, kw_only=True)
class LoraConfig(AdapterConfig):
    """LoRA's options, on top of `AdapterConfig`'s; names, meanings and defaults are PEFT's.

    Args:
        r: rank of the update.
        lora_alpha: the update is scaled by ``lora_alpha / r`` (`use_rslora`: ``/ sqrt(r)``, arXiv:2312.03732).
        lora_dropout: probability of dropping an input feature on its way into A, in training; for an embedding, whose
            input is one-hot, of dropping a token's update.
        bias: "none"; "lora_only" trains the biases of adapted layers; "all" those of every other module too. They are
            trained copies, so switching the adapter off restores the base exactly.
        rank_pattern, alpha_pattern: regular expression -> value, for the whole module name or a dotted suffix of it.
        init_lora_weights: True: A Kaiming-uniform, B zero (an embedding: A zero, B normal). "gaussian": A normal with
            standard deviation 1/r, B zero. False: B random too, so the model differs from the base at once (for tests).
        target_parameters: suffixes of the names of bare parameters to adapt beside `target_modules` (which may then be
            empty): of shape (out, in), (experts, out, in) or, in a module that says `is_transposed`, (experts, in, out).
            `exclude_modules` and `layers_to_transform` do not concern them.
        fan_in_fan_out: accepted for PEFT's sake and ignored, since the layer knows its own orientation.
    """

    method: ClassVar[str] = "lora"

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    bias: str = "none"
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    init_lora_weights: bool | str = True
    target_parameters: Sequence[str] | None = None
    fan_in_fan_out: bool = False

    def __post_init__(self) -> None:
        self._set("target_parameters", names("target_parameters", self.target_parameters or None))
        super().__post_init__()
        _rank("r", self.r)
        _alpha("lora_alpha", self.lora_alpha)
        number("lora_dropout", self.lora_dropout, at_least=0, below=1)
        one_of("bias", self.bias, ("none", "all", "lora_only"))
        flag("use_rslora", self.use_rslora)
        self._set("rank_pattern", pattern_table("rank_pattern", self.rank_pattern, _rank))
        self._set("alpha_pattern", pattern_table("alpha_pattern", self.alpha_pattern, _alpha))
        one_of("init_lora_weights", self.init_lora_weights, INITIALISATIONS)
        flag("fan_in_fan_out", self.fan_in_fan_out)

    @property
    def scaling(self) -> float:
        """Factor of the update, dimensionless."""
        return lora_scaling(self.r, self.lora_alpha, self.use_rslora)

    @property
    def trains_all_biases(self) -> bool:
        return self.bias == "all"

    @property
    def parameters_to_adapt(self) -> Sequence[str]:
        return self.target_parameters or ()

    def needs_a_call(self) -> list[str]:
        used = (("lora_dropout", self.lora_dropout > 0), ("bias", self.bias != "none"))
        return [f"{option} = {getattr(self, option)!r}" for option, is_set in used if is_set]

    def for_modules(self, names: Sequence[str]) -> dict[str, Self]:
        ranks, alphas = self._deciding_keys(names)
        resolved: dict[tuple[str | None, str | None], Self] = {}
        for keys in {(ranks.get(name), alphas.get(name)) for name in names}:
            r = self.r if keys[0] is None else self.rank_pattern[keys[0]]
            lora_alpha = self.lora_alpha if keys[1] is None else self.alpha_pattern[keys[1]]
            resolved[keys] = replace(self, r=r, lora_alpha=lora_alpha, rank_pattern={}, alpha_pattern={})
        return {name: resolved[ranks.get(name), alphas.get(name)] for name in names}

    def unused_options(self, names: Sequence[str]) -> list[str]:
        ranks, alphas = (set(keys.values()) for keys in self._deciding_keys(names))
        unused = [f"rank_pattern: {key}" for key in self.rank_pattern if key not in ranks]
        return unused + [f"alpha_pattern: {key}" for key in self.alpha_pattern if key not in alphas]

    def _deciding_keys(self, names: Sequence[str]) -> tuple[dict[str, str], dict[str, str]]:
        return first_keys(self.rank_pattern, names, "rank_pattern"), first_keys(
            self.alpha_pattern, names, "alpha_pattern"
        )


def _rank(name: str, value: object) -> int:
    return integer(name, value, at_least=1, at_most=MAX_RANK)


def _alpha(name: str, value: object) -> float:
    return number(name, value, above=0)


@register_method("lora")
class Lora(Adapter):
    """y = W x + b + scaling * B A dropout(x), eq. (3) of arXiv:2106.09685.

    `lora_A` is (r, in), `lora_B` (out, r), whatever the layer stores; `lora_bias` (out,) replaces b, if trained. Where the
    layer says so (a convolution, say), they have more dimensions, or hold the factors of several maps.
    They are created in the dtype and on the device of the base weight; the injection raises half precision to float32.
    """

    config_class = LoraConfig
    runs_base = True
    original_bias: Tensor | None

    def __init__(self, base: nn.Module, ops: type[LayerOps], config: LoraConfig, shared: object | None) -> None:
        super().__init__(base, ops, config, shared)
        weight, bias = ops.read_weight(base), ops.read_bias(base)
        self.is_lookup, self.maps = ops.is_lookup, ops.maps(base)
        self.scaling = config.scaling
        self.dropout = config.lora_dropout
        self.lora_A = nn.Parameter(weight.new_empty(ops.down_shape(base, config.r)))
        self.lora_B = nn.Parameter(weight.new_empty(ops.up_shape(base, config.r)))
        start = bias.detach() if config.bias != "none" and bias is not None else None
        self.lora_bias = None if start is None else nn.Parameter(start.clone())
        # Kept, since another adapter may be merged into the base's own later.
        self.register_buffer("original_bias", None if start is None else start.clone(), persistent=False)
        self.reset_parameters(config.init_lora_weights)

    @torch.no_grad()
    def reset_parameters(self, init_lora_weights: bool | str) -> None:
        """Draw the starting values; all but False start with ``B A = 0``."""
        if self.is_lookup:  # as PEFT: what is looked up starts at zero, and B is what the zeros are multiplied by
            self.lora_A.normal_() if init_lora_weights is False else self.lora_A.zero_()
            self.lora_B.normal_()
            return
        if init_lora_weights == "gaussian":
            self.lora_A.normal_(std=1 / len(self.lora_A))
        else:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        if init_lora_weights is False:
            nn.init.kaiming_uniform_(self.lora_B, a=math.sqrt(5))
        else:
            self.lora_B.zero_()

    def forward(self, base: nn.Module, ops: type[LayerOps], x: Tensor, y: Tensor | None) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        if y is None and ops.is_linear_call(base):
            weight, bias = ops.read_weight(base), ops.read_bias(base)
            if can_fuse(x, weight, bias):
                y = lora_linear(x, weight, bias, self.lora_A, self.lora_B, self.scaling, dropout)
                return self._with_bias(base, ops, y)
        if y is None:
            y = ops.run(base, x)
        assert isinstance(y, Tensor)
        # The factors follow the activations' dtype, never the other way round: no copy of x is made or kept.
        dtype = y.dtype if self.is_lookup else x.dtype
        if dropout and ops.reads:
            raise StateError(
                f"lora_dropout cannot act on {ops.reads} of {type(base).__name__}, which is read and not called; train with 0."
            )
        if dropout and not self.is_lookup:
            x = F.dropout(x, dropout)
        h = ops.project_in(base, x, self.lora_A.to(dtype)) * self.scaling
        if dropout and self.is_lookup:
            h = h * F.dropout(h.new_ones(*h.shape[:-1], 1), dropout)
        return self._with_bias(base, ops, y + ops.project_out(base, h, self.lora_B.to(dtype)).to(y.dtype))

    def _with_bias(self, base: nn.Module, ops: type[LayerOps], y: Tensor) -> Tensor:
        bias_update = self._bias_update()
        return y if bias_update is None else y + ops.along_out(base, bias_update.to(y.dtype), y.ndim)

    def _bias_update(self) -> Tensor | None:
        return None if self.lora_bias is None or self.original_bias is None else self.lora_bias - self.original_bias

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        bias_update = self._bias_update()
        if bias is not None and bias_update is not None:
            bias = bias + bias_update.detach().to(bias.dtype)
        return weight + self.delta(weight).to(weight.dtype), bias

    def factors(self) -> tuple[Tensor, Tensor] | None:
        if (
            self.lora_bias is not None or self.maps > 1
        ):  # the merge changes more than the weight; one product is not all
            return None
        return lora_factors(*self._matrices(), self.scaling)

    def delta(self, weight: Tensor) -> Tensor:
        if self.maps > 1:
            return stacked_delta(*self._matrices(), self.scaling, self.maps)
        return lora_delta(*self._matrices(), self.scaling, column_major=is_column_major(weight))

    def _matrices(self) -> tuple[Tensor, Tensor]:
        return self.lora_A.detach().flatten(1), self.lora_B.detach().flatten(1)

    def changes_nothing(self) -> bool:
        bias_update = self._bias_update()
        return not (self.lora_A.any() and self.lora_B.any()) and (bias_update is None or not bias_update.any())

    def file_tensors(self) -> dict[str, Tensor]:
        if self.is_lookup:
            return {"lora_embedding_A": self.lora_A, "lora_embedding_B": self.lora_B}
        tensors: dict[str, Tensor] = {"lora_A.weight": self.lora_A, "lora_B.weight": self.lora_B}
        if self.lora_bias is not None:
            tensors["base_layer.bias"] = self.lora_bias
        return tensors
