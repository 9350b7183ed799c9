"""Calls that the backward pass makes again: they must find the adapters that acted the first time, whatever acts by then.

A policy and a critic may be two adapters of one model: it runs with the one, then with the other, and one backward pass
recomputes both.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from minipeft.injection.rows import CURRENT, acting
from minipeft.injection.wrapper import Switch, Wrapper


class ActingNow:
    """Which adapters act now, by row or all alike, in the model with this switch; None: of a model that has no adapters."""

    def __init__(self, switch: Switch | None) -> None:
        self.rows, self.switch = CURRENT.rows, switch
        self.choice = None if switch is None else switch.choice

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Within the context they act again."""
        with contextlib.ExitStack() as stack:
            if self.rows is not None:
                stack.enter_context(acting(self.rows))
            if self.switch is not None and self.choice is not None and self.choice != self.switch.choice:
                stack.enter_context(self.switch.as_chosen(self.choice))
            yield


def with_adapters_kept(function: Callable[..., Any], switch: Switch | None) -> Callable[..., Any]:
    """A function for the backward pass to call again: it then finds the adapters and rows that act now."""
    kept = ActingNow(None if torch.compiler.is_compiling() else switch)  # a graph holds the adapters that acted
    return function if kept.rows is None and kept.switch is None else functools.partial(_again, kept, function)


def _again(kept: ActingNow, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with kept.again():
        return function(*args, **kwargs)


def switch_of(module: nn.Module) -> Switch | None:
    """The switch of the adapters in a module, if there are any."""
    return next((inner.switch for inner in module.modules() if isinstance(inner, Wrapper)), None)
