"""VeRA: one frozen random pair of factors for all layers, and two vectors per layer (Kopiczko et al., 2023, arXiv:2310.11454)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from minipeft.config.adapter_config import AdapterConfig
from minipeft.config.options import integer, number, one_of, rank
from minipeft.layers.base import LayerOps, takes_vectors
from minipeft.methods.input_dropout import InputDropout
from minipeft.methods.low_rank import low_rank_forward
from minipeft.registry.registry import register_method, register_targets

register_targets("phi", ["q_proj", "v_proj"], method="vera")  # PEFT's default, which differs from LoRA's


@dataclass(frozen=True, kw_only=True)
class VeraConfig(AdapterConfig):
    """VeRA's options, on top of `AdapterConfig`'s; names, meanings and defaults are PEFT's.

    Args:
        r: rank of the shared factors.
        projection_prng_key: seed of the shared factors, drawn as PEFT draws them.
        save_projection: also write them to the file. False: the reader draws them again from the key.
        vera_dropout: probability of dropping an input feature on its way into A, in training; for an embedding, of
            dropping a token's update.
        d_initial: starting value of `vera_lambda_d`.
        bias: "none" only.
        init_weights: False: random vectors, so the model differs from the base at once (for tests).
        fan_in_fan_out: accepted for compatibility with PEFT and ignored: the layer knows its own orientation.
    """

    method: ClassVar[str] = "vera"
    null_in_files = frozenset({"vera_dropout"})
    not_in_files: ClassVar[frozenset[str]] = frozenset({"exclude_modules"})

    r: int = 256
    projection_prng_key: int = 0
    save_projection: bool = True
    vera_dropout: float = 0.0
    d_initial: float = 0.1
    bias: str = "none"
    init_weights: bool = True
    fan_in_fan_out: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        rank("r", self.r)
        integer("projection_prng_key", self.projection_prng_key, at_least=-(2**63), at_most=2**63 - 1)
        number("vera_dropout", self.vera_dropout, at_least=0, below=1)
        number("d_initial", self.d_initial)
        one_of("bias", self.bias, ("none",))


class Projections(nn.Module):
    """The frozen factors, of which each layer of one adapter uses a slice: one storage, also in copies and pickles.

    `vera_A` is (r, largest in_features), `vera_B` (largest out_features, r), in float32 as in PEFT. They are not in the
    model's state_dict; the adapter's file has them, unless `save_projection` is False.
    """

    def __init__(self, r: int, out_features: int, in_features: int, key: int, device: torch.device) -> None:
        super().__init__()
        self.key, self.shapes = key, {"vera_A": (r, in_features), "vera_B": (out_features, r)}
        self.is_empty = False  # whether the memory was never filled
        self.draw(device)

    def draw(self, device: torch.device) -> None:
        """Draw both from the key, on this device; on the meta device only their shapes."""
        generator = None if device.type == "meta" else torch.Generator("cpu").manual_seed(self.key)
        for name, shape in self.shapes.items():
            bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(shape[1]))  # Kaiming-uniform
            factor = torch.empty(shape, dtype=torch.float32, device="meta" if generator is None else "cpu")
            factor.uniform_(-bound, bound, generator=generator)
            self.register_buffer(name, factor.to(device), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Torch's own; after ``to_empty`` of a model built on the meta device, the memory has no values."""
        self.is_empty = self.is_empty or any(factor.is_meta for factor in self.buffers())
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self


@register_method("vera")
class Vera(InputDropout):
    """y = W x + b + lambda_b * (B (lambda_d * (A dropout(x)))), eq. (2) of arXiv:2310.11454.

    A is the first in_features columns of the shared `vera_A`, B the first out_features rows of `vera_B`; only
    `vera_lambda_b` (out,), which starts at zero, and `vera_lambda_d` (r,) train. Nothing as large as x or y is saved for
    the backward pass.
    """

    config_class = VeraConfig
    runs_base = True
    scaling: float
    projections: Projections

    @classmethod
    def share(cls, sites: Sequence[tuple[nn.Module, LayerOps]], config: AdapterConfig) -> Projections:
        assert isinstance(config, VeraConfig)
        shapes = [ops.shape(base) for base, ops in sites]
        base, ops = sites[0]
        sizes = max(out for out, _ in shapes), max(into for _, into in shapes)
        return Projections(config.r, *sizes, config.projection_prng_key, ops.read_weight(base).device)

    def __init__(self, base: nn.Module, ops: LayerOps, config: VeraConfig, shared: object | None) -> None:
        super().__init__(base, ops, config, shared)
        assert isinstance(shared, Projections)
        self.out_features, self.in_features = ops.shape(base)
        self.is_embedding = ops.is_embedding
        self.scaling, self.rank = 1.0, config.r
        self.drop(config.vera_dropout)
        self.saves_projections = config.save_projection
        self.projections = shared
        weight = ops.read_weight(base)
        self.vera_lambda_b = nn.Parameter(weight.new_zeros(self.out_features))
        self.vera_lambda_d = nn.Parameter(weight.new_full((config.r,), config.d_initial))
        if not config.init_weights:
            nn.init.ones_(self.vera_lambda_b)
            nn.init.normal_(self.vera_lambda_d)

    def base_loaded(self, base: nn.Module, ops: LayerOps) -> None:
        if self.projections.is_empty:
            self.projections.draw(self.vera_lambda_b.device)
            self.projections.is_empty = False

    def _factors(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """This layer's part of the shared pair, (r, in) and (out, r)."""
        A, B = self.projections.vera_A, self.projections.vera_B
        assert isinstance(A, Tensor)
        assert isinstance(B, Tensor)
        return A[:, : self.in_features].to(device), B[: self.out_features].to(device)

    def forward(self, base: nn.Module, ops: LayerOps, x: Tensor, y: Any) -> Tensor:
        A, B = self._factors(x.device)
        keeps = torch.is_grad_enabled() and not torch.jit.is_tracing()  # a trace is checked without gradients
        if not (keeps or self.drops or self.is_embedding) and takes_vectors(ops):  # nothing to keep: scale vectors
            y = ops.call(base, x) if y is None else y
            h = ops.project_in(base, x, A.to(x.dtype)) * (self.scaling * self.vera_lambda_d)
            more = ops.project_out(base, h.to(x.dtype), B.to(x.dtype)) * self.vera_lambda_b
            assert isinstance(y, Tensor)
            return y + more.to(y.dtype)
        # Both vectors scale B. A then stays frozen, so only A x is saved for the backward pass, and nothing as large as y.
        up = self.vera_lambda_b.unsqueeze(1) * B * self.vera_lambda_d
        return low_rank_forward(base, ops, x, y, A, up, self.scaling, self.drops)

    def factors(self) -> tuple[Tensor, Tensor]:
        A, B = self._factors(self.vera_lambda_b.device)
        dtype = torch.promote_types(self.vera_lambda_b.dtype, torch.float32)
        down = (self.scaling * self.vera_lambda_d.to(dtype)).unsqueeze(1) * A.to(dtype)
        return self.vera_lambda_b.to(dtype).unsqueeze(1) * B.to(dtype), down

    def call_factors(self) -> tuple[Tensor, Tensor] | None:
        return None if self.drops else self.factors()

    def file_tensors(self) -> dict[str, Tensor]:
        return {"vera_lambda_b": self.vera_lambda_b, "vera_lambda_d": self.vera_lambda_d}

    def shared_tensors(self) -> dict[str, Tensor]:
        return dict(self.projections.named_buffers()) if self.saves_projections else {}
