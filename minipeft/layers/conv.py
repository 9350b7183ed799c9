"""Convolutions: ``torch.nn.Conv1d``, ``Conv2d`` and ``Conv3d`` with any stride, padding, dilation and groups."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minipeft.class_swap import plain_class
from minipeft.errors import TargetError
from minipeft.layers.base import LayerOps, has_plain_weight
from minipeft.registry import register_layer

FORWARDS = frozenset({nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward})
POINTWISE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class ConvOps(LayerOps):
    """W is the kernel, (out, in / groups * kernel size), and stands for the same linear map of every patch of the input.

    A is a convolution with the layer's own kernel size, stride, padding, dilation and groups, B one of size 1. As the
    groups of the layer share one A, any rank goes with any groups, and the update is ``B A`` whatever these are; PEFT's
    has an A that mixes the groups, which no grouped layer can hold, so with groups the files differ in shape.

    A subclass with a ``forward`` of its own is refused: what it does around the convolution, the update would miss.
    """

    def accepts(self, base: Any) -> bool:
        kernel = (base.out_channels, base.in_channels // base.groups, *base.kernel_size)
        own_forward = getattr(plain_class(type(base)), "forward", None) not in FORWARDS
        return not own_forward and has_plain_weight(base, kernel)

    def shape(self, base: Any) -> tuple[int, int]:
        return base.out_channels, base.weight[0].numel()

    def down_shape(self, base: Any, r: int) -> tuple[int, ...]:
        return r, *base.weight.shape[1:]

    def up_shape(self, base: Any, r: int) -> tuple[int, ...]:
        return base.out_channels, r, *_ones(base)

    def magnitude_shape(self, base: Any) -> tuple[int, ...]:
        return 1, base.out_channels, *_ones(base)

    def read_weight(self, base: Any) -> Tensor:
        return base.weight.flatten(1)

    @torch.no_grad()
    def write_weight(self, base: Any, weight: Tensor, bias: Tensor | None) -> nn.Module:
        base.weight.copy_(weight.view(base.weight.shape))
        if bias is not None:
            base.bias.copy_(bias)
        return base

    def project_in(self, base: Any, x: Tensor, A: Tensor) -> Tensor:
        """Shape (batch, groups * r, *positions)."""
        kernel = A.reshape(len(A), *base.weight.shape[1:])
        # The layer's own method, since it knows every padding mode.
        return base._conv_forward(x, kernel.repeat(base.groups, *(1 for _ in kernel.shape[1:])), None)

    def project_out(self, base: Any, h: Tensor, B: Tensor) -> Tensor:
        ones = _ones(base)
        return POINTWISE[len(ones)](h, B.reshape(len(B), -1, *ones), groups=base.groups)

    def scale_out(self, base: Any, y: Tensor, v: Tensor) -> Tensor:
        return y * v.reshape(-1, *_ones(base))

    def in_channels(self, base: Any) -> int:
        if base.groups > 1:
            raise TargetError(
                f"{type(base).__name__} with groups={base.groups}: its input features cannot be scaled one by one in the "
                "weight, of which a column is for one feature of each group."
            )
        return base.in_channels

    def scale_in(self, base: Any, x: Tensor, v: Tensor) -> Tensor:
        return x * v.reshape(-1, *_ones(base))

    def example_input(self, base: Any) -> Tensor:
        weight: Tensor = base.weight
        reach = [d * (k - 1) + 2 for d, k in zip(base.dilation, base.kernel_size, strict=True)]
        return torch.randn(2, base.in_channels, *reach, dtype=weight.dtype, device=weight.device)


def _ones(base: Any) -> tuple[int, ...]:
    """The size of a kernel of size 1, of as many dimensions as the layer's."""
    return (1,) * len(base.kernel_size)


@register_layer(nn.Conv1d)
class Conv1dOps(ConvOps):
    """``nn.Conv1d``."""

    def example(self, in_features: int, out_features: int) -> nn.Module | None:
        return nn.Conv1d(in_features, out_features, 2, stride=1, padding=1, groups=2)


@register_layer(nn.Conv2d)
class Conv2dOps(ConvOps):
    """``nn.Conv2d``."""

    def example(self, in_features: int, out_features: int) -> nn.Module | None:
        return nn.Conv2d(in_features, out_features, 2, stride=2, padding=1, groups=2)


@register_layer(nn.Conv3d)
class Conv3dOps(ConvOps):
    """``nn.Conv3d``."""

    def example(self, in_features: int, out_features: int) -> nn.Module | None:
        return nn.Conv3d(in_features, out_features, 2, stride=1, padding=1, groups=2)
