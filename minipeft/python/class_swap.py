"""Changing the class of a live object: putting a mixin in front of its own class, and undoing that."""

from __future__ import annotations

import copyreg
import types
from abc import ABCMeta
from typing import Any

from torch import nn

_mixed: dict[tuple[type, type], type[nn.Module]] = {}


class SameFunction(nn.Module):
    """Base of the mixins that change how a module computes but not what it computes."""

    def __init_subclass__(cls) -> None:
        """Nothing: a class that lists its subclasses hears of no mixed one."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        return reduced(_mixin_of(type(self)), self, super().__reduce_ex__(protocol))


def plain_class(cls: type) -> type:
    """A module's class without the mixins that do not change what it computes."""
    for mixin in mixins_of(cls):
        cls = original_class(mixin, cls)
    return cls


def mixins_of(cls: type) -> list[type[nn.Module]]:
    """The mixins of a module's class that do not change what it computes, the outermost first."""
    mixins = []
    while issubclass(cls, SameFunction):
        mixins.append(_mixin_of(cls))
        cls = original_class(mixins[-1], cls)
    return mixins


def _mixin_of(cls: type) -> type[nn.Module]:
    return next(base for base in cls.__mro__ if SameFunction in base.__bases__)


def mixed_class(mixin: type[nn.Module], cls: type[nn.Module]) -> type[nn.Module]:
    """The subclass of a module class with a mixin; it keeps the name and module, which transformers relies on.

    A metaclass of the user's own is not run, and the mixins keep an ``__init_subclass__`` from it: either may register or
    refuse a class of the same name.
    """
    if (mixin, cls) not in _mixed:
        names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
        make: Any = ABCMeta if issubclass(type(cls), ABCMeta) else type
        _mixed[mixin, cls] = make.__new__(type(cls), cls.__name__, (*_layout(cls), mixin, cls), names)
    return _mixed[mixin, cls]


def _layout(cls: type) -> tuple[type, ...]:
    """What a subclass of this class must begin with, so that Python lets objects change from one to the other.

    Nothing for most. A class whose first base has no ``__dict__``, such as ``ABC`` or ``Generic``, adds it itself, and Python
    takes only another class that adds it to the same base.
    """
    while cls.__base__ is not None and cls.__base__.__dictoffset__:
        cls = cls.__base__
    if cls.__base__ is object:
        return ()
    bases: tuple[Any, ...] = vars(cls).get("__orig_bases__", cls.__bases__)  # Generic[T], and not Generic alone
    return (types.new_class("Layout", bases[:1]),)


def original_class(mixin: type[nn.Module], cls: type) -> type[nn.Module]:
    """The class under a mixed one, even if something (FSDP2) has subclassed the mixed class again."""
    return next(mixed.__bases__[-1] for mixed in cls.__mro__ if mixed.__bases__[-2:-1] == (mixin,))


def reduced(mixin: type[nn.Module], model: nn.Module, plain: Any) -> Any:
    """`plain`, the result of ``__reduce_ex__``, naming the class by mixin and original: pickle cannot find a class made at run time."""
    if plain[0] is copyreg.__newobj__:  # type: ignore[attr-defined]
        return (_new, (mixin, _parts(original_class(mixin, type(model))), *plain[1][1:]), *plain[2:])
    return plain


def _parts(cls: type) -> Any:
    """A class that pickle can find, or a mixin and the parts of the class under it."""
    return (cls.__bases__[-2], _parts(cls.__bases__[-1])) if cls in _mixed.values() else cls


def _whole(parts: Any) -> type[nn.Module]:
    return mixed_class(parts[0], _whole(parts[1])) if isinstance(parts, tuple) else parts


def _new(mixin: type[nn.Module], parts: Any, *args: Any) -> nn.Module:
    mixed = mixed_class(mixin, _whole(parts))
    return mixed.__new__(mixed, *args)
