"""The first forward pass with an adapter: watched, and what is wrong with it is said once."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from minipeft.errors import StateError, shown
from minipeft.injection.attach import STATE, AdapterState
from minipeft.injection.rows import rows_now
from minipeft.injection.starting import check_started
from minipeft.injection.watch import Pass, can_watch, idle_layers, read_layers, watched


def watched_call(model: nn.Module, call: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Call a model, and warn about layers that do not use an active adapter.

    Raises:
        StateError: there are some, and the state says that it is an error; or an adapter has no values yet.
    """
    state: AdapterState = model.__dict__[STATE]
    rows = rows_now(state.switch)
    acting = state.switch.active if rows is None else rows.adapters
    names = tuple(name for name in acting if name in state.unwatched)
    if not names or state.merged or not state.switch.enabled or not can_watch(model):
        return call(*args, **kwargs)
    if state.unstarted.intersection(names):
        if not all(parameter.is_meta for parameter in model.parameters()):
            check_started(state, names)
        return call(*args, **kwargs)
    with watched(state.switch) as seen:
        output = call(*args, **kwargs)
    state.unwatched -= set(names)
    _say_dropout(model, names, seen)
    idle = idle_layers(model, names, seen)
    if idle:
        state.idle.update(dict.fromkeys(names, idle))
        if state.refuses_idle:
            raise StateError(idle_message(names, idle))
        warnings.warn(idle_message(names, idle), stacklevel=3)
    return output


def idle_message(names: tuple[str, ...], idle: list[str]) -> str:
    """What is wrong with these layers."""
    return (
        f"{shown(idle)}: the model neither called nor read this layer while it ran the module around it, so adapter "
        f"{shown(names)} does nothing there. Leave it out of the targets, or let the model call it."
    )


def _say_dropout(model: nn.Module, names: tuple[str, ...], seen: Pass) -> None:
    state: AdapterState = model.__dict__[STATE]
    for name in names if model.training else ():
        config = vars(state.configs[name])
        options = [option for option, value in config.items() if option.endswith("dropout") and value]
        read = read_layers(model, (name,), seen) if options else []
        if read:
            warnings.warn(
                f"{shown(read)}: the model reads this weight instead of calling the layer, and {shown(options)} of "
                f"adapter {name!r} acts on calls only; there the adapter trains without dropout.",
                stacklevel=4,
            )
