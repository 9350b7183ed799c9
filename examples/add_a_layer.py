"""A new layer type for minipeft: a linear readout with the output multiplier of muP (Yang et al., 2022, arXiv:2203.03466).

    y = s W x + b

Its ops say where the weight is, how to write it, and that the layer multiplies W x by s. Every method then works on it,
including those written later.
"""

import torch
from torch import nn

from minipeft import LayerOps, LoraConfig, get_lora_model, register_layer
from minipeft.testing import check_layer


class Readout(nn.Module):
    def __init__(self, in_features, out_features):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(in_features, out_features) / in_features**0.5)
        self.bias = nn.Parameter(torch.zeros(out_features))
        self.multiplier = 4 / in_features

    def forward(self, x):
        return self.multiplier * (x @ self.weight) + self.bias


@register_layer(Readout)
class ReadoutOps(LayerOps):
    def shape(self, base):
        return base.weight.shape[1], base.weight.shape[0]

    def read_weight(self, base):  # always (out, in); this layer stores (in, out)
        return base.weight.t()

    @torch.no_grad()
    def write_weight(self, base, weight, bias):
        base.weight.copy_(weight.t())
        base.bias.copy_(bias)
        return base

    def scaled(self, base, y):  # s y; a layer that computes W x + b needs only the three methods above
        return base.multiplier * y


if __name__ == "__main__":
    print(check_layer(Readout, make=Readout))  # every promise, under every registered method
    net = nn.Sequential(nn.Linear(64, 64), nn.GELU(), Readout(64, 10))
    get_lora_model(net, LoraConfig(r=4, target_modules=["0", "2"])).print_trainable_parameters()
