"""What no LoRA training step of a frozen model can do without: its matrix products, and the work around them."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from minipeft.injection.module_tree import adapted_layers
from minipeft.kernels import matmul
from minipeft.kernels.chunked_cross_entropy import rows_per_chunk
from minipeft.layers.base import layer_ops

FIRST = ("c_attn", "q_proj", "k_proj", "v_proj")  # in the first block, whose input nobody needs a gradient of


def matrix_products(
    model: PreTrainedModel, batch: int, tokens: int, linear: Callable[..., Tensor]
) -> Callable[[], None]:
    """A call that does the matrix products of one LoRA training step's frozen part, and nothing else.

    That is ``y = x W^T + b`` and ``dx = dy W`` for every linear layer (but for the first, whose dx nobody needs),
    attention forward and backward, and the head in the loss's chunks. What the adapters add is not in it.

    Args:
        model: a plain GPT-2 or Llama; has the weights.
        batch: sequences in a step.
        tokens: tokens in a sequence, of which the last predicts nothing.
        linear: ``linear(x, weight, bias=None)`` for a weight (out, in): the matrix library.
    """
    config, head = model.config, model.get_output_embeddings().weight
    new, heads, width = head.new_empty, config.num_attention_heads, config.hidden_size
    layers = {name: (layer, ops) for name, layer in model.named_modules() if (ops := layer_ops(layer)) is not None}
    layers = {name: pair for name, pair in layers.items() if not pair[1].is_embedding and name != "lm_head"}
    x = {size: new(batch * tokens, size).normal_() for layer, ops in layers.values() for size in ops.shape(layer)}
    groups = getattr(config, "num_key_value_heads", heads)

    def states(count: int) -> Tensor:
        return new(batch, tokens, count, width // heads).normal_().transpose(1, 2)

    q, k, v = (states(count).requires_grad_() for count in (heads, groups, groups))
    d_attention, chunk = states(heads), rows_per_chunk(head, head)
    d_logits = new(chunk, len(head)).normal_()

    def run() -> None:
        for name, (layer, ops) in layers.items():
            weight, bias = ops.read_weight(layer), ops.read_bias(layer)
            out_features, in_features = weight.shape
            linear(x[in_features], weight, bias)
            if not (".0." in name and name.endswith(FIRST)):
                linear(x[out_features], weight.t())
        for _ in range(config.num_hidden_layers):
            with torch.enable_grad():
                y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=groups < heads)
            torch.autograd.grad(y, (q, k, v), d_attention)
        for rows in x[width][: batch * (tokens - 1)].split(chunk):
            linear(rows, head)
            linear(d_logits[: len(rows)], head.t())

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
