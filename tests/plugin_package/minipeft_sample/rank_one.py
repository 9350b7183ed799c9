"""A method: the smallest low-rank update there is."""

from dataclasses import dataclass

from torch import nn

from minipeft import Adapter, AdapterConfig, register_method


@dataclass(frozen=True, kw_only=True)
class RankOneConfig(AdapterConfig):
    """No options of its own."""

    method = "rank_one"


@register_method("rank_one")
class RankOne(Adapter):
    """y = W x + b + u (v . x), for u of shape (out, 1) that starts at zero and v of shape (1, in)."""

    config_class = RankOneConfig

    def __init__(self, base, ops, config, shared):
        super().__init__(base, ops, config, shared)
        out_features, in_features = ops.shape(base)
        weight = ops.read_weight(base)
        self.u = nn.Parameter(weight.new_zeros(out_features, 1))
        self.v = nn.Parameter(weight.new_empty(1, in_features).normal_(std=in_features**-0.5))

    def forward(self, base, ops, x, y):
        h = ops.project_in(base, x, self.v.to(y.dtype))
        return y + ops.project_out(base, h, self.u.to(y.dtype))

    def merge(self, weight, bias):
        return weight + (self.u @ self.v).to(weight.dtype), bias
