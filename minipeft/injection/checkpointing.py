"""Gradient checkpointing of transformers' models: adapters get a gradient whatever the model's input is, by row too.

The reentrant one gives no gradient to what a block holds if no tensor that the block is called with requires one.
transformers makes the embeddings of token ids require one; the first blocks of vision and audio models stay without, and
so do the adapters in them. Such a call is checkpointed in torch's other way, which takes as little memory.

A block that is called again in the backward pass finds the adapters, and the rows, that acted in the forward pass, whatever
acts by then: a policy and a critic may be two adapters of one model, and one backward pass recomputes both.

The same holds for blocks in torch's ``checkpoint_wrapper``, and for a part of the model that checkpoints by itself.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from minipeft.errors import StateError
from minipeft.injection.adapted_layer import AdaptedLayer
from minipeft.injection.rows import CURRENT, acting
from minipeft.injection.state import STATE
from minipeft.injection.wrapper import Switch, Wrapper
from minipeft.kernels.functional import tensors_in

FUNCTION = "_gradient_checkpointing_func"  # where transformers keeps it, in each module that checkpoints
WRAPPERS_FUNCTION = "checkpoint_fn"  # where torch's ``checkpoint_wrapper`` keeps its own


def let_checkpoints_train(module: nn.Module, switch: Switch) -> None:
    """Replace the checkpointing functions in a model whose adapters have this switch; fast, since each call does it."""
    name = _place(module)
    function = module.__dict__.get(name)
    if isinstance(function, functools.partial) and function.func is not _checkpoint:
        setattr(module, name, functools.partial(_checkpoint, function, switch))
    for child in module._modules.values():
        if child is not None and child._modules and not isinstance(child, AdaptedLayer):
            let_checkpoints_train(child, switch)


def leave_checkpoints_alone(outside: Iterable[tuple[str, nn.Module]]) -> None:
    """Undo `let_checkpoints_train` in a model with these `outside_adapters`."""
    for _, module in outside:
        for name in (FUNCTION, WRAPPERS_FUNCTION):
            function = module.__dict__.get(name)
            if isinstance(function, functools.partial) and function.func is _checkpoint:
                setattr(module, name, function.args[0])


def _place(module: nn.Module) -> str:
    """The attribute that holds a module's checkpointing function, if it has one."""
    return WRAPPERS_FUNCTION if "_checkpoint_wrapped_module" in module._modules else FUNCTION


def training_setter(model: nn.Module, setter: Callable[..., None]) -> Callable[..., None]:
    """The method of transformers that turns checkpointing on and off, followed by `let_checkpoints_train`."""
    if "value" in inspect.signature(setter).parameters:
        return setter  # of code written for transformers before 4.35, which calls torch itself
    return functools.partial(_set, model, setter)


def _set(model: nn.Module, setter: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    setter(*args, **kwargs)
    if (state := model.__dict__.get(STATE)) is not None:
        let_checkpoints_train(model, state.switch)


def _checkpoint(own: functools.partial[Any], switch: Switch, function: Any, *args: Any, **kwargs: Any) -> Any:
    """Checkpoint a call; not in the reentrant way, which gives gradients to `args` alone, if that would lose one."""
    if not own.keywords.get("use_reentrant"):
        return own(with_adapters_kept(function, switch), *args, **kwargs)
    bound = (*function.args, *function.keywords.values()) if isinstance(function, functools.partial) else ()
    inside = any(tensor.requires_grad for tensor in tensors_in(bound))
    given = any(isinstance(value, Tensor) and value.requires_grad for value in args)
    if not torch.is_grad_enabled():
        return function(*args)
    function = with_adapters_kept(function, switch)
    if inside or not given:
        return own.func(function, *args, **{**own.keywords, "use_reentrant": False})
    return own(function, *args)


class ActingNow:
    """Which adapters act now in the model with this switch, by row or for all rows; None: it has no adapters."""

    def __init__(self, switch: Switch | None) -> None:
        self.rows, self.switch = CURRENT.rows, switch
        self.choice = None if switch is None else switch.choice
        if switch is not None:
            self.merged, self.changes = switch.merged, switch.changes
            learning = set(switch.learning)
            self.learning = learning if self.rows is not None else learning.intersection(switch.active)

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Within the context they act again.

        Raises:
            StateError: they would compute something else, or get no gradient, as a verb has changed them since.
        """
        if self.switch is not None:
            same = self.merged == self.switch.merged and self.changes == self.switch.changes
            if not same or not self.learning.issubset(self.switch.learning):
                raise StateError(
                    "the backward pass computes a part of the model again, and its adapters were changed since the forward pass: "
                    "merged, given another scale or other values, deleted, or no longer trained. Call backward() first."
                )
        with contextlib.ExitStack() as stack:
            if self.rows is not None:
                stack.enter_context(acting(self.rows))
            if self.switch is not None and self.choice is not None and self.choice != self.switch.choice:
                stack.enter_context(self.switch.as_chosen(self.choice))
            yield


def with_adapters_kept(function: Callable[..., Any], switch: Switch | None) -> Callable[..., Any]:
    """The function with the adapters and rows that act now, for a call in the backward pass."""
    kept = ActingNow(None if torch.compiler.is_compiling() else switch)  # a graph holds the adapters that acted
    return function if kept.rows is None and kept.switch is None else functools.partial(_again, kept, function)


def _again(kept: ActingNow, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with kept.again():
        return function(*args, **kwargs)


def switch_of(module: nn.Module) -> Switch | None:
    """The switch of the adapters in a module, if there are any."""
    return next((inner.switch for inner in module.modules() if isinstance(inner, Wrapper)), None)
