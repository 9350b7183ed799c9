"""Exercise 02: compute the reduction.

Fill each gap (`raise NotImplementedError`). Then: minipeft learn check 02
"""

# GPT-2 small has 12 blocks. (out, in) of the linear layers of one block:
GPT2 = {
    "attn.c_attn": (2304, 768),
    "attn.c_proj": (768, 768),
    "mlp.c_fc": (3072, 768),
    "mlp.c_proj": (768, 3072),
}


def lora_parameters(out_features, in_features, r):
    """How many numbers LoRA trains on one weight."""
    raise NotImplementedError


def times_fewer(out_features, in_features, r):
    """How many times fewer that is than the weight's own numbers."""
    raise NotImplementedError


def model_parameters(layers, r, blocks=12):
    """How many numbers LoRA trains in a model of `blocks` equal blocks, on each layer of `layers`, a dict like GPT2."""
    raise NotImplementedError


def training_bytes(total, trainable):
    """Bytes that training with AdamW keeps in float32: all `total` weights (the `trainable` ones are among them), and for
    each number that trains its gradient and AdamW's two averages."""
    raise NotImplementedError
