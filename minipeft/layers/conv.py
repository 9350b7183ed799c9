"""Convolutions: ``torch.nn.Conv1d``, ``Conv2d`` and ``Conv3d`` with any stride, padding, dilation and groups."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minipeft.errors import TargetError
from minipeft.layers.base import LayerOps, has_plain_weight, store
from minipeft.python.class_swap import plain_class
from minipeft.registry.registry import register_layer

FORWARDS = frozenset({nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward})
POINTWISE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@register_layer(nn.Conv1d)
@register_layer(nn.Conv2d)
@register_layer(nn.Conv3d)
class ConvOps(LayerOps):
    """W is the kernel, (out, in / groups * kernel size), a linear map of every patch of the input.

    A is a convolution with the layer's own kernel size, stride, padding, dilation and groups, B one with kernel size 1.
    All groups share one A, so any rank goes with any number of groups, and the update is always ``B A``. PEFT's A mixes
    the groups, which a grouped layer cannot hold, so with groups the files differ in shape.

    A subclass with its own ``forward`` is refused, since the update would miss what that does around the convolution.
    """

    def shape(self, base: Any) -> tuple[int, int]:
        return base.out_channels, math.prod(_patch(base))

    def read_weight(self, base: Any) -> Tensor:
        return base.weight.flatten(1)

    def write_weight(self, base: Any, weight: Tensor, bias: Tensor | None) -> nn.Module:
        store(base.weight, weight.view(base.weight.shape))
        if bias is not None:
            store(base.bias, bias)
        return base

    def accepts(self, base: Any) -> bool:
        kernel = (base.out_channels, *_patch(base))
        own_forward = getattr(plain_class(type(base)), "forward", None) not in FORWARDS
        return not own_forward and has_plain_weight(base, kernel)

    def example_input(self, base: Any) -> Tensor:
        weight: Tensor = base.weight
        reach = [d * (k - 1) + 2 for d, k in zip(base.dilation, base.kernel_size, strict=True)]
        return torch.randn(2, base.in_channels, *reach, dtype=weight.dtype, device=weight.device)

    def project_in(self, base: Any, x: Tensor, A: Tensor) -> Tensor:
        """Shape (batch, groups * r, *positions)."""
        kernel = A.reshape(len(A), *_patch(base))
        # The layer's own method handles every padding mode.
        return base._conv_forward(x, kernel.repeat(base.groups, *(1 for _ in kernel.shape[1:])), None)

    def project_out(self, base: Any, h: Tensor, B: Tensor) -> Tensor:
        ones = _ones(base)
        return POINTWISE[len(ones)](h, B.reshape(len(B), -1, *ones), groups=base.groups)

    def per_feature(self, base: Any, v: Tensor) -> Tensor:
        return v.reshape(-1, *_ones(base))

    def in_features(self, base: Any) -> int:
        if base.groups > 1:
            raise TargetError(
                f"{type(base).__name__} with groups={base.groups}: its input features cannot be scaled one by one in the "
                "weight, since each column is shared by one feature of every group."
            )
        return base.in_channels

    def factor_shapes(self, base: Any, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (r, *_patch(base)), (base.out_channels, r, *_ones(base))


def _patch(base: Any) -> tuple[int, ...]:
    """What one output feature sees: (in / groups, *kernel size). The weight may be elsewhere, as the first FSDP holds it."""
    return base.in_channels // base.groups, *base.kernel_size


def _ones(base: Any) -> tuple[int, ...]:
    """The size of a kernel of size 1 with as many dimensions as the layer's."""
    return (1,) * len(base.kernel_size)
