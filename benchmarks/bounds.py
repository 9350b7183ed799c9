"""What no LoRA training step of a frozen GPT-2 can do without: its matrix products, and the work around them."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GPT2LMHeadModel

from minipeft.injection.module_tree import adapted_layers
from minipeft.kernels import matmul
from minipeft.kernels.chunked_cross_entropy import rows_per_chunk


def matrix_products(
    model: GPT2LMHeadModel, batch: int, tokens: int, linear: Callable[..., Tensor]
) -> Callable[[], None]:
    """A call that does the matrix products of one LoRA training step's frozen part, and nothing else.

    That is ``y = x W^T + b`` and ``dx = dy W`` for every linear layer (but for the first, whose dx nobody needs),
    attention forward and backward, and the head in the loss's chunks. What the adapters add is not in it.

    Args:
        model: has the weights.
        batch: sequences in a step.
        tokens: tokens in a sequence, of which the last predicts nothing.
        linear: ``linear(x, weight, bias=None)`` for a weight (out, in): the matrix library.
    """
    weight, width, heads = model.lm_head.weight, model.config.n_embd, model.config.n_head
    new = weight.new_empty
    x = {features: new(batch * tokens, features).normal_() for features in (width, 3 * width, 4 * width)}
    split = (batch, tokens, heads, width // heads)
    q, k, v = (new(split).normal_().transpose(1, 2).requires_grad_() for _ in range(3))
    d_attention = new(split).normal_().transpose(1, 2)
    chunk = rows_per_chunk(weight, weight)
    d_logits = new(chunk, len(weight)).normal_()
    layers = [layer for block in model.transformer.h for layer in (block.attn.c_attn, block.attn.c_proj)]
    layers += [layer for block in model.transformer.h for layer in (block.mlp.c_fc, block.mlp.c_proj)]

    def run() -> None:
        for layer in layers:
            linear(x[layer.nx], layer.weight.t(), layer.bias)
            if layer is not layers[0]:
                linear(x[layer.nf], layer.weight)
        for _ in model.transformer.h:
            with torch.enable_grad():
                y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            torch.autograd.grad(y, (q, k, v), d_attention)
        for rows in x[width][: batch * (tokens - 1)].split(chunk):
            linear(rows, weight)
            linear(d_logits[: len(rows)], weight.t())

    return torch.no_grad()(run)


def other_work(model: nn.Module, batch: int, tokens: int) -> Callable[[], None]:
    """A call that does what a LoRA training step needs besides `matrix_products`, in the fewest and fastest kernels at hand.

    In each block that is two norms and their gradients, GELU and its gradient, two residual sums and their gradients;
    for each adapter ``W + s B A`` in either pass, h = x A^T, g = dy B, and the gradients of A and B; and the softmax
    over the vocabulary with the subtraction that makes it a gradient. Nothing is computed twice.

    Args:
        model: an adapted GPT-2, by minipeft.
        batch: sequences in a step.
        tokens: tokens in a sequence, of which the last predicts nothing.
    """
    width, head = model.config.n_embd, model.lm_head.weight
    new, rows = head.new_empty, batch * tokens
    x = {features: new(rows, features).normal_() for features in (width, 3 * width, 4 * width)}
    statistics = (new(rows, 1).fill_(0.0), new(rows, 1).fill_(1.0))
    chunk = rows_per_chunk(head, head)
    logits, labels = new(chunk, len(head)).normal_(), torch.zeros(chunk, 1, dtype=torch.long, device=head.device)
    layers = [layer for _, layer in adapted_layers(model)]
    block_norms = [norm for block in model.transformer.h for norm in (block.ln_1, block.ln_2)]
    aten = torch.ops.aten

    def run() -> None:
        for norm in block_norms:
            F.layer_norm(x[width], (width,), norm.weight, norm.bias)
            aten.native_layer_norm_backward(
                x[width], x[width], [width], *statistics, norm.weight, norm.bias, [True, False, False]
            )
            torch.add(x[width], x[width])  # the residual sum, and in the backward pass the sum of its gradients
            torch.add(x[width], x[width])
        for _ in model.transformer.h:
            F.gelu(x[4 * width], approximate="tanh")
            aten.gelu_backward(x[4 * width], x[4 * width], approximate="tanh")
        for layer in layers:
            out_features, in_features = layer.ops.shape(layer.base_layer)
            A, B = layer.adapter("default").lora_A, layer.adapter("default").lora_B
            for _ in range(2):
                torch.addmm(layer.base_layer.weight, A.t(), B.t())
            h, g = matmul.narrow(x[in_features], A.t()), matmul.narrow(x[out_features], B)
            matmul.narrow(x[in_features].t(), g)
            matmul.narrow(x[out_features].t(), h)
        for some in x[width][: batch * (tokens - 1)].split(chunk):
            probabilities = torch.softmax(logits[: len(some)], 1)
            probabilities.scatter_add_(1, labels[: len(some)], new(len(some), 1).fill_(-1.0))

    return torch.no_grad()(run)
