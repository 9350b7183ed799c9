"""Exercise 04: apply it to any Linear and Conv1D.

GPT-2's layers are no nn.Linear but transformers' Conv1D, whose weight is stored as (in, out). Copy your layer from
exercise 03 into this file and make it take both. Then: minipeft learn check 04
"""

from torch import nn
from transformers.pytorch_utils import Conv1D


class LoraLayer(nn.Module):
    """As in exercise 03, around an nn.Linear or a Conv1D; lora_A is (r, in) and lora_B is (out, r) for both."""

    def __init__(self, base, r, lora_alpha):
        super().__init__()
        raise NotImplementedError

    def forward(self, x):
        raise NotImplementedError


def apply_lora(model, names, r, lora_alpha):
    """Put a LoraLayer around every nn.Linear and Conv1D whose own name (the last part of its dotted name) is in `names`.

    Everything else is frozen, too. Returns the dotted names of the layers. Raises a ValueError if there is none.
    """
    raise NotImplementedError
