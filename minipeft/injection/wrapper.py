"""The module that stands in the place of a base layer, and the switch that says which adapters act."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from minipeft.errors import UNCHANGED, StateError
from minipeft.injection.adapted_value import AdaptedValue
from minipeft.injection.rows import Rows, rows_now
from minipeft.layers.offloaded import HOOK

# What accelerate adds to a layer and takes off again. On a wrapper it would look for the layer's weights there.
OF_ACCELERATE = (HOOK, "_old_forward")
# A parameter of an adapter by the module that has it and its name there, so that switching visits these and nothing else.
# Not as an object: moving, sharding or loading a model may put other objects in their places.
Place = tuple[nn.Module, str]


class Switch:
    """Which adapters act. All wrappers of a model share one, so switching takes the same time for any number of layers."""

    def __init__(self) -> None:
        self.active: tuple[str, ...] = ()
        self.enabled = True
        self.contexts_off = 0  # how many `off` contexts are open
        self.stays_off = False  # `turn` has switched all adapters off
        self.merged: tuple[str, ...] = ()  # adapters that are in the base weights
        self.trainable: set[str] = set()  # adapters that were made or loaded to train
        self.also_trained: tuple[str, ...] = ()  # adapters whose parameters require gradients though they may not act
        self.frozen: tuple[str, ...] = ()  # adapters that train otherwise, and act now without
        self.changes = 0  # how often a verb gave an adapter another scale or other values
        self.read: set[int] | None = None  # ids of the wrappers whose weight is used, while a pass is watched
        self.running: list[tuple[str, ...]] = []  # adapters of each call whose rows differ, in all threads
        self.changing = threading.RLock()  # held while adapters change: such a call begins before or after that
        self.order_known = False  # whether rows come first in each layer, see `minipeft.injection.row_order`
        self.order_unclear = False  # whether that takes more than the shapes of inputs, see `mark_rows` there
        self.trained_by_row = False  # the last call with gradients was such a one

    def __getstate__(self) -> dict[str, Any]:
        """The state of a copy or a pickle: no context and no call is open in it, so one made within `off` stays off."""
        own = {**vars(self), "stays_off": not self.enabled, "contexts_off": 0, "running": []}
        del own["changing"]
        return own

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, changing=threading.RLock())

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """Within the context no adapter acts. Several may be open, and end in any order."""
        self.contexts_off += 1
        self.enabled = False
        try:
            yield
        finally:
            self.contexts_off -= 1
            self.enabled = self.contexts_off == 0 and not self.stays_off

    @property
    def learning(self) -> tuple[str, ...]:
        """The adapters whose parameters require gradients now."""
        chosen = dict.fromkeys((*self.active, *self.also_trained))
        return tuple(name for name in chosen if name in self.trainable and name not in self.frozen)

    def turn(self, on: bool) -> None:
        """Let adapters act, or not, until the next call."""
        self.stays_off = not on
        self.enabled = on and self.contexts_off == 0

    @property
    def choice(self) -> tuple[tuple[str, ...], bool]:
        """Which adapters act now, and whether any does."""
        return self.active, self.enabled

    @contextlib.contextmanager
    def as_chosen(self, choice: tuple[tuple[str, ...], bool]) -> Iterator[None]:
        """Within the context the adapters of an earlier `choice` act."""
        before, (self.active, self.enabled) = self.choice, choice
        try:
            yield
        finally:
            self.active, self.enabled = before

    def note_read(self, wrapper: Wrapper) -> None:
        """Remember that something used the adapted weight of this layer."""
        if self.read is not None:
            self.read.add(id(wrapper))


class Wrapper(nn.Module):
    """A module that stands in the place of `base_layer` and holds one module for each named adapter.

    Attributes it lacks come from the base layer, so code that reads ``layer.weight`` or ``layer.in_features`` keeps
    working. A parameter assigned to it (as tying weights does) goes to the base layer.
    """

    switch: Switch
    is_the_module: bool
    called_with: str | None  # in place of the rows of the batch, see `minipeft.injection.row_order`

    def __init__(self, base_layer: nn.Module, switch: Switch) -> None:
        super().__init__()
        self.put_base(base_layer)
        self._modules["adapters"] = nn.ModuleDict()
        own = vars(self)  # assigning attributes of a module one by one takes a tenth of the time to adapt a model
        own["switch"] = switch
        own["is_the_module"] = True  # see `minipeft.injection.apply`
        own["training"] = base_layer.training
        own["called_with"] = None

    def file_tensors(self, adapter_name: str) -> dict[str, Tensor]:
        """The tensors that are saved for one adapter: the key after this module's name in a file -> the live tensor."""
        raise NotImplementedError  # an abstract base class would make isinstance, asked for every module, four times slower

    # Properties, since torch finds a child only after all else has failed, and walks over a model ask each wrapper often.

    @property
    def base_layer(self) -> nn.Module:
        """What the wrapper stands in the place of: a layer, or another wrapper."""
        return self._modules["base_layer"]  # type: ignore[return-value]

    @property
    def adapters(self) -> nn.ModuleDict:
        """One module for each adapter, by its name."""
        return self._modules["adapters"]  # type: ignore[return-value]

    @property
    def parts(self) -> dict[str, nn.Module]:
        """The modules in `adapters` by name, without what a ModuleDict does at each look-up."""
        return self._modules["adapters"]._modules  # type: ignore[union-attr,return-value]

    def places(self, adapter_name: str) -> list[Place]:
        """Where the parameters are that training this adapter changes."""
        raise NotImplementedError

    def trainable_parameters(self, adapter_name: str) -> Iterator[nn.Parameter]:
        """The parameters that training this adapter changes."""
        return parameters_at(self.places(adapter_name))

    def mixed_rows(self) -> Rows | None:
        """The rows of the batch that runs now, if they use different adapters of this module."""
        rows = rows_now(self.switch)
        if rows is None or not self.switch.enabled:
            return None
        here = self.adapters._modules
        if torch.compiler.is_compiling():  # the graph is for any rows
            return rows if any(name in here for name in rows.known) else None
        return rows if rows.common(here) is None else None

    def as_one_node(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """A call of this module in a graph of ``torch.fx.symbolic_trace``, which does not look into torch's own layers either."""
        return x.tracer.create_proxy("call_module", x.tracer.path_of_module(self), (x, *args), kwargs)

    def put_base(self, base_layer: nn.Module) -> None:
        """Wrap this layer from now on."""
        self._modules["base_layer"] = base_layer

    def drop(self, adapter_name: str) -> None:
        """Remove an adapter."""
        del self.adapters[adapter_name]

    def rename(self, old: str, new: str) -> None:
        """Give an adapter that is here another name, in its place among the others."""
        replace_key(self.adapters._modules, old, new)

    def __getattr__(self, name: str) -> Any:
        modules = self.__dict__.get("_modules", {})
        if name in modules:
            return modules[name]
        # Also the __deepcopy__ of a parametrized layer, which would copy that alone.
        special = name in OF_ACCELERATE or name.startswith("__")
        if special or "base_layer" not in modules:  # still being built, or being unpickled
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(modules["base_layer"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, AdaptedValue):  # as tying weights assigns what it has read
            value = value.own
        modules = self.__dict__.get("_modules", {})
        is_tensor = value is None or isinstance(value, Tensor)  # asked first, since it is cheap
        owns = is_tensor and "base_layer" in modules and name in innermost(self)._parameters
        if owns or (is_tensor and isinstance(value, nn.Parameter)):
            setattr(self.base_layer, name, value)  # also None, and torch's refusal of a plain tensor
        else:
            super().__setattr__(name, value)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Refuse: nothing would use the parameter here. Pruning, for one, registers parameters."""
        raise StateError(
            f"{name} cannot be a parameter of an adapted {type(innermost(self)).__name__} itself. What prunes a layer takes its "
            f"base_layer instead, or what trains in full, which is adapters[name] of the layer. {UNCHANGED}"
        )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Also accept the keys of the plain base model: ``c_attn.weight`` for ``c_attn.base_layer.weight``."""
        for key in [key for key in state_dict if key.startswith(prefix)]:
            rest = key[len(prefix) :]
            if rest.partition(".")[0] not in ("base_layer", "adapters"):
                state_dict[f"{prefix}base_layer.{rest}"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)


def innermost(module: nn.Module) -> nn.Module:
    """The module itself, without the wrappers around it."""
    while isinstance(module, Wrapper):
        module = module._modules["base_layer"]  # type: ignore[assignment]
    return module


def parameters_at(places: Iterable[Place]) -> Iterator[nn.Parameter]:
    """The parameters that are at these places now."""
    for module, name in places:
        parameter = module._parameters.get(name)
        if parameter is not None:
            yield parameter


def replace_key(table: dict[str, Any], old: str, new: str) -> None:
    """Rename a key of a table, if it is there, without moving it; in place, since others may hold the table."""
    items = [(new if key == old else key, value) for key, value in table.items()]
    table.clear()
    table.update(items)
