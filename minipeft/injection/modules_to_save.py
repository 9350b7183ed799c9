"""Modules trained in full along with the adapters: ``modules_to_save``, and the biases of ``bias="all"``."""

from __future__ import annotations

import contextlib
import copy
import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from minipeft.ecosystem.wrapper_names import modules_in, unwrapped_name
from minipeft.errors import UNCHANGED, StateError
from minipeft.injection.adapted_value import adapted_value
from minipeft.injection.rows import Rows, choose, rows_now, select
from minipeft.injection.wrapper import OF_ACCELERATE, Place, Switch, Wrapper
from minipeft.layers.offloaded import all_present, without_offloading


class SavedModule(Wrapper):
    """The original module and, for each adapter, a copy that trains; the copy of the active adapter is called.

    Args:
        base_layer: the original; it never changes, so switching off or unloading restores it exactly.
        switch: shared by all wrappers of the model.
        only: names of the parameters to copy; the others are shared with the original. None: all of them.
    """

    def __init__(self, base_layer: nn.Module, switch: Switch, only: tuple[str, ...] | None = None) -> None:
        super().__init__(base_layer, switch)
        self.only = only

    def __getattr__(self, name: str) -> Any:
        """An attribute of the module that is called now: code that reads a weight gets the trained one."""
        here = self.__dict__.get("_modules", {})
        if name in here or name in OF_ACCELERATE or "base_layer" not in here or "switch" not in self.__dict__:
            return super().__getattr__(name)
        rows = self.mixed_rows()
        if rows is not None:
            value = getattr(here["base_layer"], name)
            refuse = functools.partial(rows.refuse, self, "is read, not called")
            return adapted_value(value, refuse, ()) if isinstance(value, nn.Parameter) else value
        value = getattr(self.current(), name)
        if isinstance(value, Tensor):
            self.switch.note_read(self)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        """Another parameter or layer goes to the original, as tying means it, unless a copy is read and called instead."""
        here = self.__dict__.get("_modules", {})
        if (value is None or isinstance(value, nn.Parameter | nn.Module)) and "base_layer" in here:
            own = getattr(here["base_layer"], name, None)
            is_its_own = isinstance(own, nn.Parameter | nn.Module) and own is not value
            if is_its_own and self.current() is not here["base_layer"]:
                raise StateError(
                    f"a new {name} was assigned to a {type(here['base_layer']).__name__} of which an adapter trains a copy. Reading "
                    f"gives the copy's {name}, and assigning would change the original's, without effect. Assign to the layer's "
                    f"adapters[name] or its base_layer. {UNCHANGED}"
                )
        super().__setattr__(name, value)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if args and isinstance(args[0], Proxy):
            return self.as_one_node(*args, **kwargs)
        rows = self.mixed_rows()
        return self.current()(*args, **kwargs) if rows is None else self._by_row(rows, *args, **kwargs)

    def current(self) -> nn.Module:
        """The module that is called now; an adapter that is merged acts, too."""
        rows, here = rows_now(self.switch), self.adapters._modules
        names = (*self.switch.merged, *self.switch.active) if rows is None else (rows.common(here) or "",)
        for name in names if self.switch.enabled else ():
            if name in self.adapters:
                return self.adapters[name]
        return self.base_layer

    def _by_row(self, rows: Rows, *args: Any, **kwargs: Any) -> Tensor:
        """Each copy on its own rows."""
        x = args[0] if args else None
        if not isinstance(x, Tensor) or any(isinstance(value, Tensor) for value in (*args[1:], *kwargs.values())):
            rows.refuse(self, "takes more than one tensor")
        repeats = rows.repeats(self, x)
        if torch.compiler.is_compiling():
            return self._compiled(rows, repeats, *args, **kwargs)
        parts = rows.parts(rows.present(self.adapters._modules), repeats, x.device)
        pieces = []
        for name, selector in parts.groups:
            module = self.base_layer if name is None else self.adapters[name]
            pieces.append(module(select(x, selector), *args[1:], **kwargs))
        if not all(isinstance(piece, Tensor) and piece.ndim for piece in pieces):
            rows.refuse(self, "returns more than one tensor")
        return parts.joined(pieces)

    def _compiled(self, rows: Rows, repeats: int, *args: Any, **kwargs: Any) -> Tensor:
        """One graph for any rows: every copy is called on all of them."""
        index = rows.index.repeat_interleave(repeats)
        y: Tensor = self.base_layer(*args, **kwargs)
        for name in self.adapters:
            which = index == rows.known.index(name)
            own = self.adapters[name](choose(which, args[0]), *args[1:], **kwargs)
            y = choose(which, own, y)
        return y

    def file_tensors(self, adapter_name: str) -> dict[str, Tensor]:
        return copy_tensors(self.adapters[adapter_name], self.only) if adapter_name in self.adapters else {}

    def places(self, adapter_name: str) -> list[Place]:
        if (part := self.parts.get(adapter_name)) is None:
            return []
        saved = set(map(id, copy_tensors(part, self.only).values()))
        return [
            (module, name) for module in modules_in(part) for name, p in module._parameters.items() if id(p) in saved
        ]


def trained_copy(
    original: nn.Module, only: tuple[str, ...] | None, tied_to: nn.Module | None, *, on_meta: bool
) -> nn.Module:
    """A copy of a module to train for one adapter.

    Parameters not named in `only`, and then buffers, are shared with the original, and with `tied_to`, the trained copy of
    a module tied to this one, all that it has.
    """
    memo = without_offloading(original) | hooks_of_others(original)
    with contextlib.nullcontext() if on_meta else all_present(original):
        for name, parameter in original.named_parameters():
            if only is not None and name not in only:
                memo[id(parameter)] = parameter
            elif on_meta:
                memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), False)
        if only is not None:  # statistics are not copied, since no file will hold the copy's
            memo |= {id(buffer): buffer for buffer in original.buffers()}
        for name, parameter in () if tied_to is None else tied_to.named_parameters():
            memo[id(original.get_parameter(name))] = parameter
        # weight_norm and pruning keep a weight that they compute in each call, and that deepcopy refuses.
        kept = [value for module in original.modules() for value in vars(module).values() if isinstance(value, Tensor)]
        memo |= {id(value): value.detach().clone() for value in kept if not value.is_leaf}
        twin = copy.deepcopy(original, memo)
    for tensor in copy_tensors(twin, only).values():
        tensor.requires_grad_(isinstance(tensor, nn.Parameter))
    return twin


def hooks_of_others(original: nn.Module) -> dict[int, Any]:
    """For `copy.deepcopy`, the hooks that a copy calls as they are: what they belong to, such as a recorder, would be copied with them."""
    modules = list(original.modules())
    own = set(map(id, modules))
    tables = [
        table
        for m in modules
        for table in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks)
    ]
    hooks = [hook for table in tables for hook in table.values()]
    return {id(hook): hook for hook in hooks if id(getattr(hook, "__self__", None)) not in own}


def copy_tensors(module: nn.Module, only: tuple[str, ...] | None) -> dict[str, Tensor]:
    """The tensors of a trained copy that are saved: its state, or only those named in `only`."""
    state = {unwrapped_name(name): tensor for name, tensor in module.state_dict(keep_vars=True).items()}
    return {name: tensor for name, tensor in state.items() if only is None or name in only}
