"""``W + s B A`` in the place of a parameter that its module multiplies by, such as the fused experts of a mixture.

The module's own code runs, whichever it is: transformers' experts have three implementations (a loop, ``batched_mm``,
``grouped_mm``), which the user may change at any time, and each class its own loop. Torch's protocol for tensor-like
objects hands over each product: those that `RULES` knows are computed as ``x W + s (x A) B``, so that nothing as large as
W is made. Any other use of the weight forms it, as an `AdaptedValue`. A compiler follows the same rules while it traces
(`TracedWeight`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from inspect import isgetsetdescriptor
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only

from minipeft.ecosystem.transformers_model import GROUPED_PRODUCT
from minipeft.errors import warn
from minipeft.injection.adapted_value import AdaptedValue, adapted_value
from minipeft.kernels import low_rank_groups, low_rank_sum
from minipeft.kernels.frozen_linear import is_frozen_product
from minipeft.kernels.low_rank_sum import LowRankSum
from minipeft.kernels.transformed import is_compiled

SAID_FROM = 2**26  # bytes kept for the backward pass


class Origin(NamedTuple):
    """The parameter that a weight comes from."""

    name: str  # for messages
    size: int  # in bytes


class Split(Tensor):
    """A `LowRankSum` as the tensor that it stands for; if `picks` is given, the matrices of it with these indices."""

    parts: LowRankSum
    picks: Tensor | None
    origin: Origin

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        rule = RULES.get(func) or NAMED_RULES.get(getattr(func, "__name__", ""))
        found = NotImplemented if rule is None else rule(*args, **(kwargs or {}))
        if found is not NotImplemented:
            return found
        args, kwargs = cls.for_torch(func, args, kwargs or {})
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def for_torch(cls, func: Any, args: Any, kwargs: Any) -> Any:
        """The arguments of a call that no rule is for."""
        return args, kwargs


class SplitWeight(Split, AdaptedValue):  # type: ignore[misc]  # the protocol is that of `Split`
    """Forms the sum when something reads its values."""


class TracedWeight(Split):
    """W itself, for a compiler, which replaces it by the sum in every call that reads its values."""

    @classmethod
    def for_torch(cls, func: Any, args: Any, kwargs: Any) -> Any:
        if func in LOOKS:
            return args, kwargs
        return tree_map_only(TracedWeight, _formed_now, (args, kwargs))


def split_weight(parts: LowRankSum, origin: Origin, picks: Tensor | None = None) -> Tensor:
    """The sum, or the matrices of it with these indices (n,), as a tensor."""
    like = parts.own if picks is None else parts.own[:1].expand(len(picks), -1, -1)
    made: Tensor
    if is_compiled():
        made = like.as_subclass(TracedWeight)
    else:
        compute = partial(formed, parts, picks, origin, parts.learns)
        made = adapted_value(like, compute, (parts.left, parts.right), SplitWeight)
    if isinstance(made, Split):  # else it had to be formed at once
        made.parts, made.picks, made.origin = parts, picks, origin
    return made


def _formed_now(weight: TracedWeight) -> Tensor:
    return formed(weight.parts, weight.picks, weight.origin, weight.parts.learns)


def formed(parts: LowRankSum, picks: Tensor | None, origin: Origin, learns: bool) -> Tensor:
    """The sum, or the matrices of it with the indices `picks`, whatever autocast says; `learns`: for a backward pass."""
    if learns and origin.size >= SAID_FROM:
        _warn(
            f"{origin.name}: its module does more with it than to multiply by it, so W + BA is formed at each call and kept for "
            f"the backward pass, {origin.size / 2**20:.0f} MiB. Gradient checkpointing forms it again instead."
        )
    with torch.autocast(parts.own.device.type, enabled=False):
        return (parts if picks is None else parts.picked(picks)).formed()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # a compiler may call it while it traces
def _warn(text: str) -> None:
    warn(text)


# Rules: arguments as those of the function; NotImplemented leaves the call to torch.


def _item(weight: Split, index: Any) -> Any:
    if weight.picks is not None or weight.ndim != 3:
        return NotImplemented
    if isinstance(index, Tensor) and not index.is_floating_point() and index.dtype is not torch.bool:
        if index.ndim == 1:
            return split_weight(weight.parts, weight.origin, index)
        index = int(index) if index.ndim == 0 else index
    return split_weight(_matrices(weight)[index], weight.origin) if type(index) is int else NotImplemented


def _unbind(weight: Split, dim: int = 0) -> Any:
    if weight.picks is not None or weight.ndim != 3 or dim != 0:
        return NotImplemented
    return tuple(split_weight(matrix, weight.origin) for matrix in _matrices(weight))


def _matrices(weight: Split) -> tuple[LowRankSum, ...]:
    return weight.parts.split() if is_compiled() else weight.parts.matrices


def _mT(weight: Split, *_: Any) -> Any:
    return split_weight(weight.parts.mT, weight.origin, weight.picks)


def _t(weight: Split, *_: Any) -> Any:
    return _mT(weight) if weight.ndim == 2 else NotImplemented


def _transpose(weight: Split, dim0: Any, dim1: Any) -> Any:
    last = isinstance(dim0, int) and {dim0 % weight.ndim, dim1 % weight.ndim} == {weight.ndim - 2, weight.ndim - 1}
    return _mT(weight) if last else NotImplemented


def _cast(dtype: torch.dtype) -> Callable[..., Any]:
    def cast(weight: Split) -> Any:
        if weight.dtype is dtype:
            return weight
        return split_weight(weight.parts.to(dtype), weight.origin) if weight.picks is None else NotImplemented

    return cast


def _to(weight: Split, *args: Any, **kwargs: Any) -> Any:
    only = args[0] if len(args) == 1 and not kwargs else None
    return _cast(only)(weight) if isinstance(only, torch.dtype) and only.is_floating_point else NotImplemented


def _linear(input: Tensor, weight: Any, bias: Tensor | None = None) -> Any:
    if not isinstance(weight, Split) or weight.ndim != 2 or not is_frozen_product(input, weight.parts.own, bias):
        return NotImplemented
    return low_rank_sum.linear(input, weight.parts, bias)


def _matmul(product: Callable[..., Tensor]) -> Callable[..., Any]:
    def matmul(input: Any, other: Any) -> Any:
        weight, x = (other, input) if isinstance(other, Split) else (input, other)
        if isinstance(x, Split) or x.ndim < 2 or not is_frozen_product(x, weight.parts.own, None):
            return NotImplemented
        if weight.picks is not None:
            return _by_index(weight, x, product, after=weight is input)
        if weight is input:
            return low_rank_sum.matmul(weight.parts, x, product)
        if weight.ndim == 2:
            return low_rank_sum.linear(x, weight.parts.mT)
        return low_rank_sum.matmul(x, weight.parts, product)

    return matmul


def _by_index(weight: Split, x: Tensor, product: Callable[..., Tensor], after: bool) -> Any:
    """One row, or one column `after` the weight, for each matrix that the index names."""
    assert weight.picks is not None
    parts, dim = weight.parts, -1 if after else -2
    if x.ndim != 3 or x.shape[dim] != 1 or len(x) != len(weight.picks):
        return NotImplemented
    if not (parts.learns or (torch.is_grad_enabled() and x.requires_grad)):
        picked = parts.picked(weight.picks)
        return low_rank_sum.matmul(picked, x, product) if after else low_rank_sum.matmul(x, picked, product)
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype is not torch.float64:
        x = x.to(torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False):
        return low_rank_groups.gathered(x.squeeze(dim), parts.mT if after else parts, weight.picks).unsqueeze(dim)


def _grouped(product: Callable[..., Tensor]) -> Callable[..., Any]:
    def grouped_mm(input: Any, mat2: Any, offs: Tensor | None = None, **options: Any) -> Any:
        plain = isinstance(mat2, Split) and mat2.picks is None and mat2.ndim == 3 and type(input) is Tensor
        if not plain or input.ndim != 2 or offs is None or any(value is not None for value in options.values()):
            return NotImplemented
        if input.dtype is not mat2.dtype or not is_frozen_product(input, mat2.parts.own, None):
            return NotImplemented
        with torch.autocast(input.device.type, enabled=False):  # which does not change this product
            return low_rank_groups.grouped(input, mat2.parts, offs, product)

    return grouped_mm


def _data_ptr(weight: Split) -> Any:
    return weight.computed().data_ptr() if isinstance(weight, SplitWeight) else NotImplemented


def _by_torch(x: Tensor, stack: Tensor, ends: Tensor) -> Tensor:
    return torch._grouped_mm(x, stack, offs=ends)


def _by_transformers(x: Tensor, stack: Tensor, ends: Tensor) -> Tensor:
    product: Tensor = getattr(torch.ops.transformers, GROUPED_PRODUCT)(x, stack, ends)
    return product


RULES: Mapping[Any, Callable[..., Any]] = {
    Tensor.__getitem__: _item,
    Tensor.unbind: _unbind,
    torch.unbind: _unbind,
    Tensor.mT.__get__: _mT,  # type: ignore[attr-defined]
    Tensor.T.__get__: _t,  # type: ignore[attr-defined]
    Tensor.t: _t,
    torch.t: _t,
    Tensor.transpose: _transpose,
    torch.transpose: _transpose,
    Tensor.to: _to,
    Tensor.float: _cast(torch.float32),
    Tensor.double: _cast(torch.float64),
    Tensor.bfloat16: _cast(torch.bfloat16),
    Tensor.half: _cast(torch.float16),
    F.linear: _linear,
    Tensor.matmul: _matmul(torch.matmul),
    torch.matmul: _matmul(torch.matmul),
    Tensor.mm: _matmul(torch.mm),
    torch.mm: _matmul(torch.mm),
    Tensor.bmm: _matmul(torch.bmm),
    torch.bmm: _matmul(torch.bmm),
    torch._grouped_mm: _grouped(_by_torch),
    Tensor.data_ptr: _data_ptr,
}
OF_VALUES = {"T", "mT", "H", "mH", "real", "imag"}  # attributes of a tensor that are made of its values
LOOKS: frozenset[Any] = frozenset(  # what has no need of the values
    [v.__get__ for k, v in vars(torch._C.TensorBase).items() if isgetsetdescriptor(v) and k not in OF_VALUES]
    + [Tensor.size, Tensor.dim, Tensor.numel, Tensor.stride, Tensor.storage_offset, Tensor.untyped_storage]
    + [Tensor.is_floating_point, Tensor.is_contiguous, Tensor.is_conj, Tensor.is_neg, Tensor.is_inference]
    + [Tensor._is_view]
)
NAMED_RULES: Mapping[str, Callable[..., Any]] = {GROUPED_PRODUCT: _grouped(_by_transformers)}  # it may not be there yet
