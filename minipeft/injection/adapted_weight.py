"""A module around an adapted parameter that is not a layer's weight, such as the fused experts of a mixture."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.fx import Proxy

from minipeft.injection.adapted_layer import AdaptedLayer
from minipeft.injection.split_weight import Origin, split_weight
from minipeft.injection.wrapper import Wrapper
from minipeft.kernels.transformed import is_compiled, is_transformed
from minipeft.layers.offloaded import present
from minipeft.layers.uncalled import UncalledOps


class AdaptedWeight(AdaptedLayer):
    """A module that reads its weight instead of calling a layer: it runs with the adapted weight in place of its own.

    Two adapted parameters of one module are two of these, one around the other, as in PEFT's files.
    """

    ops: UncalledOps

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if args and isinstance(args[0], Proxy):
            return self.as_one_node(*args, **kwargs)
        with present(self.owner):
            weights = self.adapted_weights()
            if not weights:
                return self.base_layer(*args, **kwargs)
            if torch.jit.is_tracing():  # which `functional_call` refuses
                with _in_place(self.owner, self.ops.parameter, *weights.values()):
                    return self.base_layer(*args, **kwargs)
            return functional_call(self.base_layer, weights, args, kwargs)

    def adapted_weights(self) -> dict[str, Tensor]:
        """The weight with the acting adapters, by its name in the base layer; empty if none acts."""
        acting = self.acting()
        if not acting:
            return {}
        path, inner = "", self.base_layer
        while isinstance(inner, Wrapper):
            path, inner = f"{path}base_layer.", inner.base_layer
        weight = self.split_weight(acting)
        return {f"{path}{self.ops.parameter}": self.adapted_weight(acting) if weight is None else weight}

    def split_weight(self, names: tuple[str, ...]) -> Tensor | None:
        """The parameter with these adapters, formed only if the module does more with it than to multiply by it.

        None if it must be formed at once: for a method that does more than to add a product, or in an export or a trace.
        """
        if is_transformed() and not is_compiled():
            return None
        owner = self.owner
        own: Tensor = getattr(owner, self.ops.parameter)
        found = [self.adapter(name).weight_factors() for name in names]
        factors = [pair for pair in found if pair is not None]
        total = self.ops.low_rank_sum(owner, factors) if len(factors) == len(names) else None
        origin = Origin(f"{type(owner).__name__}.{self.ops.parameter}", own.nbytes)
        return None if total is None else split_weight(total, origin)

    def adapted_weight(self, names: tuple[str, ...]) -> Tensor:
        """The parameter with these adapters, as the module stores it."""
        owner = self.owner
        x, y = self.ops.as_call(owner)
        with torch.autocast(y.device.type, enabled=False):
            for name in names:
                y = self.adapters[name](owner, self.ops, x, y)
        return self.ops.from_call(owner, y)


@contextlib.contextmanager
def _in_place(owner: nn.Module, name: str, value: Any) -> Iterator[None]:
    """Within the context a module has this tensor in the place of its parameter."""
    own, owner._parameters[name] = owner._parameters[name], value
    try:
        yield
    finally:
        owner._parameters[name] = own
