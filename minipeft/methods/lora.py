"""LoRA: low-rank updates of frozen linear maps (Hu et al., 2021, arXiv:2106.09685)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from minipeft.config import AdapterConfig
from minipeft.errors import ConfigError, MergeError, StateError
from minipeft.kernels.functional import is_column_major, lora_delta, lora_factors, lora_scaling, stacked_delta, whole
from minipeft.layers.base import LayerOps
from minipeft.layers.uncalled import UncalledOps
from minipeft.methods.base import Adapter
from minipeft.methods.lora_init import KEPT, Start, chosen_init
from minipeft.methods.low_rank import low_rank_forward
from minipeft.methods.trainable_tokens import token_option, tokens_beside
from minipeft.options import alpha, flag, names, number, one_of, pattern_table, rank
from minipeft.registry import register_method


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
        init_lora_weights: how the factors start, see `minipeft.methods.lora_init`. True, "gaussian" and "orthogonal" start
            with an update of zero. False does not (for tests). "pissa", "pissa_niter_N" and "olora" start from parts of
            the weight. The weight stays as it is: ``scaling * B_0 A_0`` is stored and subtracted from the update. A file
            that brings these starting factors along says "pissa_kept" and so on.
        lora_bias: B has a bias, which scaled is added to the layer's; only with `init_lora_weights` True or False.
        freeze_lora_A: train B alone (LoRA-FA, arXiv:2308.03303), so that only A x is kept of a layer's input for the
            backward pass. Files do not say it; there the adapter is plain LoRA.
        use_dora: DoRA (arXiv:2402.09353): train the length of each row of the weight separately from its direction.
        target_parameters: suffixes of the names of bare parameters to adapt besides `target_modules` (which may then be
            empty): of shape (out, in), (experts, out, in) or, in a module that says `is_transposed`, (experts, in, out).
            `exclude_modules` and `layers_to_transform` do not apply to them.
        trainable_token_indices: train the rows of these tokens as well, see `minipeft.methods.trainable_tokens`: ids for
            the input embedding, or a mapping from module names to ids. Layers tied to it follow.
        fan_in_fan_out: accepted for compatibility with PEFT and ignored: the layer knows its own orientation.
    """

    method: ClassVar[str] = "lora"
    pattern_options: ClassVar[Mapping[str, str]] = {"rank_pattern": "r", "alpha_pattern": "lora_alpha"}

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    bias: str = "none"
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    init_lora_weights: bool | str = True
    lora_bias: bool = False
    freeze_lora_A: bool = False
    use_dora: bool = False
    target_parameters: Sequence[str] | None = None
    trainable_token_indices: Sequence[int] | Mapping[str, Sequence[int]] | None = None
    fan_in_fan_out: bool = False

    def __post_init__(self) -> None:
        self._set("target_parameters", names("target_parameters", self.target_parameters or None))
        super().__post_init__()
        rank("r", self.r)
        alpha("lora_alpha", self.lora_alpha)
        number("lora_dropout", self.lora_dropout, at_least=0, below=1)
        one_of("bias", self.bias, ("none", "all", "lora_only"))
        self._set("rank_pattern", pattern_table("rank_pattern", self.rank_pattern, rank))
        self._set("alpha_pattern", pattern_table("alpha_pattern", self.alpha_pattern, alpha))
        chosen_init(self.init_lora_weights)
        for name in ("use_rslora", "freeze_lora_A", "use_dora", "lora_bias", "fan_in_fan_out"):
            flag(name, getattr(self, name))
        self._set("trainable_token_indices", token_option("trainable_token_indices", self.trainable_token_indices))
        if self.lora_bias and (self.use_dora or isinstance(self.init_lora_weights, str)):
            raise ConfigError("lora_bias goes with init_lora_weights True or False only, and not with use_dora.")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        config = super().from_dict(values)
        chosen = chosen_init(config.init_lora_weights)
        if chosen.init.of_weight and not chosen.kept:
            raise ConfigError(
                f"init_lora_weights {config.init_lora_weights!r} changes the base by factors that the file does not hold. "
                "Convert it to plain LoRA where it was made: in PEFT, "
                "save_pretrained(..., path_initial_model_for_weight_conversion=...)."
            )
        return config

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        del values["freeze_lora_A"]
        chosen = chosen_init(self.init_lora_weights)
        if chosen.init.of_weight and not chosen.kept:
            # Other readers would subtract factors that they compute themselves. This value they refuse.
            values["init_lora_weights"] = f"{self.init_lora_weights}{KEPT}"
        return values

    @property
    def adapter_method(self) -> str:
        return "dora" if self.use_dora else self.method

    @property
    def scaling(self) -> float:
        """Factor of the update, dimensionless."""
        return lora_scaling(self.r, self.lora_alpha, self.use_rslora)

    def companions(self) -> Sequence[tuple[str, AdapterConfig]]:
        return tokens_beside(self.trainable_token_indices)

    def needs_a_call(self) -> list[str]:
        used = {"lora_dropout": self.lora_dropout > 0, "bias": self.bias != "none"}
        used |= {"lora_bias": self.lora_bias, "use_dora": self.use_dora}
        return [f"{option} = {getattr(self, option)!r}" for option, is_set in used.items() if is_set]


