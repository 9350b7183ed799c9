"""A model around one layer, and what several test files measure on it."""

import copy

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from minipeft import LoraConfig, get_lora_model


class OneLayer(nn.Module):
    """A model around a copy of one layer, so that there is a name to target; the layer itself stays plain."""

    def __init__(self, layer):
        super().__init__()
        self.layer = copy.deepcopy(layer)

    def forward(self, x):
        return self.layer(x)


def conv1d(out_features, in_features):
    layer = Conv1D(out_features, in_features)
    nn.init.normal_(layer.bias)
    return layer


LAYERS = {
    "linear": lambda: nn.Linear(5, 7),
    "linear_without_bias": lambda: nn.Linear(5, 7, bias=False),
    "square_linear": lambda: nn.Linear(6, 6),
    "conv1d": lambda: conv1d(7, 5),
    "square_conv1d": lambda: conv1d(6, 6),
    "embedding": lambda: nn.Embedding(9, 6),
    "embedding_with_padding": lambda: nn.Embedding(9, 6, padding_idx=0),
}


def adapted_layer(name, dtype=torch.float64, **options):
    """A layer, and a model around it with a LoRA adapter that already acts."""
    layer = LAYERS[name]().to(dtype)
    config = LoraConfig(target_modules=["layer"], **{"init_lora_weights": False, **options})
    return layer, get_lora_model(OneLayer(layer), config)


def canonical_weight(layer):
    return layer.weight.detach() if isinstance(layer, nn.Linear) else layer.weight.detach().T


def example(layer, dtype=torch.float64):
    """An input, and the same as dense vectors (..., in)."""
    if isinstance(layer, nn.Embedding):
        ids = torch.randint(layer.num_embeddings, (3, 4))
        return ids, nn.functional.one_hot(ids, layer.num_embeddings).to(dtype)
    x = torch.randn(3, 4, canonical_weight(layer).shape[1], dtype=dtype)
    return x, x
