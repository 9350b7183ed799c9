"""LoKr: a Kronecker product as the update (KronA, arXiv:2212.10650; LyCORIS, Yeh et al., 2023, arXiv:2309.14859)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from minipeft.config.options import integer, one_of
from minipeft.kernels.transformed import is_transformed
from minipeft.layers.base import LayerOps, takes_vectors
from minipeft.methods.lycoris import Lycoris, LycorisConfig, core_shape, features_and_kernel, through_core
from minipeft.registry.registry import register_method


@dataclass(frozen=True, kw_only=True)
class LoKrConfig(LycorisConfig):
    """LoKr's options, on top of `LycorisConfig`'s; names, meanings and defaults are PEFT's.

    Args:
        decompose_both: also give the left factor a low rank, if that is less than half its size.
        decompose_factor: size of the left factor, as near as the layer's divisors allow; -1: near the square root.
        rank_dropout_scale: scale the remaining rows up to keep their mean.
        init_weights: True: the left factor zero, the right one Kaiming-uniform. "lycoris": the other way round. False:
            both random, so the model differs from the base at once (for tests).
    """

    method: ClassVar[str] = "lokr"

    decompose_both: bool = False
    decompose_factor: int = -1
    rank_dropout_scale: bool = False
    init_weights: bool | str = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.decompose_factor) is not int or self.decompose_factor != -1:
            integer("decompose_factor", self.decompose_factor, at_least=1)
        one_of("init_weights", self.init_weights, (True, False, "lycoris"))


def factorise(size: int, near: int) -> tuple[int, int]:
    """Two divisors of `size`: `near` and its partner, or the largest below both `near` and the root, and its partner."""
    if near > 0 and size % near == 0:
        return near, size // near
    most = math.isqrt(size) if near == -1 else min(near, math.isqrt(size))
    left = next(divisor for divisor in range(most, 0, -1) if size % divisor == 0)
    return left, size // left


@register_method("lokr")
class LoKr(Lycoris):
    """y = W x + b + alpha / r * (C (x) D) x; with x as a matrix X, row by row, (C (x) D) x is C X D^T, row by row.

    C is `lokr_w1` (l, m), or `lokr_w1_a` (l, r) times `lokr_w1_b` (r, m); D is `lokr_w2` (k, n), or `lokr_w2_a` (k, r)
    times `lokr_w2_b` (r, n), if the rank is less than half the size. l k is out_features, m n is in_features. The product
    is formed only for a merge, and for layers whose input is not a plain vector.

    In a convolution m n is the number of channels, and each of D's columns is a whole kernel. In one dimension a whole D is
    (k, n, kernel, 1): PEFT's (k, n, kernel) has the same numbers, but PEFT joins the factors along other dimensions. With a core `lokr_t2`
    (r, r, *kernel), `lokr_w2_a` is (r, k) and `lokr_w2_b` (r, n), and the down projection is `through_core`.
    """

    config_class = LoKrConfig

    def __init__(self, base: nn.Module, ops: LayerOps, config: LoKrConfig, shared: object | None) -> None:
        super().__init__(base, ops, config, shared, rescales=config.rank_dropout_scale)
        features, kernel = features_and_kernel(base, ops)
        (l, k), (m, n) = (factorise(s, config.decompose_factor) for s in (self.out_features, features))  # noqa: E741
        shapes = _shapes("1", config, l, m) if config.decompose_both else {"lokr_w1": (l, m)}
        for name, shape in {**shapes, **_shapes("2", config, k, n, kernel)}.items():
            self.register_parameter(name, nn.Parameter(ops.read_weight(base).new_empty(shape)))
            nn.init.kaiming_uniform_(getattr(self, name), a=math.sqrt(5))
        starts_at_zero = {True: ("lokr_w1", "lokr_w1_a"), "lycoris": ("lokr_w2", "lokr_w2_b"), False: ()}
        for name, parameter in self.named_parameters():
            if name in starts_at_zero[config.init_weights]:
                nn.init.zeros_(parameter)

    def _factor(self, name: str) -> Tensor:
        if name in self._parameters:
            whole: Tensor = getattr(self, name)
            return whole.flatten(1)
        up, down = getattr(self, f"{name}_a"), getattr(self, f"{name}_b")
        core = self._parameters.get("lokr_t2") if name == "lokr_w2" else None
        return up @ down if core is None else up.t() @ through_core(core, down)

    def forward(self, base: nn.Module, ops: LayerOps, x: Tensor, y: Any) -> Tensor:
        C, D = self._factor("lokr_w1"), self._factor("lokr_w2") * self.scaling
        passes = self.passes(C)
        dtype = y.dtype if ops.is_embedding else x.dtype
        if ops.is_embedding:  # the column of a token is the Kronecker product of two columns
            columns = C.t()[x // D.shape[1]].unsqueeze(-1) * D.t()[x % D.shape[1]].unsqueeze(-2)
            update = ops.scaled(base, columns.flatten(-2))
        elif takes_vectors(ops):
            update = ops.scaled(base, _kronecker_linear(x, C, D))
        else:
            h = ops.project_in(base, x, torch.kron(C, D).to(dtype))
            # In a layer with groups, the rows of the identity pick the features of their group.
            update = ops.project_out(base, h, torch.eye(self.out_features, dtype=dtype, device=x.device))
        if passes is not None:
            update = update * ops.per_feature(base, passes)
        return y + update.to(y.dtype)

    def delta(self, weight: Tensor) -> Tensor:
        C, D = (self._factor(name) for name in ("lokr_w1", "lokr_w2"))
        dtype = torch.promote_types(C.dtype, torch.float32)
        return torch.kron(C.to(dtype), D.to(dtype) * self.scaling)


def _shapes(
    which: str, config: LoKrConfig, rows: int, columns: int, kernel: tuple[int, ...] = ()
) -> dict[str, tuple[int, ...]]:
    """The parameters of one of the two matrices, with their shapes; `columns` are kernels in a convolution."""
    name, r = f"lokr_w{which}", config.r
    if r >= max(rows, columns) / 2:
        return {name: (rows, columns, *kernel, *(1,) * (len(kernel) == 1))}
    core = core_shape(config, kernel)
    if core is None:
        return {f"{name}_a": (rows, r), f"{name}_b": (r, columns * math.prod(kernel))}
    return {f"{name}_a": (r, rows), f"{name}_b": (r, columns), f"lokr_t{which}": core}


def _kronecker_linear(x: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """``(C (x) D) x`` for x of shape (..., m n), C (l, m), D (k, n): shape (..., l k), in the dtype of x or autocast."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x = x if x.dtype is torch.float64 else x.to(torch.get_autocast_dtype(device))
        with torch.autocast(device, enabled=False):
            return _kronecker_linear(x, C, D)
    C, D = C.to(x.dtype), D.to(x.dtype)
    if is_transformed():
        return _product(x, C, D)  # a compiler decides itself what to save
    return _KroneckerLinear.apply(x, C, D)  # type: ignore[no-untyped-call,unused-ignore]


