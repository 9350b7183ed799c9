"""``torch.nn.MultiheadAttention``, whose packed input projection and output projection are read and not called."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from minipeft.class_swap import plain_class
from minipeft.layers.base import LayerOps
from minipeft.layers.uncalled import ReadOps
from minipeft.registry import register_layer


class OutProjectionOps(ReadOps):
    """``out_proj``, adapted along with the attention that reads it."""

    reads = "weight"


OUT_PROJECTION = OutProjectionOps()


@register_layer(nn.MultiheadAttention)
class MultiheadAttentionOps(ReadOps):
    """W is ``in_proj_weight``, (3 * embed_dim, embed_dim), for query, key and value together, as in PEFT.
    The files are PEFT's too, but PEFT (0.21.2) adds the update of ``out_proj`` twice, and here it counts once.

    With a `kdim` or `vdim` of their own there is no packed weight, and the instance is refused; ``target_parameters=
    ["attn.q_proj_weight", "attn.k_proj_weight", "attn.v_proj_weight"]`` adapts those. So is a subclass with a
    ``forward`` of its own, which may call what this class reads.
    """

    reads = "in_proj_weight"

    def accepts(self, base: Any) -> bool:
        own_forward = getattr(plain_class(type(base)), "forward", None) is not nn.MultiheadAttention.forward
        return not own_forward and super().accepts(base) and OUT_PROJECTION.accepts(base.out_proj)

    def read_children(self, base: Any) -> Mapping[str, LayerOps]:
        return {"out_proj": OUT_PROJECTION}

    def example_input(self, base: Any) -> Tensor:
        weight = self.read_weight(base)
        return torch.randn(3, 2, weight.shape[1], dtype=weight.dtype, device=weight.device)

    def example(self, in_features: int, out_features: int) -> nn.Module | None:
        return nn.MultiheadAttention(in_features, 2)

    def example_call(self, layer: nn.Module, x: Tensor) -> Tensor:
        return layer(x, x.flip(0), x)[0]
