"""A model whose weights are brought from a checkpoint on disk while they are needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from minipeft.ecosystem.transformers_model import vocabulary_tables
from minipeft.layers.offloaded import HOOK
from minipeft.merging.from_disk.base import Base
from minipeft.merging.from_disk.names import Group, Renamed, find_groups
from minipeft.merging.from_disk.stored import same_bytes

Places = list[tuple[str, nn.Module, str]]  # name of a parameter, its owner, and its name there
Read = Callable[[], Tensor]


@dataclass(frozen=True)
class DiskModel:
    """A model and where its values are."""

    model: nn.Module  # on the meta device, but for what the checkpoint lacks: those parameters are NaN
    state: Mapping[str, Tensor]  # its parameters and persistent buffers by name, before it is adapted
    # Name of a parameter or buffer -> what it is stored as, if the stored values are the model's
    groups: Mapping[str, Group]
    unfit: Mapping[str, Group]  # name of a parameter -> what the base stores under its name in another shape
    ties: tuple[tuple[str, ...], ...]  # the names of each parameter that has several
    tables: frozenset[str]  # names of the input embedding's and the output head's weight

    def tied(self, name: str) -> tuple[str, ...]:
        """The names of a parameter."""
        return next((names for names in self.ties if name in names), (name,))

    def source(self, name: str) -> Group | None:
        """What a parameter is read from: its own group, or that of a parameter tied to it."""
        return next((self.groups[each] for each in (name, *self.tied(name)) if each in self.groups), None)

    def stored_as(self, name: str) -> Group | None:
        """What the base stores under a parameter's name, fit or not."""
        return self.groups.get(name) or self.unfit.get(name)


def connect(model: nn.Module, base: Base) -> DiskModel:
    """Have the parameters of a model read from a checkpoint; parameters that share a value in the model stay shared."""
    groups, unfit = find_groups(model, model.state_dict(), base.tensors.values()), dict[str, Group]()
    tables = _tables(model)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        group = groups.get(name)
        if group is not None and group.made[name].shape != parameter.shape:
            grown = _grown(group, name, parameter) if name in tables else None
            if grown is None:
                unfit[name] = groups.pop(name)
            else:
                groups[name] = grown
    places = _places(model)
    dtype = _dtype(model, groups)
    for shared in places:
        _connect(shared, groups, dtype)
    ties = tuple(tuple(name for name, _, _ in shared) for shared in _places(model) if len(shared) > 1)
    return DiskModel(model, dict(model.state_dict(keep_vars=True)), groups, unfit, ties, tables)


def _tables(model: nn.Module) -> frozenset[str]:
    names = model.named_modules(remove_duplicate=False)
    found = [module for module in vocabulary_tables(model) if module._parameters.get("weight") is not None]
    return frozenset(f"{name}.weight" for name, module in names if any(module is table for table in found))


def _grown(group: Group, name: str, parameter: nn.Parameter) -> Group | None:
    """The group of a table with more rows than are stored, None if it is not that."""
    stored = group.stored[0]
    if not isinstance(group, Renamed) or len(stored.shape) != 2 or stored.shape[1] != parameter.shape[1]:
        return None
    if stored.shape[0] > len(parameter):
        return None
    return replace(group, made={name: group.made[name].new_empty(parameter.shape)})


def _places(model: nn.Module) -> list[Places]:
    """The places of each parameter."""
    found: dict[int, Places] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                found.setdefault(id(parameter), []).append((f"{path}.{name}".lstrip("."), module, name))
    return list(found.values())


def _dtype(model: nn.Module, groups: Mapping[str, Group]) -> torch.dtype:
    """What loading would give a part that the checkpoint lacks: the configuration's dtype, or that of the first weight."""
    found = getattr(model.config, "dtype", None)
    stored = (made.dtype for group in groups.values() for made in group.made.values())
    first = next((dtype for dtype in stored if dtype.is_floating_point), torch.float32)
    return found if isinstance(found, torch.dtype) else first


def _connect(places: Places, groups: Mapping[str, Group], dtype: torch.dtype) -> None:
    """Have one parameter read in all its places; two that the base stores with other values are not tied."""
    stored = [place for place in places if place[0] in groups]
    if not stored:
        old = places[0][1]._parameters[places[0][2]]
        assert old is not None
        # No file holds NaN for a base, so nothing is compared with it.
        value = (
            torch.full(old.shape, float("nan"), dtype=dtype)
            if old.is_floating_point()
            else torch.zeros(old.shape, dtype=old.dtype)
        )
        _put(nn.Parameter(value, requires_grad=old.requires_grad), places)
        return
    first = stored[0]
    own = groups[first[0]].stored
    apart = [place for place in stored[1:] if not all(map(same_bytes, own, groups[place[0]].stored))]
    _bring(first[0], groups[first[0]], [place for place in places if place not in apart])
    for place in apart:
        _bring(place[0], groups[place[0]], [place])


def _bring(name: str, group: Group, places: Places) -> None:
    made = group.made[name]
    parameter = nn.Parameter(torch.empty_like(made), requires_grad=made.is_floating_point())
    parameter._is_hf_initialized = True  # type: ignore[attr-defined]  # it is in the checkpoint
    _put(parameter, places)
    for _, module, own in places:
        bring(module, own, lambda: group.read()[name])


def _put(parameter: nn.Parameter, places: Places) -> None:
    for _, module, name in places:
        module._parameters[name] = parameter


class Presence:
    """Stands where accelerate keeps its hook, and does for `minipeft.layers.offloaded.present` what that does.

    Between two uses a weight is on the meta device, always the same parameter, so tied ones are known by that.

    Args:
        sources: name of a parameter of the module -> what reads it.
    """

    offload = True
    keeps_ties = True
    execution_device = None

    def __init__(self, sources: Mapping[str, Read]) -> None:
        self.sources = dict(sources)
        self.absent: dict[str, nn.Parameter] = {}

    def pre_forward(self, module: nn.Module, *args: Any) -> None:
        """Bring the weights."""
        for name, read in self.sources.items():
            own = module._parameters.get(name)
            if own is not None and own.is_meta:
                self.absent[name] = own
                module._parameters[name] = nn.Parameter(read(), requires_grad=False)

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        """Take them away again."""
        for name, own in self.absent.items():
            module._parameters[name] = own
        self.absent = {}
        return output

    def __deepcopy__(self, memo: dict[int, Any]) -> Presence:
        """A copy of the module has its weights for good."""
        twin = Presence({})
        twin.offload = False
        return twin


def bring(module: nn.Module, name: str, read: Read) -> None:
    """Have a parameter of a module read by this function whenever it is needed."""
    hook = vars(module).get(HOOK)
    if hook is None:
        hook = Presence({})
        setattr(module, HOOK, hook)
    hook.sources[name] = read
