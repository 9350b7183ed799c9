"""The wrapper layer: a base layer with its adapters beside it, and the switch that says which of them act."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from minipeft.errors import MergeError, shown
from minipeft.layers.base import LayerOps
from minipeft.layers.uncalled import ReadOps
from minipeft.methods.base import Adapter


class Switch:
    """Which adapters act. All wrappers of a model share one, so switching costs the same for any number of layers."""

    def __init__(self) -> None:
        self.active: tuple[str, ...] = ()
        self.enabled = True


class Wrapper(nn.Module, ABC):
    """A module that stands in the place of `base_layer` and holds one thing a named adapter.

    What it does not have itself it takes from the base layer, so code that reads ``layer.weight`` or
    ``layer.in_features`` keeps working; a parameter assigned to it (as tying weights does) goes to the base layer.
    """

    def __init__(self, base_layer: nn.Module, switch: Switch) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.adapters = nn.ModuleDict()
        self.switch = switch
        self.training = base_layer.training

    @abstractmethod
    def file_tensors(self, adapter_name: str) -> dict[str, Tensor]:
        """What is saved of one adapter: the key after this module's name in a file -> the live tensor."""

    def trainable_parameters(self, adapter_name: str) -> Iterator[nn.Parameter]:
        """The parameters that training this adapter moves."""
        if adapter_name in self.adapters:
            yield from self.adapters[adapter_name].parameters()

    def drop(self, adapter_name: str) -> None:
        """Take an adapter out."""
        del self.adapters[adapter_name]

    def __getattr__(self, name: str) -> Any:
        modules = self.__dict__.get("_modules", {})
        if name in modules:
            return modules[name]
        if "base_layer" not in modules:  # still being built, or being unpickled
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(modules["base_layer"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, nn.Parameter):
            setattr(self.base_layer, name, value)
        else:
            super().__setattr__(name, value)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Also accept the base model's own keys: ``c_attn.weight`` for ``c_attn.base_layer.weight``."""
        for key in [key for key in state_dict if key.startswith(prefix)]:
            rest = key[len(prefix) :]
            if rest.partition(".")[0] not in ("base_layer", "adapters"):
                state_dict[f"{prefix}base_layer.{rest}"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)


class AdaptedLayer(Wrapper):
    """A frozen layer and its adapters: ``y = base_layer(x)``, then each active adapter's turn on y.

    Adapters that are merged are in the base weight already and take no turn. `undo` (see `minipeft.merging.merge`) is what
    brings the base weight back. `targeted` says whether ``target_modules`` selects the module. An adapter in
    `following` is saved and trained with the layer that leads.
    """

    def __init__(self, base_layer: nn.Module, switch: Switch, ops: LayerOps, targeted: bool = True) -> None:
        super().__init__(base_layer, switch)
        self.ops = ops
        self.targeted = targeted
        self.merged: tuple[str, ...] = ()
        self.undo: Any = None
        self.tied_adapters: set[str] = set()  # adapters that are another layer's, whose weight this one holds too

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.run_with(self.acting(), x, *args, **kwargs)

    def acting(self) -> tuple[str, ...]:
        """The adapters that take their turn now."""
        if not self.switch.enabled:
            return ()
        here = self.adapters._modules
        return tuple([n for n in self.switch.active if n in here and n not in self.merged])

    def changed_rows(self) -> list[tuple[Tensor, Tensor]] | None:
        """What the acting adapters add to rows of the weight (see `Adapter.changed_rows`); None where one does more."""
        changed = [self.adapter(name).changed_rows() for name in self.acting()]
        known = [rows for rows in changed if rows is not None]
        return known if len(known) == len(changed) else None

    def run_with(self, names: tuple[str, ...], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The output with these adapters and no other, each taking its turn."""
        y: Any = None
        here = self.adapters._modules
        acting: list[Any] = [here[name] for name in names]
        if len(acting) == 1 and acting[0].runs_base and not (acting[0].acts_before or args or kwargs):
            return acting[0](self.base_layer, self.ops, x, None)  # a shorter way to the same, for few rows
        inputs = [x]  # what each adapter sees, the last one first: it decides what those before it see
        for adapter in reversed(acting):
            inputs.append(adapter.before(self.base_layer, self.ops, inputs[-1]) if adapter.acts_before else inputs[-1])
        x = inputs.pop()
        for adapter in acting:
            if y is None and (args or kwargs or not adapter.runs_base):
                y = self.ops.output(self.base_layer, x, *args, **kwargs)
            y = adapter(self.base_layer, self.ops, inputs.pop(), y)
        return self.ops.run(self.base_layer, x, *args, **kwargs) if y is None else y

    @property
    def owner(self) -> nn.Module:
        """The module that owns the weight."""
        return innermost(self.base_layer)

    def adapter(self, name: str) -> Adapter:
        """The adapter of that name on this layer."""
        adapter = self.adapters[name]
        assert isinstance(adapter, Adapter)
        return adapter

    def owns(self, adapter_name: str) -> bool:
        """Whether the adapter is here, and as this layer's own."""
        return adapter_name in self.adapters and adapter_name not in self.tied_adapters

    def drop(self, adapter_name: str) -> None:
        super().drop(adapter_name)
        self.tied_adapters.discard(adapter_name)

    def trainable_parameters(self, adapter_name: str) -> Iterator[nn.Parameter]:
        if self.owns(adapter_name):
            yield from self.adapter(adapter_name).trainable_parameters()

    def check_separable(self, path: str, names: tuple[str, ...]) -> None:
        """See that merging these adapters and no other leaves what the active ones do together as it is.

        Raises:
            MergeError: one of them reads the base weight, and another acts and is not to be merged.
        """
        left_out = tuple(name for name in self.switch.active if name in self.adapters and name not in names)
        readers = [name for name in names + left_out if self.adapter(name).reads_base]
        if left_out and readers:
            raise MergeError(
                f"{path}: what {shown(readers)} does depends on the base weight, so {shown(names)} cannot be merged "
                f"without {shown(left_out)}."
            )

    def file_tensors(self, adapter_name: str) -> dict[str, Tensor]:
        if not self.owns(adapter_name):
            return {}
        adapter = self.adapter(adapter_name)
        return {f"{adapter.key_prefix}{key}": tensor for key, tensor in adapter.file_tensors().items()}

    def extra_repr(self) -> str:
        return f"merged={list(self.merged)}" if self.merged else ""


class AdaptedWeight(AdaptedLayer):
    """A module that reads its weight: it is run with the adapted weight in place of its own, which stays as it is.

    Two parameters of one module are two of these, one around the other, as PEFT's files have it. The weights that
    `LayerOps.read_children` names are handed in along with the module's own.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        weights = self.adapted_weights("")
        for attribute in self.ops.read_children(self.owner):
            part = self.owner._modules[attribute]
            if isinstance(part, AdaptedWeight):
                weights.update(part.adapted_weights(f"{attribute}."))
        return functional_call(self.base_layer, weights, args, kwargs) if weights else self.base_layer(*args, **kwargs)

    def adapted_weights(self, prefix: str) -> dict[str, Tensor]:
        """The weight as the acting adapters make it, by the name it has below `prefix`; empty where none acts."""
        assert isinstance(self.ops, ReadOps)
        owner, acting = self.owner, self.acting()
        if not acting:
            return {}
        x, y = self.ops.as_call(owner)
        with torch.autocast(y.device.type, enabled=False):
            for name in acting:
                y = self.adapters[name](owner, self.ops, x, y)
        path = "base_layer." * (prefix != "")
        inner = self.base_layer
        while isinstance(inner, Wrapper):
            path, inner = f"{path}base_layer.", inner.base_layer
        return {f"{prefix}{path}{self.ops.reads}": self.ops.from_call(owner, y)}


def innermost(module: nn.Module) -> nn.Module:
    """The module itself, without the wrappers around it."""
    while isinstance(module, Wrapper):
        module = module.base_layer
    return module


def wrappers(model: nn.Module) -> Iterator[tuple[str, Wrapper]]:
    """Every (name, wrapper) of a model, each once, under the name that its tensors have in a file."""
    for name, module in model.named_modules():
        if isinstance(module, Wrapper):
            yield name, module


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, AdaptedLayer]]:
    """Every (name, adapted layer) of a model."""
    for name, module in wrappers(model):
        if isinstance(module, AdaptedLayer):
            yield name, module


class TensorIndex:
    """Which parameters of a model live where in memory, so that ties are found without comparing all with all."""

    def __init__(self, model: nn.Module) -> None:
        self._by_storage: dict[tuple[str, int], list[tuple[nn.Module, str, nn.Parameter]]] = {}
        for name, module in model.named_modules():
            for parameter_name, parameter in module._parameters.items():
                if parameter is not None:
                    full_name = f"{name}.{parameter_name}" if name else parameter_name
                    self._by_storage.setdefault(_storage(parameter), []).append((module, full_name, parameter))

    def owners(self, tensor: Tensor) -> list[tuple[str, nn.Module]]:
        """(parameter name, module) of every parameter that is `tensor` or lies exactly where it lies."""
        entries = self._by_storage.get(_storage(tensor), [])
        return [(name, module) for module, name, parameter in entries if _span(parameter) == _span(tensor)]

    def also_used_by(self, tensor: Tensor, *owners: nn.Module) -> list[str]:
        """Names of the parameters of other modules than `owners` that change when `tensor` is written."""
        start, end = _span(tensor)
        users = []
        for module, name, parameter in self._by_storage.get(_storage(tensor), []):
            other_start, other_end = _span(parameter)
            if all(module is not owner for owner in owners) and start < other_end and other_start < end:
                users.append(name)
        return users


def _storage(tensor: Tensor) -> tuple[str, int]:
    # Without memory of its own, on the meta device or wrapped around other tensors (torchao's), it is only itself.
    return str(tensor.device), tensor.untyped_storage().data_ptr() if tensor.data_ptr() else id(tensor)


def _span(tensor: Tensor) -> tuple[int, int]:
    """First and one-past-last byte of a tensor within its storage; (0, 0) for an empty one."""
    if tensor.numel() == 0:
        return 0, 0
    last = sum((int(size) - 1) * int(stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = int(tensor.storage_offset())
    return start * tensor.element_size(), (start + last + 1) * tensor.element_size()
