"""What quantized linear layers have in common: frozen, read by dequantizing, and replaced by a float layer to be written."""

from __future__ import annotations

import functools
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from minipeft import registry
from minipeft.kernels.frozen_linear import Weight, can_fuse, frozen_linear
from minipeft.layers.base import LayerOps


class QuantizedLinearOps(LayerOps):
    """A linear map with a packed weight, y = dequantized(W) x + b; a subclass says how to tell one and how to unpack it.

    Where one stands in the place of a layer that stores (in, out), as GPT-2's Conv1D does, its attribute ``source_cls``
    says so: transformers and `minipeft.quantize` set it, and the float layer that replaces it is of that type again.
    """

    in_all_linear = True
    is_quantized = True

    @abstractmethod
    def dequantized(self, base: Any) -> Tensor:
        """The weight unpacked, shape (out, in): a fresh tensor of a dtype that loses nothing."""

    def dequantized_in(self, base: Any, dtype: torch.dtype) -> Tensor:
        """The weight in this dtype, as the layer's own call multiplies by it: a fresh tensor."""
        return self.dequantized(base).to(dtype)

    def is_float_call(self, base: Any, x: Tensor) -> bool:
        """Whether calling this instance on x now does ``F.linear(x, dequantized_in(base, x.dtype), b)`` and nothing beside.

        Where it rounds its input, or computes in another dtype than that of x, it does not. Under autocast, in whose
        dtype it then computes, its output has to have the dtype of x all the same.
        """
        return False

    def weight_of_call(self, base: Any, x: Tensor) -> Weight | None:
        # Evaluation is the layer's own, to the bit, whether or not a gradient could be wanted.
        return self._maker(base, x) if base.training else None

    def _maker(self, base: Any, x: Tensor) -> Weight | None:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not self.is_float_call(base, x):
            return None  # without a gradient there is nothing to keep, and the layer's own kernels may be better
        return functools.partial(_made, self, base)

    def run(self, base: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        if not args and not kwargs and x.requires_grad:
            weight, bias = self._maker(base, x), self.read_bias(base)
            if weight is not None and can_fuse(x, weight, bias):
                return frozen_linear(x, weight, bias, None if base.training else base)
        return base(x, *args, **kwargs)

    def shape(self, base: Any) -> tuple[int, int]:
        return base.out_features, base.in_features

    def read_weight(self, base: Any) -> Tensor:
        if next(base.parameters()).is_meta:
            return torch.empty(self.shape(base), device="meta")
        ops = next(ops for _, ops in registry.layer_candidates(type(base)) if ops.accepts(base))
        # The base may be the float layer that `write_weight` gave, while an adapter is merged.
        return self.dequantized(base) if ops == self else ops.read_weight(base)

    @torch.no_grad()
    def write_weight(self, base: Any, weight: Tensor, bias: Tensor | None) -> nn.Module:
        out_features, in_features = weight.shape
        source: Any = getattr(base, "source_cls", nn.Linear)
        transposed = any(ops.fan_in_fan_out for _, ops in registry.layer_candidates(source))
        with torch.device("meta"):  # no memory and no random numbers for values that are replaced at once
            layer: nn.Module = (
                source(out_features, in_features)
                if transposed
                else nn.Linear(in_features, out_features, bias is not None)
            )
        stored = weight.t() if transposed else weight
        layer.weight = nn.Parameter(stored.clone(memory_format=torch.contiguous_format), False)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().to(weight.dtype, copy=True), False)
        return layer.train(base.training)

    def example_input(self, base: Any) -> Tensor:
        bias = self.read_bias(base)
        dtype = torch.float32 if bias is None else bias.dtype
        return torch.randn(4, self.shape(base)[1], dtype=dtype, device=next(base.parameters()).device)

    def example(self, in_features: int, out_features: int) -> nn.Module | None:
        linear = nn.Linear(8 * in_features, 8 * out_features)  # whole blocks of 64 weights
        return self.quantize(self.kinds[0], linear.weight.detach(), linear.bias.detach())


@torch.no_grad()
def _made(ops: QuantizedLinearOps, base: nn.Module, dtype: torch.dtype) -> Tensor:
    return ops.dequantized_in(base, dtype)


def with_bias(layer: nn.Module, bias: Tensor | None) -> nn.Module:
    """A layer that was made on the meta device, with a frozen copy of this bias, if any."""
    if bias is not None:
        layer.bias = nn.Parameter(bias.clone(), False)
    return layer
