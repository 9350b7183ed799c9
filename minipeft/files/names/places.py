"""The places that a model has for the keys of a file, and readings of the keys: under which names of the model they belong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import nn

from minipeft.config.adapter_config import AdapterConfig
from minipeft.ecosystem.wrapper_names import PREFIX, unwrapped_name
from minipeft.files.names.wrapper_parts import shared_key
from minipeft.injection.module_tree import Candidate
from minipeft.layers.base import layer_ops

# What PEFT puts between a module's name and the tensor's: the module was wrapped for an adapter, or trained in full.
INFIXES = frozenset({"base_layer", "modules_to_save", "original_module"})


class Place(NamedTuple):
    """A module of the model, and what follows its name in a key, such as ``lora_A.weight``."""

    module: str
    tail: str


class Places:
    """Looks up keys, and names without PEFT's prefix, among the modules of one model, its `candidates` in `here`.

    Bare parameters are places only if the file's ``target_parameters`` name some.
    """

    def __init__(self, model: nn.Module, config: AdapterConfig, here: Mapping[str, Candidate]) -> None:
        self.model = model
        self.here = here
        self.modules = {name: candidate.base for candidate in here.values() for name in candidate.known_as}
        self.depth = max((name.count(".") + 1 for name in self.modules), default=0)
        self._companions = tuple(prefix for prefix, _ in config.companions())
        self._parameters = {entry.rpartition(".")[2] for entry in config.target_parameters or ()}
        self._adaptable: dict[type[nn.Module], bool] = {}

    def takes(self, key: str) -> bool:
        """Whether a key has a place under its own name; tensors that all layers share belong to no module."""
        if key.startswith(PREFIX):
            name = key.removeprefix(PREFIX)
            return self.place(name) is not None or self.place(unwrapped_name(name)) is not None
        return shared_key(key) == key

    def place(self, name: str) -> Place | None:
        """Where a name without prefix belongs: the innermost module that it names, if that can have such a tensor."""
        parts = name.split(".", self.depth + 1)
        depth = len(parts) - 1
        if not INFIXES.isdisjoint(parts):
            depth = next(n for n, part in enumerate(parts) if part in INFIXES)
        for end in range(min(depth, self.depth), 0, -1):
            module = ".".join(parts[:end])
            if module in self.modules:
                tail = name[len(module) + 1 :]
                return Place(module, tail) if self._can_have(self.modules[module], tail) else None
        return None

    def is_adapters(self, place: Place) -> bool:
        """Whether a tensor belongs to an adapter on its module, and not to the module itself or to a companion's rows."""
        if self._companions and place.tail.startswith(self._companions):
            return False
        first = place.tail.split(".", 1)[0]
        if first in INFIXES and first != "base_layer":
            return False
        tail = place.tail
        while tail.startswith("base_layer."):
            tail = tail.removeprefix("base_layer.")
        return not _owns(self.modules[place.module], tail)

    def _can_have(self, module: nn.Module, tail: str) -> bool:
        kind = type(module)
        if kind not in self._adaptable:
            self._adaptable[kind] = layer_ops(module) is not None
        if self._adaptable[kind] or tail.split(".", 1)[0] in INFIXES or _owns(module, tail):
            return True
        return not self._parameters.isdisjoint(module._parameters)


def _owns(module: nn.Module, tail: str) -> bool:
    return tail in module._parameters or tail in module._buffers


class Reading(NamedTuple):
    """Keys of a file -> names of the model's, both with what follows the module's name."""

    names: Mapping[str, str]
    rule: str  # what was done, for the log
