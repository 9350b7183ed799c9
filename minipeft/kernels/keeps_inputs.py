"""A cheap function as one autograd node that keeps its inputs alone, and is computed again in the backward pass.

Composed of single operations, ``act(gate) * up`` (SwiGLU and its like, arXiv:2002.05202) also keeps ``act(gate)``, one of
the widest arrays in a model; and in half precision transformers' RMSNorms keep a float32 copy of their input.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minipeft.kernels import recompute
from minipeft.kernels.transformed import is_transformed

ELEMENTS = {"cpu": 2**19, "cuda": 2**26}  # computed again at a time, so that what is made in between stays in a cache


def keeping_inputs(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """``function(*inputs)``.

    Args:
        function: a pure function of each row by itself, in which nothing else trains; see `recompute.with_back`.
        inputs: tensors of the result's shape, (..., features).
    """
    if is_transformed():
        return function(*inputs)
    return _KeepsInputs.apply(function, *inputs)  # type: ignore[no-untyped-call,unused-ignore]


class _KeepsInputs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs)
        ctx.function = function
        return function(*inputs)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        if torch.is_grad_enabled():  # for the gradient of a gradient
            return None, *torch.autograd.grad(ctx.function(*inputs), inputs, dy, create_graph=True)
        width = dy.shape[-1]
        rows, dy = [tensor.reshape(-1, width) for tensor in inputs], dy.reshape(-1, width)
        size = max(1, ELEMENTS.get(dy.device.type, ELEMENTS["cuda"]) // max(1, width))
        parts = [slice(start, start + size) for start in range(0, len(dy), size)]
        if len(parts) == 1:  # a copy would be one more pass over arrays that may be the widest of all
            gradients = recompute.with_back(ctx.function, *rows)[1](dy)
        else:
            gradients = [torch.empty_like(every) for every in rows]
            for some in parts:
                found = recompute.with_back(ctx.function, *(every[some] for every in rows))[1](dy[some])
                for gradient, part in zip(gradients, found, strict=True):
                    gradient[some] = part
        return None, *(gradient.view(inputs[0].shape) for gradient in gradients)
