"""A layer type: a weight in eight bits, which cannot hold a merged one."""

import torch
from torch import nn

from minipeft import LayerOps, register_layer


class Int8Linear(nn.Module):
    """A linear map with one int8 weight and one scale a row."""

    def __init__(self, linear):
        super().__init__()
        self.register_buffer("scale", linear.weight.detach().abs().amax(1, keepdim=True) / 127)
        self.register_buffer("packed", (linear.weight.detach() / self.scale).round().to(torch.int8))
        self.bias = linear.bias

    def forward(self, x):
        return nn.functional.linear(x, self.packed * self.scale, self.bias)


@register_layer(Int8Linear)
class Int8Ops(LayerOps):
    """W = packed * scale."""

    def shape(self, base):
        return tuple(base.packed.shape)

    def read_weight(self, base):
        return base.packed * base.scale if isinstance(base, Int8Linear) else base.weight

    def write_weight(self, base, weight, bias):
        linear = nn.Linear(*reversed(weight.shape), bias=bias is not None).to(base.scale)
        linear.load_state_dict({"weight": weight} if bias is None else {"weight": weight, "bias": bias})
        return linear

    def example(self, in_features, out_features):
        return Int8Linear(nn.Linear(in_features, out_features))
