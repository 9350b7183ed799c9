"""Recomputing a feed-forward module on some tokens at a time, so that a long sequence needs no more memory than a short one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minipeft.injection.wrapper import innermost
from minipeft.kernels.transformed import is_transformed
from minipeft.layers.base import layer_ops
from minipeft.memory.sample_slices import AS_ON_DEVICE, drew_nothing, random_states, rows_on

TOKENS = "_minipeft_tile_tokens"  # in a module's __dict__: tokens in a tile; 0 if it may not work on each by itself
TRIED = "_minipeft_tile_tried"  # whether it may, as long as that is being tried


def run(mlp: nn.Module, function: Callable[..., Any], inputs: Sequence[Tensor]) -> Any:
    """``checkpoint(function, *inputs)``, in tiles if `settle` has found that it may be.

    Args:
        mlp: its ``__dict__`` says whether.
        function: gives the output of the module; in tiles only if that is of shape (batch, length, width).
        inputs: what it is given, of shape (batch, length, ...) each.
    """
    x = inputs[0]
    if TOKENS not in mlp.__dict__:
        states = random_states(x.device)
        y = _kept(function, *inputs)
        by_token = isinstance(y, Tensor) and x.dim() == 3 and y.shape[:2] == x.shape[:2]
        mlp.__dict__[TRIED] = by_token and drew_nothing(states, x.device) and _is_simple(mlp)
        return y
    tokens = rows_on(x.device, mlp.__dict__[TOKENS])
    if not tokens or x.dim() != 3 or x.shape[0] * x.shape[1] <= tokens or is_transformed():
        return _kept(function, *inputs)
    count = -(-x.shape[0] * x.shape[1] // tokens)
    flat = [tensor.reshape(1, -1, tensor.shape[-1]).tensor_split(count, 1) for tensor in inputs]
    y = torch.cat([_kept(function, *tile) for tile in zip(*flat, strict=True)], 1)
    return y.view(*x.shape[:2], -1)


def settle(mlps: Iterable[nn.Module]) -> None:
    """Let the modules run in tiles that drew no random numbers when they were tried.

    A pass and its recomputation must do the same, so this is for a time between passes.
    """
    for mlp in mlps:
        mlp.__dict__[TOKENS] = AS_ON_DEVICE if mlp.__dict__.pop(TRIED, False) else 0


def _kept(function: Callable[..., Any], *inputs: Tensor) -> Any:
    return checkpoint(function, *inputs, use_reentrant=False)


def _is_simple(mlp: nn.Module) -> bool:
    """Whether it is made of linear layers and activations, with no router, whose calls others may count."""
    return all(
        layer_ops(innermost(child)) is not None or not any(True for _ in child.parameters()) for child in mlp.children()
    )
