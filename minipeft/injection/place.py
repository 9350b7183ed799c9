"""Putting a wrapper in a module's place.

The module object itself becomes the wrapper, and what it was moves into a new object, the wrapper's `base_layer`. So
everything that holds the module now holds the wrapper: its parents, and also lists, helper objects and bound methods that
no walk over the model finds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from minipeft.class_swap import mixed_class, mixins_of
from minipeft.injection.wrapper import Wrapper

TIED_TO_THE_OBJECT = ("forward", "_compiled_call_impl")  # of an instance: they call the object that they were made for


def put(wrap: Callable[[nn.Module], Wrapper], module: nn.Module, places: tuple[tuple[nn.Module, str], ...]) -> Wrapper:
    """Make the wrapper of a module and put it in the module's place.

    A module with a ``forward`` of its own, as accelerate's offloading gives it, stays what it is: the wrapper is a new
    object, in these places.

    Args:
        wrap: makes the wrapper of a base layer.
        module: to wrap; it may be a wrapper itself.
        places: (parent, attribute) that refer to it.
    """
    if any(name in vars(module) for name in TIED_TO_THE_OBJECT):
        wrapper = wrap(module)
        wrapper.is_the_module = False
        for parent, attribute in places:
            setattr(parent, attribute, wrapper)
        return wrapper
    former = object.__new__(type(module))
    _become(former, module)
    _become(module, wrap(former))
    assert isinstance(module, Wrapper)
    return module


def take_out(wrapper: Wrapper, inner: nn.Module, places: tuple[tuple[nn.Module, str], ...]) -> None:
    """Undo `put`, with `inner` in the wrapper's place: its base layer, or a trained copy of that."""
    if wrapper.is_the_module:
        mixins = mixins_of(type(wrapper))
        _become(wrapper, inner)
        for mixin in reversed(mixins):  # such as those of `minipeft.lean`
            module: nn.Module = wrapper
            module.__class__ = mixed_class(mixin, type(module))
    else:
        for parent, attribute in places:
            setattr(parent, attribute, inner)


def _become(module: nn.Module, other: nn.Module) -> None:
    state: dict[str, Any] = vars(other)
    module.__class__ = type(other)
    object.__setattr__(module, "__dict__", state)
