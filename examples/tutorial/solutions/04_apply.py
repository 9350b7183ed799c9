import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


class LoraLayer(nn.Module):
    def __init__(self, base, r, lora_alpha):
        super().__init__()
        weight = base.weight.T if isinstance(base, Conv1D) else base.weight
        out_features, in_features = weight.shape
        self.base_layer = base.requires_grad_(False)
        self.lora_A = nn.Parameter(torch.randn(r, in_features) / r)
        self.lora_B = nn.Parameter(torch.zeros(out_features, r))
        self.scaling = lora_alpha / r

    def forward(self, x):
        return self.base_layer(x) + self.scaling * (x @ self.lora_A.T @ self.lora_B.T)


def apply_lora(model, names, r, lora_alpha):
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and name.split(".")[-1] in names
    ]
    if not found:
        raise ValueError(f"no layer is called {names}")
    model.requires_grad_(False)
    for name, module in found:
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, LoraLayer(module, r, lora_alpha))
    return [name for name, _ in found]
