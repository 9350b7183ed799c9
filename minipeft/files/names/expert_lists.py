"""The lists of experts that a file's layers come from, and whether the file has all that its configuration selects."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from itertools import zip_longest
from typing import Any

from torch import Tensor

from minipeft.errors import CheckpointError, printable, shown
from minipeft.files.format import AdapterFile
from minipeft.files.names.expert_places import Place
from minipeft.injection.module_tree import Candidate
from minipeft.injection.targets import selected_names
from minipeft.patterns import endings

NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


def layer_configs(file: AdapterFile, found: Mapping[str, Place], modules: Mapping[str, Candidate]) -> dict[str, Any]:
    """The configuration of each layer of a file that is a part of a parameter in the model.

    Raises:
        CheckpointError: the configuration selects other layers than the file has, or two have the same place.
    """
    every: list[str] = []
    for around, (place, size) in _lists(file, found, modules).items():
        every += [str(number).join(around) for number in range(size)] if place.expert is not None else ["".join(around)]
    stacks = {name: f"{name}.weight" for name in every if name in found and _is_whole_stack(found[name], modules)}
    today = set(getattr(file.config, "target_parameters", None) or ())
    chosen = set(selected_names(file.config, [name for name in every if name not in stacks]))
    chosen |= {name for name, parameter in stacks.items() if not today.isdisjoint(endings(parameter))}
    missing = [name for name in every if name in chosen and name not in found]
    foreign = [name for name in found if name not in chosen]
    if missing or foreign:
        what = f"lacks {shown(missing, 3)}, which" if missing else f"holds {shown(foreign, 3)}, but not"
        raise CheckpointError(f"{file.path} {what} its configuration selects.")
    configs = file.config.for_modules([stacks.get(name, name) for name in found])
    return {name: configs[stacks.get(name, name)] for name in found}


def _lists(
    file: AdapterFile, found: Mapping[str, Place], modules: Mapping[str, Candidate]
) -> dict[tuple[str, str], tuple[Place, int]]:
    """The old lists of experts: what stood around the index in a name -> (a place, how many experts the model has)."""
    parts: dict[tuple[str, int], tuple[str, str]] = {}
    lists: dict[tuple[str, str], tuple[Place, int]] = {}
    for name, place in found.items():
        if parts.setdefault((place.name, place.part), place.around) != place.around:
            raise CheckpointError(
                f"{file.path} has two layers that are {place.name} in this model; one is {printable(name, 200)}."
            )
        size = len(_parameter(place, modules))
        if place.expert is not None and place.expert >= size:
            raise CheckpointError(
                f"{file.path} adapts {printable(name, 200)}, and {place.module} has {size} experts. Is it for another base?"
            )
        lists[place.around] = (place, size)
    return lists | _of_other_layers(lists, modules)


def _of_other_layers(
    lists: Mapping[tuple[str, str], tuple[Place, int]], modules: Mapping[str, Candidate]
) -> dict[tuple[str, str], tuple[Place, int]]:
    """The same lists of the layers of the model that are not in the file at all."""
    alike: dict[str, list[str]] = {}
    for module in modules:
        alike.setdefault(NUMBER.sub("*", module), []).append(module)
    others: dict[tuple[str, str], tuple[Place, int]] = {}
    patterns = {(NUMBER.sub("*", before), behind): (before, place) for (before, behind), (place, _) in lists.items()}
    for (pattern, behind), (before, place) in patterns.items():
        if NUMBER.findall(before) != NUMBER.findall(place.module):
            continue  # the layers were counted in another way
        for module in alike[NUMBER.sub("*", place.module)]:
            pieces = zip_longest(pattern.split("*"), NUMBER.findall(module), fillvalue="")
            around = ("".join(map("".join, pieces)), behind)
            parameter = modules[module].base._parameters.get(place.parameter)
            if around not in lists and parameter is not None:
                others[around] = (replace(place, module=module, around=around), len(parameter))
    return others


def _parameter(place: Place, modules: Mapping[str, Candidate]) -> Tensor:
    return modules[place.module].base._parameters[place.parameter]  # type: ignore[return-value]


def _is_whole_stack(place: Place, modules: Mapping[str, Candidate]) -> bool:
    """Whether a layer was all experts already, which only ``target_parameters`` could adapt."""
    return place.expert is None and _parameter(place, modules).ndim == 3
