"""LoRA: low-rank updates of frozen linear maps (Hu et al., 2021, arXiv:2106.09685)."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from minipeft.config import AdapterConfig, flag, integer, names, number, one_of, pattern_table
from minipeft.errors import ConfigError, MergeError, StateError
from minipeft.kernels.functional import is_column_major, lora_delta, lora_factors, lora_scaling, stacked_delta
from minipeft.layers.base import LayerOps
from minipeft.layers.uncalled import UncalledOps
from minipeft.methods.base import Adapter
from minipeft.methods.lora_init import olora_factors, orthogonal_factors, pissa_factors
from minipeft.methods.low_rank import low_rank_forward
from minipeft.methods.trainable_tokens import token_option, tokens_beside
from minipeft.patterns import first_keys
from minipeft.registry import register_method

MAX_RANK = 2**16
INITIALISATIONS = (True, False, "gaussian", "orthogonal", "pissa", "olora")
OF_WEIGHT = re.compile(r"(pissa(?:_niter_([1-9]\d{0,2}))?|olora)(_kept)?")  # they start from parts of the weight
NOT_HERE = {"eva": "inputs", "corda": "inputs", "lora_ga": "gradients", "loftq": "quantization error", "mica": "tail"}


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
            "orthogonal": neither is zero, and ``B A = 0``. "pissa", "pissa_niter_N", "olora": parts of the weight, see
            `minipeft.methods.lora_init`. The weight stays as it is, and ``scaling * B_0 A_0``, kept beside, is taken off the update.
            "pissa_kept" and so on are what files say that bring these factors along.
        lora_bias: B has a bias, which scaled is added to the layer's; only with `init_lora_weights` True or False.
        freeze_lora_A: train B alone (LoRA-FA, arXiv:2308.03303), so that of a layer's input nothing but A x is kept for
            the backward pass. It is a matter of training, and files do not say it; there the adapter is plain LoRA.
        use_dora: adapt by DoRA (arXiv:2402.09353), the update of the direction of each row beside that of its length.
        target_parameters: suffixes of the names of bare parameters to adapt beside `target_modules` (which may then be
            empty): of shape (out, in), (experts, out, in) or, in a module that says `is_transposed`, (experts, in, out).
            `exclude_modules` and `layers_to_transform` do not concern them.
        trainable_token_indices: train the rows of these tokens as well, see `minipeft.methods.trainable_tokens`: ids for
            the input embedding, or a mapping from module names to ids. Layers tied to it follow.
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
    lora_bias: bool = False
    freeze_lora_A: bool = False
    use_dora: bool = False
    target_parameters: Sequence[str] | None = None
    trainable_token_indices: Sequence[int] | Mapping[str, Sequence[int]] | None = None
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
        _initialisation(self.init_lora_weights)
        flag("freeze_lora_A", self.freeze_lora_A)
        flag("use_dora", self.use_dora)
        self._set("trainable_token_indices", token_option("trainable_token_indices", self.trainable_token_indices))
        if flag("lora_bias", self.lora_bias) and (self.use_dora or isinstance(self.init_lora_weights, str)):
            raise ConfigError("lora_bias goes with init_lora_weights True or False only, and not with use_dora.")
        flag("fan_in_fan_out", self.fan_in_fan_out)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        config = super().from_dict(values)
        match = OF_WEIGHT.fullmatch(str(config.init_lora_weights))
        if match and not match[3]:
            raise ConfigError(
                f"init_lora_weights {match[0]!r} changes the base by factors that the file does not hold. Convert it to "
                "plain LoRA where it was made: in PEFT, save_pretrained(..., path_initial_model_for_weight_conversion=...)."
            )
        return config

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        del values["freeze_lora_A"]
        match = OF_WEIGHT.fullmatch(str(self.init_lora_weights))
        # Other readers would take the factors off again, those of their own making. This they refuse.
        return {**values, "init_lora_weights": f"{match[1]}_kept"} if match else values

    @property
    def adapter_method(self) -> str:
        return "dora" if self.use_dora else self.method

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

    def companions(self) -> Sequence[tuple[str, AdapterConfig]]:
        return tokens_beside(self.trainable_token_indices)

    def needs_a_call(self) -> list[str]:
        used = {"lora_dropout": self.lora_dropout > 0, "bias": self.bias != "none"}
        used |= {"lora_bias": self.lora_bias, "use_dora": self.use_dora}
        return [f"{option} = {getattr(self, option)!r}" for option, is_set in used.items() if is_set]

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


def _initialisation(value: object) -> None:
    if isinstance(value, str) and value in NOT_HERE:
        raise ConfigError(
            f"init_lora_weights {value!r} starts from the {NOT_HERE[value]} of the layers, which is not implemented; "
            "'pissa' starts from their weights."
        )
    if not isinstance(value, str) or not OF_WEIGHT.fullmatch(value):
        one_of("init_lora_weights", value, (*INITIALISATIONS, "pissa_niter_4"))


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
    initial_A: Tensor | None
    initial_B: Tensor | None

    def __init__(self, base: nn.Module, ops: LayerOps, config: LoraConfig, shared: object | None) -> None:
        super().__init__(base, ops, config, shared)
        weight, bias = ops.read_weight(base), ops.read_bias(base)
        shape_A, shape_B = ops.factor_shapes(base, config.r)
        self.is_embedding, self.num_experts = ops.is_embedding, shape_A[0] // config.r
        self.scaling = config.scaling
        self.dropout = config.lora_dropout
        self.freeze_lora_A = config.freeze_lora_A
        if config.freeze_lora_A and ops.is_embedding:
            raise ConfigError(
                f"freeze_lora_A on {type(base).__name__}: its lora_A starts at zero, so nothing would ever be learned."
            )
        self.lora_A = nn.Parameter(weight.new_empty(shape_A), not config.freeze_lora_A)
        self.lora_B = nn.Parameter(weight.new_empty(shape_B))
        if config.lora_bias and ops.is_embedding:
            raise ConfigError(f"lora_bias is not for {type(base).__name__}, which has no bias.")
        self.lora_B_bias = nn.Parameter(weight.new_zeros(ops.shape(base)[0])) if config.lora_bias else None
        start = bias.detach() if config.bias != "none" and bias is not None else None
        self.lora_bias = None if start is None else nn.Parameter(start.clone())
        # Kept, since another adapter may be merged into the base's own later.
        self.register_buffer("original_bias", None if start is None else start.clone(), persistent=False)
        self.trains_bias = self.lora_bias is not None or self.lora_B_bias is not None
        of_weight = OF_WEIGHT.fullmatch(str(config.init_lora_weights))
        self.starts_from_weight = of_weight is not None
        if self.num_experts > 1 and (of_weight or config.init_lora_weights == "orthogonal"):
            raise ConfigError(
                f"init_lora_weights {config.init_lora_weights!r} is for one matrix, and {type(base).__name__} has {self.num_experts} in "
                "one parameter. Use True or 'gaussian' there."
            )
        self.register_buffer("initial_A", torch.zeros_like(self.lora_A.detach()) if of_weight else None)
        self.register_buffer("initial_B", torch.zeros_like(self.lora_B.detach()) if of_weight else None)
        self.reset_parameters(config.init_lora_weights, weight)

    @torch.no_grad()
    def reset_parameters(self, init_lora_weights: bool | str, weight: Tensor) -> None:
        """Set the starting values for a layer with this canonical weight; all but False start with no update."""
        match, r = OF_WEIGHT.fullmatch(str(init_lora_weights)), len(self.lora_A)
        if init_lora_weights == "orthogonal" or (match and not match[3]):
            if not weight.is_meta:
                self._start_from(init_lora_weights, match, weight)
        elif self.is_embedding:  # as PEFT: what is looked up starts at zero, and B is what the zeros are multiplied by
            self.lora_A.normal_() if init_lora_weights is False else self.lora_A.zero_()
            self.lora_B.normal_()
        else:
            if init_lora_weights == "gaussian":
                self.lora_A.normal_(std=1 / r)
            else:
                nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
            if init_lora_weights is False:
                nn.init.kaiming_uniform_(self.lora_B, a=math.sqrt(5))
            else:
                self.lora_B.zero_()
            if init_lora_weights is False and self.lora_B_bias is not None:
                self.lora_B_bias.uniform_(-(r**-0.5), r**-0.5)

    def _start_from(self, init_lora_weights: bool | str, match: re.Match[str] | None, weight: Tensor) -> None:
        if match is None:
            A, B = orthogonal_factors(weight, len(self.lora_A))
        elif match[1] == "olora":
            A, B = olora_factors(weight, len(self.lora_A))
        else:
            A, B = pissa_factors(weight, len(self.lora_A), self.scaling, int(match[2]) if match[2] else None)
        for target, source in ((self.lora_A, A), (self.lora_B, B), (self.initial_A, A), (self.initial_B, B)):
            if target is not None:
                target.copy_(source.view_as(target))

    def pair(self) -> tuple[Tensor, Tensor]:
        """(A, B) of the whole update, shapes (r, in) and (out, r); with what is taken off, of twice the rank."""
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
        """``y + scaling * B A dropout(x)``; without y, that of the base."""
        dropout, (lora_A, lora_B) = self.dropout if self.training else 0.0, self.pair()
        if dropout and isinstance(ops, UncalledOps):
            raise StateError(
                f"lora_dropout cannot act on {ops.parameter} of {type(base).__name__}, which is read and not called; train with 0."
            )
        return low_rank_forward(base, ops, x, y, lora_A, lora_B, self.scaling, dropout)

    def with_bias(self, base: nn.Module, ops: LayerOps, y: Tensor) -> Tensor:
        """The output with what the training of biases has changed."""
        update = self.bias_update()
        return y if update is None else y + ops.per_feature(base, update.to(y.dtype))

    def bias_update(self) -> Tensor | None:
        """What is added to the layer's bias, shape (out,)."""
        update = None
        if self.lora_bias is not None and self.original_bias is not None:
            update = self.lora_bias - self.original_bias
        return (
            update if self.lora_B_bias is None else self.lora_B_bias * self.scaling + (0 if update is None else update)
        )

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        update = self.bias_update()
        if update is not None:
            if bias is None:
                raise MergeError("lora_bias trains a bias, and a layer without one cannot hold it.")
            bias = bias + update.detach().to(bias.dtype)
        return weight + self._update(weight).to(weight.dtype), bias

    def factors(self) -> tuple[Tensor, Tensor] | None:
        if self.lora_bias is not None or self.lora_B_bias is not None or self.num_experts > 1:
            return None  # the merge changes more than the weight, or one product is not all
        return lora_factors(*self._matrices(), self.scaling)

    def delta(self, weight: Tensor) -> Tensor | None:
        return self._update(weight)

    def _update(self, weight: Tensor) -> Tensor:
        if self.num_experts > 1:
            return stacked_delta(*self._matrices(), self.scaling, self.num_experts)
        return lora_delta(*self._matrices(), self.scaling, column_major=is_column_major(weight))

    def _matrices(self) -> tuple[Tensor, Tensor]:
        lora_A, lora_B = self.pair()
        return lora_A.detach().flatten(1), lora_B.detach().flatten(1)

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        return (parameter for parameter in self.parameters() if parameter is not self.lora_A or not self.freeze_lora_A)

    def changes_nothing(self) -> bool:
        update = self.bias_update()
        if update is not None and update.any():
            return False
        if self.initial_A is not None and self.initial_B is not None:
            same = zip((self.lora_A, self.lora_B), (self.initial_A, self.initial_B), strict=True)
            return all(torch.equal(now, start.to(now.dtype)) for now, start in same)
        return not (self.lora_A.any() and self.lora_B.any())

    def file_tensors(self) -> dict[str, Tensor]:
        names = ("lora_embedding_A", "lora_embedding_B") if self.is_embedding else ("lora_A.weight", "lora_B.weight")
        tensors: dict[str, Tensor] = {names[0]: self.lora_A, names[1]: self.lora_B}
        more = {
            f"initial_{names[0]}": self.initial_A,
            f"initial_{names[1]}": self.initial_B,
            "lora_B.bias": self.lora_B_bias,
            "base_layer.bias": self.lora_bias,
        }
        return tensors | {key: tensor for key, tensor in more.items() if tensor is not None}
