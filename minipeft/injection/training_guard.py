"""Warning of training that would teach an adapter nothing: it is merged, or the optimizer does not have its parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from minipeft.errors import StateError, shown, warn
from minipeft.injection.module_tree import adapted_layers
from minipeft.injection.state import STATE, AdapterState, state_of
from minipeft.injection.wrapper import parameters_at
from minipeft.kernels.functional import tensors_in


def watch(model: nn.Module, merged: bool) -> None:
    """Warn at the first training pass from now on, or, if nothing is merged any more, not at all."""
    for key, hook in list(model._forward_hooks.items()):
        if hook is _warn_once:
            del model._forward_hooks[key], model._forward_hooks_with_kwargs[key]
    if merged:
        model.register_forward_hook(_warn_once, with_kwargs=True)


def merged_in_training(model: nn.Module) -> Sequence[str]:
    """The merged adapters of an adapted model whose parameters are meant to train."""
    state = state_of(model)
    return [name for name in state.merged if name in state.switch.trainable and _requires_grad(model, name)]


def message(names: Sequence[str]) -> str:
    """The message about these merged adapters."""
    return (
        f"{shown(names)} is merged into the base, so training gives it no gradient. Call unmerge_adapter() before training; "
        "if this is no training, model.eval() or torch.no_grad() says so."
    )


def check_training(model: nn.Module, optimizer: Optimizer) -> None:
    """Check that training can teach the active adapters of a model, and those of `train_adapters`, something.

    Args:
        model: on its device, not wrapped and not sharded; without adapters all is well.
        optimizer: of the run; one that has some of an adapter's parameters is taken for a choice.

    Raises:
        StateError: an adapter that trains is merged, or the optimizer has none of its parameters.
    """
    state: AdapterState | None = model.__dict__.get(STATE)
    if state is None:
        return
    if names := merged_in_training(model):
        raise StateError(message(names))
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for name in dict.fromkeys((*state.switch.active, *state.switch.also_trained)):
        own = [parameter for parameter in parameters_at(state.places[name]) if parameter.requires_grad]
        if own and held.isdisjoint(map(id, own)):
            raise StateError(
                f"the optimizer has none of the {len(own)} parameters that adapter {name!r} trains. Make it after adapting "
                "the model, from the parameters that require a gradient."
            )


def _warn_once(model: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
    if not model.training or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return
    # Without a gradient or labels it may be inference that nobody called eval() for, and backward() would fail.
    nested = isinstance(output, Tensor | Mapping | tuple | list)
    tensors = tensors_in(output if nested else getattr(output, "__dict__", {}))
    if kwargs.get("labels") is None and not any(tensor.requires_grad for tensor in tensors):
        return
    names = merged_in_training(model)
    if names:
        watch(model, merged=False)
        warn(message(names), ours=True)


def _requires_grad(model: nn.Module, name: str) -> bool:
    """Whether a merged part of an adapter requires gradients. Modules that it trains in full train all the same."""
    merged = (layer for _, layer in adapted_layers(model) if name in layer.merged)
    return any(p.requires_grad for layer in merged for p in layer.trainable_parameters(name))
