"""``torch.nn.Embedding``: a linear map of a one-hot input, which is given as an index."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minipeft.layers.base import LayerOps, has_plain_weight, store
from minipeft.registry.registry import register_layer


@register_layer(nn.Embedding)
class EmbeddingOps(LayerOps):
    """W is the transposed table, (embedding_dim, num_embeddings). Gemma's ``embed_scale`` scales the update too.

    A subclass with its own ``forward`` is accepted only if that scale explains it. OPT's positions, for example, shift
    their indices inside, so an update would be added at the wrong rows.
    """

    is_embedding = True

    def shape(self, base: Any) -> tuple[int, int]:
        return base.embedding_dim, base.num_embeddings

    def read_weight(self, base: Any) -> Tensor:
        return base.weight.t()

    def write_weight(self, base: Any, weight: Tensor, bias: Tensor | None) -> nn.Module:
        store(base.weight, weight.t())
        return base

    def accepts(self, base: Any) -> bool:
        own_forward = type(base).forward is not nn.Embedding.forward
        known = not own_forward or _scale(base) is not None
        return known and base.max_norm is None and has_plain_weight(base, (base.num_embeddings, base.embedding_dim))

    def project_in(self, base: Any, x: Tensor, A: Tensor) -> Tensor:
        return F.embedding(x, A.t(), padding_idx=base.padding_idx)

    def scaled(self, base: Any, y: Tensor) -> Tensor:
        scale = _scale(base)
        return y if scale is None else y * scale

    def example_input(self, base: Any) -> Tensor:
        return torch.randint(base.num_embeddings, (8,), device=base.weight.device)


def _scale(base: Any) -> Any:
    """The factor by which a scaled embedding multiplies its rows, a number or a one-element tensor; else None."""
    scale = getattr(base, "embed_scale", None)
    if isinstance(scale, Tensor):
        return scale.to(base.weight.dtype) if scale.numel() == 1 else None
    return scale if isinstance(scale, int | float) else None
