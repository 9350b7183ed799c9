import torch
from transformers.pytorch_utils import Conv1D


@torch.no_grad()
def merge(layer, lora_A, lora_B, scaling):
    kept = layer.weight.clone()
    update = scaling * (lora_B.float() @ lora_A.float())
    if isinstance(layer, Conv1D):
        update = update.T
    layer.weight.copy_(kept.float() + update)
    return kept


@torch.no_grad()
def unmerge(layer, kept):
    layer.weight.copy_(kept)
