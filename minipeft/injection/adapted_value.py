"""The value that code gets if it reads ``layer.weight`` or ``layer.bias`` of an adapted layer instead of calling it.

Mamba's kernels, WavLM's attention and fused losses multiply by a layer's weight themselves. Some code only looks at its
dtype or shape, so the value is computed when something needs it, and not before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_map_only

from minipeft.kernels.transformed import is_transformed

Compute = Callable[[], Tensor]


class AdaptedValue(Tensor):
    """A parameter of a layer with its adapters folded in. Its dtype, shape and device are the parameter's own.

    Any operation computes the value, with gradients for the adapters. What changes it in place, and ``.data``, goes to the
    parameter itself, as initialisation means it.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    own: Tensor
    compute: Compute
    value: Tensor | None

    @staticmethod
    def __new__(cls, own: Tensor, compute: Compute) -> AdaptedValue:
        made: AdaptedValue = Tensor._make_wrapper_subclass(
            cls, own.shape, strides=own.stride(), dtype=own.dtype, device=own.device, requires_grad=False
        )
        made.own, made.compute, made.value = own, compute, None
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        arguments = func._schema.arguments
        written = {a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write}

        def given(name: str, value: Any) -> Any:
            return tree_map_only(AdaptedValue, cls.written if name in written else cls.computed, value)

        positional = [given(argument.name, value) for argument, value in zip(arguments, args, strict=False)]
        return func(*positional, **{name: given(name, value) for name, value in (kwargs or {}).items()})

    def __setitem__(self, index: Any, value: Any) -> None:
        self.written()[index] = value

    def computed(self) -> Tensor:
        """The value, computed at the first call."""
        if self.value is None:
            with torch.no_grad():
                self.value = self.compute()
        return self.value

    def written(self) -> Tensor:
        """The parameter, about to be changed in place."""
        self.value = None
        return self.own

    @property
    def data(self) -> Tensor:
        return self.own.data

    @data.setter
    def data(self, value: Tensor) -> None:
        self.own.data = value

    @property
    def requires_grad(self) -> bool:
        return bool(Tensor.requires_grad.__get__(self))  # type: ignore[attr-defined]

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.own.requires_grad = value

    def requires_grad_(self, requires_grad: bool = True) -> AdaptedValue:
        self.own.requires_grad_(requires_grad)
        return self

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return repr(self.computed())


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, compute: Compute, kind: type[AdaptedValue], *parameters: Tensor) -> Tensor:
        ctx.compute = compute
        ctx.save_for_backward(own if own.requires_grad else None, *parameters)
        return kind(own, compute)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needs = (ctx.needs_input_grad[0], *ctx.needs_input_grad[3:])
        needed = [p for p, needs_it in zip(ctx.saved_tensors, needs, strict=True) if needs_it]
        with torch.enable_grad():
            value = ctx.compute()
        if not value.requires_grad:  # a bias that the adapters turn out to leave alone
            return (None,) * (2 + len(needs))
        grads = iter(torch.autograd.grad(value, needed, grad, allow_unused=True))
        of_own, *of_parameters = (next(grads) if needs_it else None for needs_it in needs)
        return of_own, None, None, *of_parameters


def adapted_value(
    own: Tensor, compute: Compute, parameters: Sequence[Tensor], kind: type[AdaptedValue] = AdaptedValue
) -> Tensor:
    """`own` with adapters folded in, computed when it is needed; under a compiler or a function transform, at once.

    `compute` gives the value in the shape and dtype of `own`, differentiable in `parameters`, those of the adapters.
    """
    if is_transformed():
        return compute()
    if torch.is_grad_enabled() and any(p.requires_grad for p in (own, *parameters)):
        value: Tensor = _Read.apply(own, compute, kind, *parameters)  # type: ignore[no-untyped-call,unused-ignore]
        return value
    return kind(own, compute)
