"""``torch.nn.Linear``, and GPT-2's ``Conv1D``, which stores the transposed weight."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from minipeft.ecosystem.transformers_model import has_other_output
from minipeft.layers.base import LayerOps, has_plain_weight, is_plain, runs_only, store
from minipeft.python.class_swap import plain_class
from minipeft.registry.registry import register_layer


@register_layer(nn.Linear)
class LinearOps(LayerOps):
    """``nn.Linear`` and its subclasses, if their weight is an ordinary (out, in) tensor."""

    in_all_linear = True

    def shape(self, base: Any) -> tuple[int, int]:
        weight, rows = base._parameters.get("weight"), base.out_features
        if is_plain(weight) and weight.ndim == 2 and len(weight) > rows:
            rows = len(weight)  # `resize_token_embeddings` leaves `out_features` of Marian's head as it was
        return rows, base.in_features

    def read_weight(self, base: Any) -> Tensor:
        return base.weight

    def write_weight(self, base: Any, weight: Tensor, bias: Tensor | None) -> nn.Module:
        store(base.weight, weight)
        if bias is not None:
            store(base.bias, bias)
        return base

    def accepts(self, base: Any) -> bool:
        # nn.MultiheadAttention never calls its out_proj, which is of this type, so an adapter there would do nothing.
        never_called = isinstance(base, nn.modules.linear.NonDynamicallyQuantizableLinear)
        if never_called or has_other_output(base):
            return False
        usual = base.out_features, base.in_features
        return has_plain_weight(base, usual) or has_plain_weight(base, self.shape(base))

    def linear_weight(self, base: Any, x: Tensor) -> Tensor | None:
        return base.weight if runs_only(base, nn.Linear.forward) else None


@register_layer("transformers.pytorch_utils.Conv1D")
class Conv1DOps(LinearOps):
    """The ``Conv1D`` of GPT-2's family: y = x W + b with W stored as (in, out)."""

    fan_in_fan_out = True

    def shape(self, base: Any) -> tuple[int, int]:
        return base.nf, base.nx

    def read_weight(self, base: Any) -> Tensor:
        return base.weight.t()

    def write_weight(self, base: Any, weight: Tensor, bias: Tensor | None) -> nn.Module:
        return super().write_weight(base, weight.t(), bias)

    def accepts(self, base: Any) -> bool:
        return has_plain_weight(base, (base.nx, base.nf))

    def linear_weight(self, base: Any, x: Tensor) -> Tensor | None:
        cls: Any = plain_class(type(base))
        own = cls.__module__ == "transformers.pytorch_utils" and runs_only(base, cls.forward)
        return base.weight.t() if own else None
