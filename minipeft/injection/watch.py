"""Finding adapters that do nothing: their layer is neither called nor read, although the module around it runs.

One forward pass is watched. A layer that a mixture of experts does not choose, or of an image tower in a batch of text,
is not a fault: the module around it does not run either. Each fault is reported once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from minipeft.ecosystem.transformers_model import gives_media
from minipeft.errors import StateError, shown, warn
from minipeft.injection.module_tree import outside_adapters, wrappers, wrappers_of
from minipeft.injection.rows import MEDIA_OF_BATCH, rows_now
from minipeft.injection.starting import check_started
from minipeft.injection.state import state_of
from minipeft.injection.wrapper import Switch, Wrapper, innermost

CHOICES = (nn.ModuleList, nn.ModuleDict)  # whoever holds one may call some of its modules and not others


@dataclass
class Pass:
    """What happened in a forward pass."""

    called: set[int] = field(default_factory=set)  # ids of the modules that were called
    read: set[int] = field(default_factory=set)  # ids of the wrappers whose weight was used without a call

    def ran(self, module: nn.Module) -> bool:
        """Whether the module or one inside it was called."""
        return any(id(inner) in self.called for inner in module.modules())

    def used(self, wrapper: Wrapper) -> bool:
        """Whether the adapters of a wrapper could act."""
        return id(wrapper) in self.called or id(wrapper) in self.read or self.ran(wrapper.adapters)


def can_watch(model: nn.Module) -> bool:
    """Whether calls can be seen: not in a traced or compiled model."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    return not any(
        "_compiled_call_impl" in vars(module) or "_orig_mod" in module._modules for _, module in outside_adapters(model)
    )


@contextlib.contextmanager
def watched(switch: Switch) -> Iterator[Pass]:
    """Within the context, collects what is called and read."""
    seen = Pass()

    def note(module: nn.Module, args: object) -> None:
        seen.called.add(id(module))

    handle, switch.read = register_module_forward_pre_hook(note), seen.read
    try:
        yield seen
    finally:
        handle.remove()
        switch.read = None


def idle_layers(model: nn.Module, names: tuple[str, ...], seen: Pass) -> list[str]:
    """Names of the layers with one of these adapters that were not used in a pass that ran what is around them.

    An adapter that several tied layers share is used if one of them is.
    """
    here = [(path, wrapper) for path, wrapper in wrappers(model) if any(name in wrapper.adapters for name in names)]
    unused = [(path, wrapper) for path, wrapper in here if not seen.used(wrapper)]
    if not unused:
        return []
    acting = {id(p) for _, wrapper in here if seen.used(wrapper) for p in wrapper.adapters.parameters()}
    return [
        path
        for path, wrapper in unused
        if not any(id(p) in acting for p in wrapper.adapters.parameters())
        and ran_without(model, path, innermost(wrapper), seen)
    ]


def ran_without(
    model: nn.Module, path: str, base: nn.Module, seen: Pass, wrapping: tuple[type, ...] = (Wrapper,)
) -> bool:
    """Whether a layer should have run but did not use its adapters: the base layer or the module around it ran.

    `wrapping` are the classes that stand in the place of a layer; PEFT has others.
    """
    if id(base) in seen.called:
        return True  # something calls the base layer itself
    parent = model.get_submodule(path.rpartition(".")[0])
    if id(parent) not in seen.called or isinstance(parent, CHOICES):
        return False
    # Another part of the parent that did not run may be what the layer belongs to, such as an image tower.
    return all(isinstance(part, wrapping) or not any(part.children()) or seen.ran(part) for part in parent.children())


def watched_call(model: nn.Module, call: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Call a model, and warn about layers that do not use an active adapter.

    Raises:
        StateError: there are some, and the state says that it is an error; or an adapter has no values yet.
    """
    state = state_of(model)
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
    if not gives_media(args, kwargs):  # what waits for images, as Fuyu's layer for patches, is right to rest
        idle = [path for path in idle if getattr(model.get_submodule(path), "called_with", None) != MEDIA_OF_BATCH]
    if idle:
        state.idle.update(dict.fromkeys(names, idle))
        if state.refuses_idle:
            raise StateError(idle_message(names, idle))
        warn(idle_message(names, idle))
    return output


def idle_message(names: tuple[str, ...], idle: list[str]) -> str:
    """What is wrong with these layers."""
    return (
        f"{shown(idle)}: the model neither called nor read this layer while it ran the module around it, so adapter "
        f"{shown(names)} does nothing there. Leave it out of the targets, or let the model call it."
    )


def _say_dropout(model: nn.Module, names: tuple[str, ...], seen: Pass) -> None:
    state = state_of(model)
    for name in names if model.training else ():
        config = vars(state.configs[name])
        options = [option for option, value in config.items() if option.endswith("dropout") and value]
        read_only = seen.read - seen.called if options else ()
        read = [path for path, wrapper in wrappers_of(model, name) if id(wrapper) in read_only]
        if read:
            warn(
                f"{shown(read)}: the model reads this weight instead of calling the layer, and {shown(options)} of "
                f"adapter {name!r} acts on calls only; there the adapter trains without dropout."
            )
