"""Whether a file has exactly the old layers that its configuration selects: one that lacks some would be partly loaded."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

from torch import Tensor

from minipeft.config.adapter_config import AdapterConfig
from minipeft.config.patterns import matching
from minipeft.errors import CheckpointError, printable, shown
from minipeft.files.format import AdapterFile
from minipeft.files.names.experts.pair import OldLayer
from minipeft.files.names.experts.places import ExpertPlace
from minipeft.injection.module_tree import Candidate
from minipeft.injection.targets import selected_names

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
# What stood around the index in the names of a list of experts, as ("layers.0.mlp.experts.", ".gate_proj").
Around = tuple[str, str]


def check_complete(file: AdapterFile, layers: Mapping[str, OldLayer], modules: Mapping[str, Candidate]) -> None:
    """Raise CheckpointError if the file lacks a layer of an expert that its configuration selects, or has one that it does not.

    Args:
        file: unread.
        layers: what it has, by name.
        modules: the model's `candidates`.
    """
    lists = _lists(file, layers, modules)
    lists |= _lists_of_other_layers(lists, modules)
    options = dict(_names_in_options(lists, modules))
    chosen = _selected(file.config, options)
    missing = [name for name in options if name in chosen and name not in layers]
    foreign = [name for name in layers if name not in chosen]
    if missing or foreign:
        what = f"lacks {shown(missing, 3)}, which" if missing else f"holds {shown(foreign, 3)}, but not"
        raise CheckpointError(f"{file.path} {what} its configuration selects.")


def name_in_options(name: str, place: ExpertPlace, modules: Mapping[str, Candidate]) -> str:
    """What options call an old layer: its name, or that of its weight if it was all experts, for ``target_parameters`` alone."""
    return f"{name}.weight" if place.expert is None and _parameter(place, modules).ndim == 3 else name


def _parameter(place: ExpertPlace, modules: Mapping[str, Candidate]) -> Tensor:
    return modules[place.module].base._parameters[place.parameter]  # type: ignore[return-value]


def _lists(
    file: AdapterFile, layers: Mapping[str, OldLayer], modules: Mapping[str, Candidate]
) -> dict[Around, ExpertPlace]:
    """The lists of experts that the file has layers of, and the place of one of these."""
    lists: dict[Around, ExpertPlace] = {}
    around: dict[tuple[str, int], Around] = {}
    for name, place in ((name, layer.place) for name, layer in layers.items()):
        if around.setdefault((place.name, place.part), place.around) != place.around:
            raise CheckpointError(
                f"{file.path} has two layers that are {place.name} in this model; one is {printable(name, 200)}."
            )
        size = len(_parameter(place, modules))
        if place.expert is not None and place.expert >= size:
            raise CheckpointError(
                f"{file.path} adapts {printable(name, 200)}, and {place.module} has {size} experts. Is it for another base?"
            )
        lists[place.around] = place
    return lists


def _lists_of_other_layers(
    lists: Mapping[Around, ExpertPlace], modules: Mapping[str, Candidate]
) -> dict[Around, ExpertPlace]:
    """The same lists in the layers of the model of which the file has nothing at all."""
    alike: dict[str, list[str]] = {}
    for module in modules:
        alike.setdefault(_NUMBER.sub("*", module), []).append(module)
    one_of_each = {(_NUMBER.sub("*", before), behind): place for (before, behind), place in lists.items()}
    others: dict[Around, ExpertPlace] = {}
    for place in one_of_each.values():
        before, behind = place.around
        if _NUMBER.findall(before) != _NUMBER.findall(place.module):
            continue  # the layers were counted in another way
        for module in alike[_NUMBER.sub("*", place.module)]:
            around = (_with_numbers_of(module, before), behind)
            if around not in lists and modules[module].base._parameters.get(place.parameter) is not None:
                others[around] = replace(place, module=module, around=around)
    return others


def _with_numbers_of(module: str, name: str) -> str:
    """A name with its numbers replaced by those of a module's name, which has as many."""
    numbers = iter(_NUMBER.findall(module))
    return _NUMBER.sub(lambda _: next(numbers), name)


def _names_in_options(
    lists: Mapping[Around, ExpertPlace], modules: Mapping[str, Candidate]
) -> Iterator[tuple[str, str]]:
    """(name, `name_in_options`) of every layer in these lists."""
    for (before, behind), place in lists.items():
        if place.expert is None:
            yield before + behind, name_in_options(before + behind, place, modules)
        else:
            every = (f"{before}{number}{behind}" for number in range(len(_parameter(place, modules))))
            yield from ((name, name) for name in every)


def _selected(config: AdapterConfig, options: Mapping[str, str]) -> set[str]:
    """The layers that a configuration selects, of those with these names in options."""
    layers = selected_names(config, [name for name, option in options.items() if option == name])
    weights = set(
        matching(config.target_parameters or (), [option for name, option in options.items() if option != name])
    )
    return {*layers, *(name for name, option in options.items() if option in weights)}
