"""Walking a model: its modules by name and place, the wrappers among them, and who holds which tensor."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minipeft.ecosystem.wrapper_names import named_children, named_modules, wrapper_class
from minipeft.injection.adapted_layer import AdaptedLayer
from minipeft.injection.wrapper import Wrapper, innermost
from minipeft.methods.base import Adapter


class Candidate(NamedTuple):
    """A module that could be adapted: all its names, and the (parent, attribute) places that refer to it.

    `base` is the layer itself, without wrappers around it. If there are wrappers such as ``torch.compile``'s around it or
    above it, `wrapped_names` are the names with those.
    """

    module: nn.Module
    base: nn.Module
    names: tuple[str, ...]
    places: tuple[tuple[nn.Module, str], ...]
    wrapped_names: tuple[str, ...] = ()

    @property
    def known_as(self) -> tuple[str, ...]:
        """Every name that a pattern may use for it."""
        return (*self.names, *self.wrapped_names)


def candidates(model: nn.Module) -> dict[str, Candidate]:
    """Every module below the model, by its first name, without those inside a `Wrapper`."""
    found: dict[int, tuple[nn.Module, list[str], dict[tuple[int, str], tuple[nn.Module, str]], list[str]]] = {}
    for name, path, parent, attribute, module in _walk(model, "", ""):
        _, names, places, wrapped = found.setdefault(id(module), (module, [], {}, []))
        names.append(name)
        places[id(parent), attribute] = (parent, attribute)
        if path != name:
            wrapped.append(path)
    return {
        names[0]: Candidate(module, innermost(module), tuple(names), tuple(places.values()), tuple(wrapped))
        for module, names, places, wrapped in found.values()
    }


def _walk(module: nn.Module, own: str, path: str) -> Iterator[tuple[str, str, nn.Module, str, nn.Module]]:
    """(name, name with the parts of foreign wrappers, parent, attribute, module); those wrappers are left out."""
    for name, attribute, child in named_children(module, own):
        full = f"{path}{attribute}"
        if wrapper_class(child) is None:
            yield name, full, module, attribute, child
        if child._modules and not isinstance(child, Wrapper):  # most have none
            yield from _walk(child, name, f"{full}.")


def own_bias(module: nn.Module) -> nn.Parameter | None:
    """A module's own parameter ``bias``. The tables of a scripted module have no ``get``."""
    return next((parameter for name, parameter in module._parameters.items() if name == "bias"), None)


def is_callable(module: nn.Module) -> bool:
    """Whether a module can be called: a list of layers or of parameters cannot, so nothing can take its place."""
    if isinstance(module, torch.jit.ScriptModule):
        return True
    return type(module).forward is not nn.Module.forward or "forward" in vars(module)


def occupants(module: nn.Module) -> Iterator[Wrapper]:
    """The wrappers in a module's place, the outermost first."""
    while isinstance(module, Wrapper):
        yield module
        module = module.base_layer


def outside_adapters(model: nn.Module, *, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Module]]:
    """Every (name, module) but the adapters on adapted layers, so a walk takes no longer with a hundred of them."""
    return named_modules(model, remove_duplicate=remove_duplicate, children=_children_but_adapters)


def _children_but_adapters(module: nn.Module, name: str) -> list[tuple[str, str, nn.Module]]:
    if isinstance(module, AdaptedLayer):
        base: Any = module._modules["base_layer"]  # faster than by its property
        return [(f"{name}.base_layer" if name else "base_layer", "base_layer", base)]
    return named_children(module, name)


def _children_with_wrappers(module: nn.Module, name: str) -> list[tuple[str, str, nn.Module]]:
    if isinstance(module, AdaptedLayer) and not module.base_layer._modules:
        return []  # a layer without modules inside, as most are
    return _children_but_adapters(module, name)


def wrappers(model: nn.Module) -> Iterator[tuple[str, Wrapper]]:
    """Every (name, wrapper) of a model, each once, under the name its tensors have in a file."""
    for name, module in named_modules(model, children=_children_with_wrappers):
        if isinstance(module, Wrapper):
            yield name, module


def wrappers_of(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, Wrapper]]:
    """Every (name, wrapper) that holds a part of this adapter."""
    return ((name, wrapper) for name, wrapper in wrappers(model) if adapter_name in wrapper.parts)


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, AdaptedLayer]]:
    """Every (name, adapted layer) of a model."""
    for name, module in wrappers(model):
        if isinstance(module, AdaptedLayer):
            yield name, module


def layers_of(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, AdaptedLayer]]:
    """Every (name, adapted layer) that an adapter is on, without those that only a companion of its is on."""
    for name, layer in adapted_layers(model):
        if layer.owns(adapter_name) and not layer.adapter(adapter_name).key_prefix:
            yield name, layer


def adapters_of(model: nn.Module, adapter_name: str) -> dict[str, Adapter]:
    """The modules of one adapter, by the name of the layer that each is on; see `layers_of`."""
    return {name: layer.adapter(adapter_name) for name, layer in layers_of(model, adapter_name)}


class TensorIndex:
    """Which parameters of a model lie where in memory, so that ties are found without comparing every pair.

    Without those of adapters, which own theirs. `outside` are the model's `outside_adapters`, if they have been found already.
    """

    def __init__(self, model: nn.Module, outside: Iterable[tuple[str, nn.Module]] | None = None) -> None:
        self._by_storage: dict[tuple[torch.device, int], list[tuple[nn.Module, str, str, nn.Parameter]]] = {}
        for name, module in outside_adapters(model) if outside is None else outside:
            for parameter_name, parameter in module._parameters.items():
                if parameter is not None:
                    entry = module, name, parameter_name, parameter
                    self._by_storage.setdefault(_storage(parameter), []).append(entry)
        # Whether two parameters lie in the same memory, as in few models.
        self.is_shared = sum(map(len, self._by_storage.values())) > len(self._by_storage)

    def owners(self, tensor: Tensor) -> list[tuple[str, nn.Module]]:
        """(parameter name, module) of every parameter that is `tensor` or occupies exactly the same memory."""
        entries = self._by_storage.get(_storage(tensor), [])
        return [
            (_joined(m, p), module) for module, m, p, own in entries if own is tensor or _span(own) == _span(tensor)
        ]

    def also_used_by(self, tensor: Tensor, *owners: nn.Module) -> list[str]:
        """Names of the parameters of modules other than `owners` that change when `tensor` is written."""
        return [
            _joined(name, parameter_name)
            for module, name, parameter_name, other in self._by_storage.get(_storage(tensor), [])
            if all(module is not owner for owner in owners) and _overlap(tensor, other)
        ]


def _joined(name: str, parameter: str) -> str:
    return f"{name}.{parameter}" if name else parameter


def _storage(tensor: Tensor) -> tuple[torch.device, int]:
    # A tensor without memory of its own (sparse, on the meta device, or a wrapper such as torchao's) equals only itself.
    has_memory = tensor.layout is torch.strided and tensor.data_ptr()
    return tensor.device, tensor.untyped_storage().data_ptr() if has_memory else id(tensor)


def _overlap(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors in the same storage have bytes in common."""
    if one is other:
        return True
    (start, end), (other_start, other_end) = _span(one), _span(other)
    return start < other_end and other_start < end


def _span(tensor: Tensor) -> tuple[int, int]:
    """First and one-past-last byte of a tensor within its storage; (0, 0) for an empty one."""
    if tensor.numel() == 0:
        return 0, 0
    last = sum((int(size) - 1) * int(stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = int(tensor.storage_offset())
    return start * tensor.element_size(), (start + last + 1) * tensor.element_size()
