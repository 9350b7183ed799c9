"""What a training loop does beside its optimizer's steps, for methods that ask for it: a schedule, a loss of their own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from minipeft import registry
from minipeft.errors import CheckpointError, StateError, shown
from minipeft.files.save import adapters_of
from minipeft.injection.attach import STATE, AdapterState
from minipeft.methods.base import Adapter


def after_step(model: nn.Module, step: int) -> None:
    """Let the adapters that act and train do what is due after an optimizer step, as a schedule of ranks.

    Call it in every step, after ``optimizer.step()`` and before ``optimizer.zero_grad()``, since gradients are read. For
    methods without a schedule it does nothing.

    `minipeft.hf.AdapterTrainer` and `minipeft.training.updates.Updater` call it themselves.

    Args:
        model: an adapted model, also within DDP or ``torch.compile``.
        step: number of the step over the whole run, the first is 0. A step may be left out, as where a gradient scaler
            skips one, but none comes twice.

    Raises:
        StateError: the model has no adapter, a gradient that is needed is not there, or the step has been.
    """
    for method, adapters, config in _training(model):
        method.after_step(adapters, config, step)


def extra_loss(model: nn.Module) -> Tensor:
    """A scalar to add to the model's loss: the regularisation of the adapters that act and train, 0 where they have none.

    It is computed in the adapters' own precision, also within ``torch.autocast``. Where the gradients of several passes
    add up to one step, it is to be added once; `minipeft.hf.AdapterTrainer` and `Updater` do so themselves.

    Raises:
        StateError: the model has no adapter.
    """
    device = next(model.parameters()).device
    with torch.autocast(device.type, enabled=False):
        losses = [method.extra_loss(adapters, config) for method, adapters, config in _training(model)]
        given = [loss for loss in losses if loss is not None]
        return (
            torch.stack([loss.to(given[0].device) for loss in given]).sum() if given else torch.zeros((), device=device)
        )


def has_schedule(model: nn.Module) -> bool:
    """Whether an adapter that acts and trains needs `after_step` or `extra_loss`; also of a model without adapters."""
    return any(
        method.after_step.__func__ is not Adapter.after_step.__func__  # type: ignore[attr-defined]
        or method.extra_loss.__func__ is not Adapter.extra_loss.__func__  # type: ignore[attr-defined]
        for method, _, _ in (_training(model) if _adapted(model) is not None else ())
    )


# ------------------------------------------------------------------------------------------------- to go on from a step
def keeps_state(model: nn.Module, adapter_name: str) -> bool:
    """Whether to go on with this adapter takes more than its parameters."""
    adapters = adapters_of(model, adapter_name).values()
    return any(type(adapter).training_state is not Adapter.training_state for adapter in adapters)


def schedule_state(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """What the schedule of an adapter knows beside its parameters, by ``<module>/<name>``: the live tensors."""
    adapters = adapters_of(model, adapter_name)
    return {f"{path}/{key}": t for path, adapter in adapters.items() for key, t in adapter.training_state().items()}


def check_schedule_state(model: nn.Module, adapter_name: str, state: Mapping[str, Tensor] | None) -> None:
    """See whether `load_schedule_state` can take this, and change nothing.

    Args:
        model: an adapted model, unwrapped.
        adapter_name: one of its adapters.
        state: as `schedule_state` gave it; None where a file says nothing of it.

    Raises:
        CheckpointError: it is of another adapter, or is not there and is needed.
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
        adapter.check_training_state(parts.get(path, {}))


def load_schedule_state(model: nn.Module, adapter_name: str, state: Mapping[str, Tensor] | None) -> None:
    """Let the schedule of an adapter go on from a state, which `check_schedule_state` has seen."""
    parts = _by_module(state or {})
    for path, adapter in adapters_of(model, adapter_name).items():
        adapter.load_training_state(parts.get(path, {}))


def _by_module(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        path, _, key = name.rpartition("/")
        parts.setdefault(path, {})[key] = tensor
    return parts


def _training(model: nn.Module) -> Iterator[tuple[type[Adapter], dict[str, Adapter], Any]]:
    adapted = _adapted(model)
    if adapted is None:
        raise StateError(f"{type(model).__name__} has no adapter; get_adapter_model gives it one.")
    state: AdapterState = adapted.__dict__[STATE]
    for name in state.switch.active if state.switch.enabled else ():
        if name in state.trainable:
            config = state.configs[name]
            yield registry.method_class(config.adapter_method), adapters_of(adapted, name), config


def _adapted(model: nn.Module) -> nn.Module | None:
    """The adapted model itself, out of DDP, DeepSpeed's engine and ``torch.compile``."""
    inner: nn.Module | None = model
    while inner is not None and STATE not in inner.__dict__:
        inner = next((inner._modules[name] for name in ("module", "_orig_mod") if name in inner._modules), None)
    return inner