@register_method("lora")
class Lora(Adapter):
    """y = W x + b + scaling * B A dropout(x), eq. (3) of arXiv:2106.09685.

    `lora_A` is (r, in), `lora_B` (out, r), whatever the layer stores; `lora_bias` (out,) replaces b, if trained. For some
    layers (convolutions, experts) they have more dimensions, or hold the factors of several matrices. They are created in
    the dtype and on the device of the base weight; the injection raises half precision to float32.
    """

    config_class = LoraConfig
    runs_base = True
    original_bias: Tensor | None  # kept, since another adapter may be merged into the layer's bias later
    initial_A: Tensor | None
    initial_B: Tensor | None

    def __init__(self, base: nn.Module, ops: LayerOps, config: LoraConfig, shared: object | None) -> None:
        super().__init__(base, ops, config, shared)
        weight, bias = ops.read_weight(base), ops.read_bias(base)
        shape_A, shape_B = ops.factor_shapes(base, config.r)
        self.is_embedding, self.num_experts = ops.is_embedding, shape_A[0] // config.r
        self.scaling, self.dropout = config.scaling, config.lora_dropout
        init = chosen_init(config.init_lora_weights).init
        self.starts_from_weight = init.of_weight
        if ops.is_embedding and config.freeze_lora_A:
            raise ConfigError(
                f"freeze_lora_A on {type(base).__name__}: its lora_A starts at zero, so nothing would ever be learned."
            )
        if ops.is_embedding and config.lora_bias:
            raise ConfigError(f"lora_bias is not for {type(base).__name__}, which has no bias.")
        if init.one_matrix and self.num_experts > 1:
            raise ConfigError(
                f"init_lora_weights {config.init_lora_weights!r} is for one matrix, and {type(base).__name__} has "
                f"{self.num_experts} in one parameter. Use True or 'gaussian' there."
            )
        self.lora_A = nn.Parameter(weight.new_empty(shape_A), not config.freeze_lora_A)
        self.lora_B = nn.Parameter(weight.new_empty(shape_B))
        self.lora_B_bias = nn.Parameter(weight.new_zeros(ops.shape(base)[0])) if config.lora_bias else None
        start = bias.detach() if config.bias != "none" and bias is not None else None
        self.lora_bias = None if start is None else nn.Parameter(start.clone())
        self.register_buffer("original_bias", None if start is None else start.clone(), persistent=False)
        self.trains_bias = self.lora_bias is not None or self.lora_B_bias is not None
        for name, factor in (("initial_A", self.lora_A), ("initial_B", self.lora_B)):
            self.register_buffer(name, torch.zeros_like(factor.detach()) if init.of_weight else None)
        self.reset_parameters(config.init_lora_weights, weight)

    def base_loaded(self, base: nn.Module, ops: LayerOps) -> None:
        if self.original_bias is not None and (bias := ops.read_bias(base)) is not None:
            self.original_bias = whole(bias).clone()

    @torch.no_grad()
    def reset_parameters(self, init_lora_weights: bool | str, weight: Tensor) -> None:
        """Set the starting values for a layer with this canonical weight; all but False start with no update."""
        if weight.is_meta:
            return
        chosen = chosen_init(init_lora_weights)
        start = Start(self.lora_A, self.lora_B, self.lora_B_bias, weight, self.scaling, chosen.iterations)
        chosen.fill(start, is_embedding=self.is_embedding)
        if self.initial_A is not None and self.initial_B is not None and not chosen.kept:
            self.initial_A.copy_(self.lora_A)
            self.initial_B.copy_(self.lora_B)

    def pair(self) -> tuple[Tensor, Tensor]:
        """(A, B) of the whole update, shapes (r, in) and (out, r); of twice the rank if a start is subtracted."""
        if not self.starts_from_weight:
            return self.lora_A, self.lora_B
        assert self.initial_A is not None
        assert self.initial_B is not None
        A, B = self.initial_A.to(self.lora_A.dtype), self.initial_B.to(self.lora_B.dtype)
        return torch.cat([self.lora_A, A]), torch.cat([self.lora_B, -B], 1)

    def forward(self, base: nn.Module, ops: LayerOps, x: Tensor, y: Tensor | None) -> Tensor:
        y = self.low_rank(base, ops, x, y)
        return self.with_bias(base, ops, y) if self.trains_bias else y

    def low_rank(self, base: nn.Module, ops: LayerOps, x: Tensor, y: Tensor | None) -> Tensor:
        """``y + scaling * B A dropout(x)``; y is the layer's own output if it is None."""
        dropout, (lora_A, lora_B) = self.dropout if self.training else 0.0, self.pair()
        if dropout and isinstance(ops, UncalledOps):
            raise StateError(
                f"lora_dropout cannot act on {ops.parameter} of {type(base).__name__}, which is read and not called; train with 0."
            )
        return low_rank_forward(base, ops, x, y, lora_A, lora_B, self.scaling, dropout)

    def with_bias(self, base: nn.Module, ops: LayerOps, y: Tensor) -> Tensor:
        """The output plus the change of the bias."""
        update = self.bias_update()
        return y if update is None else y + ops.per_feature(base, update.to(y.dtype))

    def bias_update(self) -> Tensor | None:
        """What is added to the layer's bias, shape (out,)."""
        update = None
        if self.lora_bias is not None and self.original_bias is not None:
            update = self.lora_bias - self.original_bias
        if self.lora_B_bias is None:
            return update
        return self.lora_B_bias * self.scaling + (0 if update is None else update)

    def merge_bias(self, bias: Tensor | None) -> Tensor | None:
        update = self.bias_update()
        if update is None:
            return bias
        if bias is None:
            raise MergeError("lora_bias trains a bias, and a layer without one cannot hold it.")
        return bias + update.to(bias.dtype)

    def factors(self) -> tuple[Tensor, Tensor] | None:
        if self.trains_bias or self.num_experts > 1:
            return None  # the merge changes more than the weight, or takes more than one product
        return lora_factors(*self._matrices(), self.scaling)

    def delta(self, weight: Tensor) -> Tensor:
        if self.num_experts > 1:
            return stacked_delta(*self._matrices(), self.scaling, self.num_experts)
        return lora_delta(*self._matrices(), self.scaling, column_major=is_column_major(weight))

    def _matrices(self) -> tuple[Tensor, Tensor]:
        lora_A, lora_B = self.pair()
        return lora_A.flatten(1), lora_B.flatten(1)

    def file_tensors(self) -> dict[str, Tensor]:
        A, B = ("lora_embedding_A", "lora_embedding_B") if self.is_embedding else ("lora_A.weight", "lora_B.weight")
        tensors = {A: self.lora_A, B: self.lora_B, f"initial_{A}": self.initial_A, f"initial_{B}": self.initial_B}
        tensors |= {"lora_B.bias": self.lora_B_bias, "base_layer.bias": self.lora_bias}
        return {key: tensor for key, tensor in tensors.items() if tensor is not None}
