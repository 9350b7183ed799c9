"""Undoing changes of a model's structure that failed halfway, or were interrupted by Ctrl-C."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

from minipeft.injection.adapted_layer import AdaptedLayer
from minipeft.injection.module_tree import outside_adapters
from minipeft.python.interrupts import interrupts_deferred

CONTAINERS = {dict, OrderedDict, set}


def unchanged_on_error(
    model: nn.Module,
    *others: object,
    outside: Iterable[tuple[str, nn.Module]] | None = None,
    inside_layers: bool = True,
    takes_out: bool = False,
    flags: bool = True,
) -> AbstractContextManager[None]:
    """If the block raises anything, the model is what it was: the same objects, of the same classes, with the same flags.

    Values of tensors are not kept, so the block must not write any.

    Args:
        model: what the block changes.
        others: plain objects that it changes too.
        outside: the model's `outside_adapters`, if they have been found already.
        inside_layers: whether it changes more than the flags of the base layers in adapted layers.
        takes_out: whether it does nothing to adapted layers but to take them out of the model, see `apply.take_out`.
        flags: whether it changes flags of what is in the model before.
    """
    modules = [module for _, module in (outside_adapters(model) if outside is None else outside)]
    flagged = modules if flags else ()
    tables = [table for module in flagged for table in (module._parameters, module._buffers) if table]  # most are empty
    tensors = [tensor for table in tables for tensor in table.values() if tensor is not None]
    adapted = [module for module in modules if isinstance(module, AdaptedLayer)]
    own, inner = set(map(id, adapted)), {id(layer.base_layer) for layer in adapted}
    left_alone: set[int] = set()
    if takes_out:
        left_alone = own | inner
    elif not inside_layers:
        left_alone = inner - own
    things = [module for module in modules if id(module) not in left_alone]
    # Of adapters only their dictionary changes, never what is in one.
    parts = [] if takes_out else [layer.parts for layer in adapted]
    return _put_back_on_error([*things, *others], tensors, parts, adapted if takes_out else ())


def flags_unchanged_on_error(tensors: Iterable[Tensor], *others: object) -> AbstractContextManager[None]:
    """As `unchanged_on_error`, for a block that changes the flags of these tensors and the other objects, but no module."""
    return _put_back_on_error(others, tensors)


@contextlib.contextmanager
def unchanged_afterwards(*things: object) -> Iterator[None]:
    """After the block, however it ends, these objects have the attributes, and these the contents, that they had before.

    As with `unchanged_on_error`, values of tensors are not kept.
    """
    kept = [_kept(thing) for thing in things]
    try:
        yield
    finally:
        with interrupts_deferred():
            for one in kept:
                _put_back(*one)


@contextlib.contextmanager
def _put_back_on_error(
    things: Iterable[object],
    tensors: Iterable[Tensor],
    tables: Iterable[dict[str, nn.Module]] = (),
    taken_out: Iterable[AdaptedLayer] = (),
) -> Iterator[None]:
    kept = [_kept(thing) for thing in things]
    layers = [(layer, type(layer), vars(layer)) for layer in taken_out]
    contents = [(table, table.copy()) for table in tables]
    flags = [(tensor, tensor.requires_grad) for tensor in tensors]
    try:
        yield
    except BaseException:
        with interrupts_deferred():
            for one in kept:
                _put_back(*one)
            for layer, kind, own in layers:
                layer.__class__ = kind
                object.__setattr__(layer, "__dict__", own)
            for table, content in contents:
                table.clear()
                table.update(content)
            for tensor, flag in flags:
                if tensor.requires_grad is not flag:
                    tensor.requires_grad_(flag)
        raise


def _kept(thing: object) -> tuple[Any, type, dict[str, Any], dict[str, Any], list[tuple[Any, Any]]]:
    """An object, its class, its ``__dict__``, a copy of that, and copies of the attributes that are containers and not empty."""
    own = vars(thing)
    full = [(value, value.copy()) for value in own.values() if type(value) in CONTAINERS and value]
    return thing, type(thing), own, own.copy(), full


def _put_back(thing: Any, kind: type, own: dict[str, Any], before: dict[str, Any], full: list[tuple[Any, Any]]) -> None:
    if type(thing) is not kind:
        thing.__class__ = kind
    if vars(thing) is not own:
        object.__setattr__(thing, "__dict__", own)
    own.clear()
    own.update(before)
    for value in own.values():
        if type(value) in CONTAINERS:
            value.clear()
    for container, content in full:
        container.update(content)
