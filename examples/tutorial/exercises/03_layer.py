"""Exercise 03: write the layer.

    y = W x + b + s B A dropout(x),   s = lora_alpha / r

W and b belong to `base`, an nn.Linear, which is frozen. Only A and B train. Then: minipeft learn check 03
"""

from torch import nn


class LoraLinear(nn.Module):
    def __init__(self, base, r, lora_alpha, dropout=0.0):
        """Keep `base` as self.base_layer, and make the parameters self.lora_A (r, in) and self.lora_B (out, r)."""
        super().__init__()
        raise NotImplementedError

    def forward(self, x):
        """The output, of shape (..., out), for x of shape (..., in)."""
        raise NotImplementedError
