"""LoRA: low-rank updates of frozen linear maps (Hu et al., 2021, arXiv:2106.09685)."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from typing_extensions import Self

from minipeft.config.adapter_config import AdapterConfig
from minipeft.errors import ConfigError, MergeError, StateError
from minipeft.kernels.functional import (
    concatenated,
    is_column_major,
    lora_delta,
    lora_factors,
    split_columns,
    split_rows,
    stacked_delta,
    whole,
)
from minipeft.layers.base import LayerOps
from minipeft.layers.uncalled import UncalledOps
from minipeft.methods.input_dropout import InputDropout
from minipeft.methods.lora_config import LoraConfig
from minipeft.methods.lora_init import Start, chosen_init
from minipeft.methods.low_rank import low_rank_forward
from minipeft.methods.swapping import copy_tensors, unlike
from minipeft.registry.registry import register_method

FACTORS = {"lora_A": 0, "lora_B": 1, "initial_A": 0, "initial_B": 1}  # by name: the dimension that the rank is
TAKEN = frozenset({*FACTORS, "held", "held_strength", "scaling", "rank"})  # what differs between adapters of one shape
OPTIONAL = ("lora_bias", "lora_B_bias", "original_bias", "initial_A", "initial_B", "held", "held_strength")


@register_method("lora")
class Lora(InputDropout):
    """y = W x + b + scaling * B A dropout(x), eq. (3) of arXiv:2106.09685.

    `lora_A` is (r, in), `lora_B` (out, r), whatever the layer stores; `lora_bias` (out,) replaces b, if trained. For some
    layers (convolutions, experts) they have more dimensions, or hold the factors of several matrices. They are created in
    the dtype and on the device of the base weight; the injection raises half precision to float32.
    """

    config_class = LoraConfig
    runs_base = True
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_bias: nn.Parameter | None
    lora_B_bias: nn.Parameter | None
    original_bias: Tensor | None  # kept, since another adapter may be merged into the layer's bias later
    initial_A: Tensor | None
    initial_B: Tensor | None
    is_embedding: bool
    num_experts: int
    rank: int
    trains_bias: bool
    held: Tensor | None  # the scaling that forward passes read, if it may change while the model is compiled
    held_strength: Tensor | None  # likewise what `set_scale` said, for a bias that is trained by values
    is_swapped = False  # A and B change places: a head that is tied to an embedding with this adapter

    def __init__(self, base: nn.Module, ops: LayerOps, config: LoraConfig, shared: object | None) -> None:
        super().__init__(base, ops, config, shared)
        weight, bias = ops.read_weight(base), ops.read_bias(base)
        shape_A, shape_B = ops.factor_shapes(base, config.r)
        vars(self).update(  # torch takes a hundred times as long to assign an attribute of a module
            is_embedding=ops.is_embedding,
            num_experts=shape_A[0] // config.r,
            _scaling=ops.update_count * config.scaling,
            rank=config.r,
            trains_bias=False,
            **dict.fromkeys(OPTIONAL),
        )
        self.drop(config.lora_dropout)
        init = chosen_init(config.init_lora_weights).init
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
        # Not by `new_empty`, which takes long on the meta device.
        A, B = (torch.empty(shape, dtype=weight.dtype, device=weight.device) for shape in (shape_A, shape_B))
        self._parameters.update(lora_A=nn.Parameter(A, not config.freeze_lora_A), lora_B=nn.Parameter(B))
        if config.lora_bias:
            self.lora_B_bias = nn.Parameter(weight.new_zeros(ops.shape(base)[0]))
            self.trains_bias = True
        if config.bias != "none" and bias is not None:
            self.lora_bias = nn.Parameter(bias.detach().clone())
            self._hold("original_bias", bias.detach().clone(), persistent=False)
            self.trains_bias = True
        if init.of_weight:
            self._hold("initial_A", torch.zeros_like(self.lora_A.detach()))
            self._hold("initial_B", torch.zeros_like(self.lora_B.detach()))
        self.reset_parameters(config.init_lora_weights, weight)

    def _hold(self, name: str, value: Tensor, *, persistent: bool = True) -> None:
        """Make a buffer of an attribute that is None so far; a twin on a tied layer finds that of the first."""
        del vars(self)[name]
        if name not in self._buffers:
            self.register_buffer(name, value, persistent=persistent)

    @property
    def scaling(self) -> float:
        """Factor of the update, dimensionless."""
        return self._scaling

    @scaling.setter
    def scaling(self, value: float) -> None:
        self._scaling = value
        if self.held is not None:
            self.held.fill_(value)

    def rescale(self, scale: float) -> None:
        super().rescale(scale)
        if self.held_strength is not None:
            self.held_strength.fill_(scale)

    @property
    def factor(self) -> float | Tensor:
        """`scaling`, as all that a compiled model may compute is to read it."""
        return self._scaling if self.held is None else self.held

    @classmethod
    def ties(cls, config: AdapterConfig) -> bool:
        return config.ensure_weight_tying

    def for_tied(self, base: nn.Module, ops: LayerOps) -> Self:
        # The weight of an embedding is the transpose of a head's: (B A)^T = A^T B^T.
        twin = copy.copy(self)
        twin.is_swapped, twin.is_embedding = ops.is_embedding != self.is_embedding, ops.is_embedding
        return twin

    def base_loaded(self, base: nn.Module, ops: LayerOps) -> None:
        if self.original_bias is not None and (bias := ops.read_bias(base)) is not None:
            self.original_bias = whole(bias).clone()

    def reset_parameters(self, init_lora_weights: bool | str, weight: Tensor) -> None:
        """Set the starting values for a layer with this canonical weight; all but False start with no update."""
        if weight.is_meta:
            return
        # Without their gradients, which takes a tenth of the time of `torch.no_grad` as a decorator.
        chosen = chosen_init(init_lora_weights)
        bias = None if self.lora_B_bias is None else self.lora_B_bias.detach()
        start = Start(self.lora_A.detach(), self.lora_B.detach(), bias, weight, self.scaling, chosen.iterations)
        chosen.fill(start, is_embedding=self.is_embedding)
        if self.initial_A is not None and self.initial_B is not None and not chosen.kept:
            self.initial_A.copy_(start.A)
            self.initial_B.copy_(start.B)

    def pair(self) -> tuple[Tensor, Tensor]:
        """(A, B) of the whole update, shapes (r, in) and (out, r); of twice the rank if a start is subtracted."""
        lora_A: Tensor = self.lora_A
        lora_B: Tensor = self.lora_B
        if self.initial_A is not None and self.initial_B is not None:
            lora_A = concatenated([lora_A, self.initial_A.to(lora_A.dtype)])
            lora_B = concatenated([lora_B, -self.initial_B.to(lora_B.dtype)], 1)
        return (lora_B.t(), lora_A.t()) if self.is_swapped else (lora_A, lora_B)

    def forward(self, base: nn.Module, ops: LayerOps, x: Tensor, y: Tensor | None) -> Tensor:
        y = self.low_rank(base, ops, x, y)
        return self.with_bias(base, ops, y) if self.trains_bias else y

    def low_rank(self, base: nn.Module, ops: LayerOps, x: Tensor, y: Tensor | None) -> Tensor:
        """``y + scaling * B A dropout(x)``; y is the layer's own output if it is None."""
        drops, (lora_A, lora_B) = self.drops, self.pair()
        if drops and isinstance(ops, UncalledOps):
            raise StateError(
                f"lora_dropout cannot act on {ops.parameter} of {type(base).__name__}, which is read and not called; train with 0."
            )
        return low_rank_forward(base, ops, x, y, lora_A, lora_B, self.factor, drops)

    def with_bias(self, base: nn.Module, ops: LayerOps, y: Tensor) -> Tensor:
        """The output plus the change of the bias."""
        update = self.bias_update()
        return y if update is None else y + ops.per_feature(base, update.to(y.dtype))

    def bias_update(self) -> Tensor | None:
        """What is added to the layer's bias, shape (out,)."""
        update = None
        if self.lora_bias is not None and self.original_bias is not None:
            strength = self.strength if self.held_strength is None else self.held_strength
            update = (self.lora_bias - self.original_bias) * strength
        if self.lora_B_bias is None:
            return update
        return self.lora_B_bias * self.factor + (0 if update is None else update)

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
        return lora_factors(*self._matrices(), self.factor)

    def stacked_factors(self) -> tuple[Tensor, Tensor]:
        up, down = lora_factors(*self._matrices(), self.scaling)
        own, room = self.rank * self.num_experts, self.lora_A.shape[0]
        if own < room:  # without the zeros that `room_for` adds, to a start that is subtracted too
            used = [place for place in range(len(down)) if place % room < own]
            up, down = up[:, used], down[used]
        return split_columns(up, self.num_experts), split_rows(down, self.num_experts)

    @torch.no_grad()
    def hold(self, up: Tensor, down: Tensor, bias: Tensor | None) -> None:
        """Hold this update: `stacked_factors` of the adapter's own rank, and what is added to the bias, shape (out,)."""
        self.lora_A.data = (down / self.scaling).flatten(0, 1).reshape(self.lora_A.shape).contiguous()
        self.lora_B.data = up.permute(1, 2, 0).reshape(self.lora_B.shape).contiguous()
        if self.lora_B_bias is not None and bias is not None:
            self.lora_B_bias.data = bias / self.scaling

    def weight_factors(self) -> tuple[Tensor, Tensor, float] | None:
        if self.trains_bias or self.drops:
            return None
        lora_A, lora_B = self.pair()
        return (lora_A, lora_B, self.scaling) if self.held is None else (lora_A, lora_B * self.held, 1.0)

    def call_factors(self) -> tuple[Tensor, Tensor] | None:
        if self.trains_bias or self.num_experts > 1 or self.drops:
            return None
        return lora_factors(*self._matrices(), self.factor)

    def delta(self, weight: Tensor) -> Tensor:
        if self.num_experts > 1:
            return stacked_delta(*self._matrices(), self.factor, self.num_experts)
        return lora_delta(*self._matrices(), self.factor, column_major=is_column_major(weight))

    def _matrices(self) -> tuple[Tensor, Tensor]:
        lora_A, lora_B = self.pair()
        return lora_A.flatten(1), lora_B.flatten(1)

    def _ranked(self, factor: Tensor, dim: int) -> Tensor:
        """A factor without the zeros beyond the adapter's rank, see `room_for`."""
        elsewhere = factor.ndim < 2  # its values, as DeepSpeed's ZeRO-3 and the first FSDP divide them
        if elsewhere or factor.shape[dim] <= self.rank * self.num_experts:
            return factor
        return factor.narrow(dim, 0, self.rank)

    def check_room(self, rank: int) -> None:
        if rank < self.rank or (rank > self.rank and self.num_experts > 1):
            stays = f" of {self.num_experts} experts in one parameter, which stays as it is"
            raise ConfigError(
                f"max_rank={rank} for an adapter of rank {self.rank}{stays if self.num_experts > 1 else ''}."
            )

    @torch.no_grad()
    def room_for(self, rank: int) -> None:
        for name, dim in FACTORS.items():
            factor: Tensor | None = getattr(self, name)
            if factor is not None and factor.shape[dim] < rank * self.num_experts:
                shape = [*factor.shape[:dim], rank, *factor.shape[dim + 1 :]]
                wide = factor.new_zeros(shape)
                wide.narrow(dim, 0, factor.shape[dim]).copy_(factor)
                factor.data = wide
        self.dropout = self.dropout or nn.Dropout(0.0).train(self.training)
        if self.held is None:
            dtype = torch.promote_types(self.lora_A.dtype, torch.float32)
            for name, value in (("held", self.scaling), ("held_strength", self.strength)):
                self._hold(name, self.lora_A.new_tensor(value, dtype=dtype), persistent=False)

    def misfit(self, other: Self) -> str:
        room = self.lora_B.shape[1] // self.num_experts
        if other.rank > room or (other.rank != room and self.num_experts > 1):
            return (
                f"its rank is {other.rank} there and {room} here; prepare_hotswap(max_rank) makes room for a larger one"
            )
        if (self.initial_A is None) != (other.initial_A is None):
            return "only one of the two subtracts the factors that it started from (init_lora_weights)"
        return unlike(self, other, TAKEN)

    def take(self, other: Self) -> None:
        copy_tensors(self, other, TAKEN)
        for name, dim in FACTORS.items():
            factor: Tensor | None = getattr(self, name)
            if factor is not None:
                value: Tensor = getattr(other, name)
                factor.zero_()
                factor.narrow(dim, 0, value.shape[dim]).copy_(value)
        self.scaling, self.rank = other.scaling, other.rank
        self.drop(other.drop_rate)
        vars(self).pop("full_scaling", None)  # which was the old one's

    def vacate(self, base: nn.Module, ops: LayerOps) -> None:
        for tensor in (self.lora_B, self.initial_B, self.lora_B_bias):
            if tensor is not None:
                tensor.zero_()
        if self.lora_bias is not None and self.original_bias is not None:
            self.lora_bias.copy_(self.original_bias)

    def file_tensors(self) -> dict[str, Tensor]:
        A, B = ("lora_embedding_A", "lora_embedding_B") if self.is_embedding else ("lora_A.weight", "lora_B.weight")
        tensors = {A: self._ranked(self.lora_A, 0), B: self._ranked(self.lora_B, 1)}
        if self.initial_A is not None and self.initial_B is not None:
            initial = self._ranked(self.initial_A, 0), self._ranked(self.initial_B, 1)
            tensors |= {f"initial_{A}": initial[0], f"initial_{B}": initial[1]}
        biases = {"lora_B.bias": self.lora_B_bias, "base_layer.bias": self.lora_bias} if self.trains_bias else {}
        return tensors | {key: bias for key, bias in biases.items() if bias is not None}
