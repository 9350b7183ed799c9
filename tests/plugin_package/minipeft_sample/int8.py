"""A layer type: an int8 weight, which cannot hold a merged one."""

import torch
from torch import nn

from minipeft import LayerOps, register_layer


class Int8Linear(nn.Module):
    """A linear map with an int8 weight and one scale per row."""

    def __init__(self, linear):
        super().__init__()
        self.register_buffer("scale", linear.weight.detach().abs().amax(1, keepdim=True) / 127)
        self.register_buffer("codes", (linear.weight.detach() / self.scale).round().to(torch.int8))
        self.bias = linear.bias

    def forward(self, x):
        return nn.functional.linear(x, self.codes * self.scale, self.bias)


@register_layer(Int8Linear)
class Int8Ops(LayerOps):
    """W = codes * scale."""

    def shape(self, base):
        return tuple(base.codes.shape)

    def read_weight(self, base):
        return base.codes * base.scale if isinstance(base, Int8Linear) else base.weight

    def write_weight(self, base, weight, bias):
        linear = nn.Linear(*reversed(weight.shape), bias=bias is not None).to(base.scale)
        linear.load_state_dict({"weight": weight} if bias is None else {"weight": weight, "bias": bias})
        return linear
