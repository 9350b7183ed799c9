"""What a training loop does beside its optimizer's steps, for methods that ask for it: a schedule, a loss of their own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from minipeft import registry
from minipeft.checkpoint import adapters_of
from minipeft.errors import StateError
from minipeft.methods.base import Adapter
from minipeft.state import STATE, AdapterState


def after_step(model: nn.Module, step: int) -> None:
    """Let the adapters that act and train do what is due after an optimizer step, as a schedule of ranks.

    Call it in every step, after ``optimizer.step()`` and before ``optimizer.zero_grad()``, since gradients are read. For
    methods without a schedule it does nothing.

    Args:
        model: an adapted model.
        step: number of the step, the first is 0.

    Raises:
        StateError: the model has no adapter, or a gradient that is needed is not there.
    """
    for method, adapters, config in _training(model):
        method.after_step(adapters, config, step)


def extra_loss(model: nn.Module) -> Tensor:
    """A scalar to add to the model's loss: the regularisation of the adapters that act and train, 0 where they have none.

    Raises:
        StateError: the model has no adapter.
    """
    losses = [method.extra_loss(adapters, config) for method, adapters, config in _training(model)]
    given = [loss for loss in losses if loss is not None]
    return torch.stack(given).sum() if given else torch.zeros((), device=next(model.parameters()).device)


def _training(model: nn.Module) -> Iterator[tuple[type[Adapter], dict[str, Adapter], Any]]:
    state: AdapterState | None = model.__dict__.get(STATE)
    if state is None:
        raise StateError(f"{type(model).__name__} has no adapter; get_adapter_model gives it one.")
    for name in state.switch.active if state.switch.enabled else ():
        if name in state.trainable:
            config = state.configs[name]
            yield registry.method_class(config.adapter_method), adapters_of(model, name), config
