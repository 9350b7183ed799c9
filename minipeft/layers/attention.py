"""``torch.nn.MultiheadAttention``, which reads its two projection weights without calling a layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from minipeft.layers.uncalled import UncalledOps
from minipeft.python.class_swap import plain_class
from minipeft.registry.registry import register_layer


@register_layer(nn.MultiheadAttention)
class MultiheadAttentionOps(UncalledOps):
    """W is ``in_proj_weight``, (3 * embed_dim, embed_dim), for query, key and value together, as in PEFT.

    ``out_proj`` is adapted with it. PEFT (up to 0.21.2) adds the update of ``out_proj`` twice, so this is what its files
    mean: here, too, that update is ``2 * lora_alpha / r * B A``.

    An instance with its own `kdim` or `vdim` has no joint weight and is refused; ``target_parameters=
    ["attn.q_proj_weight", "attn.k_proj_weight", "attn.v_proj_weight"]`` adapts it. So is a subclass with its own
    ``forward``, which may call what this class only reads.
    """

    children: ClassVar[Mapping[str, UncalledOps]] = {"out_proj": UncalledOps("weight", update_count=2)}

    def __init__(self) -> None:
        super().__init__("in_proj_weight")

    def accepts(self, base: Any) -> bool:
        own_forward = getattr(plain_class(type(base)), "forward", None) is not nn.MultiheadAttention.forward
        return not own_forward and super().accepts(base)

    def example_input(self, base: Any) -> Tensor:
        weight = self.read_weight(base)
        return torch.randn(3, 2, weight.shape[1], dtype=weight.dtype, device=weight.device)
