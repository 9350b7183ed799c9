"""What quantized linear layers share: they are frozen, read by dequantizing, and replaced by a float layer when merged."""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from minipeft.kernels.frozen_linear import Weight, can_fuse, frozen_linear
from minipeft.kernels.transformed import is_transformed
from minipeft.layers.base import LayerOps, layer_ops
from minipeft.registry import registry


class QuantizedLinearOps(LayerOps):
    """A linear layer with a quantized weight, y = dequantized(W) x + b.

    A subclass must have `dequantized`, and should have `accepts`. With `calls_linear` training never keeps a float weight,
    and with `kinds` and `quantize` the layer can be made by `minipeft.quantize`.

    If it stands in for a layer that stores (in, out), such as GPT-2's Conv1D, its attribute ``source_cls`` says so, which
    transformers and `minipeft.quantize` set. The float layer that replaces it is then of that type.
    """

    in_all_linear = True
    is_quantized = True
    kinds: ClassVar[tuple[str, ...]] = ()  # what `minipeft.quantize` calls the layers that `quantize` makes

    @abstractmethod
    def dequantized(self, base: Any, dtype: torch.dtype | None = None) -> Tensor:
        """A new tensor with the weight, shape (out, in), without history.

        Args:
            base: the layer.
            dtype: as the layer's own call multiplies by it in this dtype. None: in one that loses nothing.
        """

    def calls_linear(self, base: Any, x: Tensor) -> bool:
        """Whether calling this layer on x now computes ``F.linear(x, dequantized(base, x.dtype), b)`` and nothing else.

        That is not so if it rounds its input, or computes in another dtype than x's. Under autocast it may compute in
        autocast's dtype, but its output must have the dtype of x.
        """
        return False

    def quantize(self, kind: str, weight: Tensor, bias: Tensor | None) -> nn.Module:
        """A quantized, frozen layer of one of the `kinds`, from a float weight (out, in) and bias (out,), left unchanged.

        Raises:
            ImportError: the package for it is missing.
            ValueError: it cannot quantize such a weight.
        """
        raise ValueError(f"there is no quantized layer of the kind {kind!r}")

    def transformers_config(self, kind: str, dtype: torch.dtype, in_float: Sequence[str], transposed: bool) -> Any:
        """The ``quantization_config`` with which transformers loads a saved model with such layers; None if it cannot.

        Args:
            kind: one of the `kinds`.
            dtype: of the model's other weights.
            in_float: names of the linear layers that are not quantized.
            transposed: whether some stand in for layers that store (in, out), such as GPT-2's.
        """
        return None

    def linear_weight(self, base: Any, x: Tensor) -> Weight | None:
        return self._maker(base, x) if base.training else None  # evaluation is the layer's own, bit for bit

    def call(self, base: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        if not base.training and not args and not kwargs and x.requires_grad:
            # The layer's own output, but its backward pass might keep the weight in float.
            weight, bias = self._maker(base, x), self.read_bias(base)
            if weight is not None and can_fuse(x, weight, bias):
                return frozen_linear(x, weight, bias, base)
        return super().call(base, x, *args, **kwargs)

    def _maker(self, base: Any, x: Tensor) -> Weight | None:
        # Without a gradient there is nothing to keep, and the layer's own kernels may be better.
        if is_transformed() or not torch.is_grad_enabled() or not self.calls_linear(base, x):
            return None
        return functools.partial(self.dequantized, base)

    def shape(self, base: Any) -> tuple[int, int]:
        return base.out_features, base.in_features

    def read_weight(self, base: Any) -> Tensor:
        if next(base.parameters()).is_meta:
            return torch.empty(self.shape(base), device="meta")
        ops = layer_ops(base)  # while an adapter is merged, the base is the float layer that `write_weight` returned
        return self.dequantized(base) if ops is None or ops == self else ops.read_weight(base)

    @torch.no_grad()
    def write_weight(self, base: Any, weight: Tensor, bias: Tensor | None) -> nn.Module:
        out_features, in_features = weight.shape
        source: Any = getattr(base, "source_cls", nn.Linear)
        transposed = any(ops.fan_in_fan_out for _, ops in registry.layer_candidates(source))
        with torch.device("meta"):  # no memory and no random numbers for values that are replaced at once
            layer: nn.Module
            if transposed:
                layer = source(out_features, in_features)
            else:
                layer = nn.Linear(in_features, out_features, bias is not None)
        stored = weight.t() if transposed else weight
        layer.weight = nn.Parameter(stored.clone(memory_format=torch.contiguous_format), False)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().to(weight.dtype, copy=True), False)
        return layer.train(base.training)

    def example_input(self, base: Any) -> Tensor:
        bias = self.read_bias(base)
        dtype = torch.float32 if bias is None else bias.dtype
        return torch.randn(4, self.shape(base)[1], dtype=dtype, device=next(base.parameters()).device)


def quantizers() -> dict[str, QuantizedLinearOps]:
    """The kinds of quantized layers that can be made, plugins' included, and the ops that make them."""
    registry.load_plugins()
    known = [ops for ops in registry.layers().values() if isinstance(ops, QuantizedLinearOps)]
    return {kind: ops for ops in known for kind in ops.kinds}


def with_bias(layer: nn.Module, bias: Tensor | None) -> nn.Module:
    """A layer that was made on the meta device, with a frozen copy of this bias, if any."""
    if bias is not None:
        layer.bias = nn.Parameter(bias.clone(), False)
    return layer
