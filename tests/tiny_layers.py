"""A model around one layer, and what several test files measure on it."""

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


class OneLayer(nn.Module):
    """A model around one layer, so that there is a name to target."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def conv1d(out_features, in_features):
    layer = Conv1D(out_features, in_features)
    nn.init.normal_(layer.bias)
    return layer


def canonical_weight(layer):
    return layer.weight.detach() if isinstance(layer, nn.Linear) else layer.weight.detach().T


def example(layer, dtype=torch.float64):
    """An input, and the same as dense vectors (..., in)."""
    if isinstance(layer, nn.Embedding):
        ids = torch.randint(layer.num_embeddings, (3, 4))
        return ids, nn.functional.one_hot(ids, layer.num_embeddings).to(dtype)
    x = torch.randn(3, 4, canonical_weight(layer).shape[1], dtype=dtype)
    return x, x
