"""What a training loop does besides the optimizer's steps, for methods that have a schedule or a loss of their own."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from minipeft.config.options import checked_module, integer
from minipeft.ecosystem.wrapper_names import ATTRIBUTES, unwrapped_name
from minipeft.errors import CheckpointError, StateError, shown
from minipeft.injection.module_tree import adapters_of
from minipeft.injection.state import STATE, state_of
from minipeft.injection.watch import idle_message
from minipeft.kernels.functional import is_in_parts
from minipeft.methods.base import Adapter
from minipeft.registry import registry


def after_step(model: nn.Module, step: int) -> None:
    """Do what the adapters that train need after an optimizer step, such as AdaLoRA's allocation of ranks.

    Those are the active ones, and those that ``train_adapters`` named.
    Call it in every step, after ``optimizer.step()`` and before ``optimizer.zero_grad()``, since it reads gradients. For
    methods without a schedule it does nothing. `minipeft.hf.AdapterTrainer` and `minipeft.training.updates.Updater`
    call it themselves.

    Args:
        model: an adapted model, possibly wrapped by DDP or ``torch.compile``.
        step: number of the optimizer step over the whole run, from 0. A step may be left out, if a gradient scaler
            skips it, but not repeated.

    Raises:
        ConfigError: `model` is not a module, or `step` is not the number of a step.
        StateError: the model has no adapter, a gradient that is needed is missing, the step is repeated, or FSDP or DeepSpeed
            has divided what the method needs whole.
    """
    checked_module(model)
    integer("step", step, at_least=0, at_most=sys.maxsize)
    for method, adapters, config in _scheduled(model):
        method.after_step(adapters, config, step)


def extra_loss(model: nn.Module) -> Tensor:
    """A scalar to add to the model's loss: the regularisation of the active adapters that train, 0 if they have none.

    It is computed in the adapters' own precision, also under ``torch.autocast``. If several passes make one optimizer
    step, add it once; `minipeft.hf.AdapterTrainer` and `Updater` do so themselves.

    Raises:
        ConfigError: `model` is not a module.
        StateError: the model has no adapter, or FSDP or DeepSpeed has divided what the method needs whole.
    """
    parameters = checked_module(model).parameters()
    device = next((p.device for p in parameters if not p.is_meta), torch.device("cpu"))  # some may be offloaded
    with torch.autocast(device.type, enabled=False):
        losses = [method.extra_loss(adapters, config) for method, adapters, config in _scheduled(model)]
        given = [loss for loss in losses if loss is not None]
        return (
            torch.stack([loss.to(given[0].device) for loss in given]).sum() if given else torch.zeros((), device=device)
        )


def refuse_idle_layers(model: nn.Module) -> None:
    """Make it an error if a layer does not use its adapter, now or in the first forward pass to come.

    Args:
        model: an adapted model, possibly wrapped; another one is left alone.

    Raises:
        StateError: an earlier pass has shown such a layer.
    """
    adapted = _adapted(model)
    if adapted is None:
        return
    state = state_of(adapted)
    state.refuses_idle = True
    for name in state.switch.active:
        if name in state.idle:
            raise StateError(idle_message((name,), state.idle[name]))


def has_schedule(model: nn.Module) -> bool:
    """Whether an active adapter that trains needs `after_step` or `extra_loss`; False for a model without adapters."""
    return _adapted(model) is not None and any(_has_steps(method) for method, _, _ in _training(model))


def keeps_state(model: nn.Module, adapter_name: str) -> bool:
    """Whether resuming this adapter takes more than its parameters."""
    adapters = adapters_of(model, adapter_name).values()
    return any(adapter.overrides("training_state") for adapter in adapters)


def schedule_state(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """The training state of an adapter besides its parameters, by ``<module>/<name>``: the live tensors."""
    adapters = adapters_of(model, adapter_name)
    return {f"{path}/{key}": t for path, adapter in adapters.items() for key, t in adapter.training_state().items()}


def check_schedule_state(model: nn.Module, adapter_name: str, state: Mapping[str, Tensor] | None) -> None:
    """Check that `load_schedule_state` can take this state; nothing changes.

    Args:
        model: an adapted model, unwrapped.
        adapter_name: one of its adapters.
        state: as `schedule_state` gave it; None if a file has none.

    Raises:
        CheckpointError: it belongs to another adapter, or is needed and missing.
    """
    adapters = adapters_of(model, adapter_name)
    if state is None:
        if keeps_state(model, adapter_name):
            raise CheckpointError(f"the state of the schedule of adapter {adapter_name!r} is not there.")
        return
    parts = _by_module(state)
    if not parts.keys() <= adapters.keys():
        raise CheckpointError(f"there is no adapter on {shown(sorted(parts.keys() - adapters.keys()), 3)}.")
    for path, adapter in adapters.items():
        current = adapter.training_state()
        adapter.load_training_state(parts.get(path, {}))  # which raises if it cannot
        adapter.load_training_state(current)


def load_schedule_state(model: nn.Module, adapter_name: str, state: Mapping[str, Tensor] | None) -> None:
    """Resume the schedule of an adapter from a state that `check_schedule_state` has accepted."""
    parts = _by_module(state or {})
    for path, adapter in adapters_of(model, adapter_name).items():
        adapter.load_training_state(parts.get(path, {}))


def _by_module(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        path, _, key = name.rpartition("/")
        parts.setdefault(unwrapped_name(path), {})[key] = tensor
    return parts


def _training(model: nn.Module) -> Iterator[tuple[type[Adapter], dict[str, Adapter], Any]]:
    adapted = _adapted(model)
    if adapted is None:
        raise StateError(f"{type(model).__name__} has no adapter; get_adapter_model gives it one.")
    state = state_of(adapted)
    for name in state.switch.learning if state.switch.enabled else ():
        config = state.configs[name]
        yield registry.method_class(config.adapter_method), adapters_of(adapted, name), config


def _scheduled(model: nn.Module) -> Iterator[tuple[type[Adapter], dict[str, Adapter], Any]]:
    """Those of `_training` whose method has its own schedule or loss; raises StateError if they are not whole here."""
    for method, adapters, config in _training(model):
        if not _has_steps(method):
            continue
        if any(is_in_parts(parameter) for adapter in adapters.values() for parameter in adapter.parameters()):
            raise StateError(
                f"{method.__name__} trains by a schedule of its own, which needs its tensors whole; use DDP instead of FSDP or "
                "DeepSpeed."
            )
        yield method, adapters, config


def _has_steps(method: type[Adapter]) -> bool:
    return method.overrides("after_step") or method.overrides("extra_loss")


def _adapted(model: nn.Module) -> nn.Module | None:
    """The adapted model itself, without DDP, DeepSpeed's engine and ``torch.compile`` around it."""
    inner: nn.Module | None = model
    while inner is not None and STATE not in inner.__dict__:
        inner = next((inner._modules[name] for name in ATTRIBUTES.values() if name in inner._modules), None)
    return inner
