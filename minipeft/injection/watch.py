"""Finding adapters that do nothing: their layer is neither called nor read, although the module around it runs.

One forward pass is watched. A layer that a mixture of experts does not choose, or of an image tower in a batch of text,
is not a fault: the module around it does not run either.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from minipeft.injection.module_tree import outside_adapters, wrappers
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
    acting = (
        {id(p) for _, wrapper in here if seen.used(wrapper) for p in wrapper.adapters.parameters()} if unused else ()
    )
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


def read_layers(model: nn.Module, names: tuple[str, ...], seen: Pass) -> list[str]:
    """Names of the layers with one of these adapters that were read and not called."""
    return [
        path
        for path, wrapper in wrappers(model)
        if id(wrapper) in seen.read
        and id(wrapper) not in seen.called
        and any(name in wrapper.adapters for name in names)
    ]
