"""Exercise 05: train a whole model.

`model` is a small GPT-2 of transformers. `batches` is a list of token ids, each of shape (batch, length). The model
returns the loss itself, as `model(input_ids=ids, labels=ids).loss`. Then: minipeft learn check 05
"""

import torch

import minipeft


def prepare(model):
    """Adapt the model with LoRA by minipeft.get_lora_model, r = 8 on the layers called c_attn, and return it."""
    raise NotImplementedError


def make_optimizer(model):
    """An AdamW for what trains, with a learning rate that suits LoRA."""
    raise NotImplementedError


def train(model, optimizer, batches):
    """One step for each batch, in order. Returns the loss of each step, as a list of floats."""
    raise NotImplementedError