def _product(x: Tensor, C: Tensor, D: Tensor) -> Tensor:
    # Not matmul, which rounds differently if a gradient is needed: it then folds the rows into the factors.
    through_D = torch.mm(x.reshape(-1, D.shape[1]), D.t()).view(-1, C.shape[1], D.shape[0])
    return _each(C, through_D).reshape(*x.shape[:-1], C.shape[0] * D.shape[0])


def _each(C: Tensor, X: Tensor) -> Tensor:
    """C times each of the matrices in X, (rows, m, n)."""
    return torch.bmm(C.expand(X.shape[0], *C.shape), X)


class _KroneckerLinear(torch.autograd.Function):
    """Saves x and the small factors; C X is recomputed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, C: Tensor, D: Tensor) -> Tensor:
        ctx.save_for_backward(x, C, D)
        return _product(x, C, D)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, C, D = ctx.saved_tensors
        X, dY = x.reshape(-1, C.shape[1], D.shape[1]), dy.reshape(-1, C.shape[0], D.shape[0])
        through_D = torch.mm(dy.reshape(-1, D.shape[0]), D).view(len(X), C.shape[0], D.shape[1])
        dx = _each(C.t(), through_D).reshape(x.shape) if ctx.needs_input_grad[0] else None
        dC = torch.mm(through_D.transpose(0, 1).flatten(1), X.transpose(0, 1).flatten(1).t())
        dD = torch.mm(dY.flatten(0, 1).t(), _each(C, X).flatten(0, 1)) if ctx.needs_input_grad[2] else None
        return dx, dC if ctx.needs_input_grad[1] else None, dD
