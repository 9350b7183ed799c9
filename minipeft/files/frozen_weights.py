"""Frozen weights that an adapter leaves alone and that may not be in the base's checkpoint: samples, compared on loading."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Iterator

from torch import nn

from minipeft.errors import shown
from minipeft.files.format import AdapterFile
from minipeft.files.vocabulary_tables import base_rows, tables
from minipeft.injection.adapted_layer import AdaptedLayer
from minipeft.injection.fresh_parts import base_parameters, find_origins
from minipeft.injection.module_tree import candidates, wrappers
from minipeft.injection.modules_to_save import SavedModule
from minipeft.injection.plan import Plan
from minipeft.injection.wrapper import innermost
from minipeft.wrapper_names import parameters_in


def frozen_weights(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, nn.Parameter]]:
    """The weights to sample for an adapter, by full name: frozen, not in its file, and not known to be the checkpoint's."""
    taken: set[int] = set()
    for _, wrapper in wrappers(model):
        base = innermost(wrapper)
        if isinstance(wrapper, AdaptedLayer) and (wrapper.owns(adapter_name) or wrapper.merged):
            taken.update(map(id, parameters_in(base)))
        elif isinstance(wrapper, SavedModule) and adapter_name in wrapper.adapters:
            taken |= _saved(base, wrapper.only)
    return ((name, p) for name, p in _of_unsure_origin(model, taken) if not p.requires_grad)


def planned_frozen_weights(model: nn.Module, plan: Plan) -> Iterator[tuple[str, nn.Parameter]]:
    """What `frozen_weights` will return once a plan is carried out."""
    taken = {id(parameter) for site in plan.adapters for parameter in parameters_in(site.candidate.base)}
    for site in plan.saved:
        taken |= _saved(site.candidate.base, site.only)
    return _of_unsure_origin(model, taken)


def _saved(base: nn.Module, only: Collection[str] | None) -> set[int]:
    return {id(parameter) for name, parameter in base.named_parameters() if only is None or name in only}


def _of_unsure_origin(model: nn.Module, taken: Collection[int]) -> Iterator[tuple[str, nn.Parameter]]:
    """Weights of layers without children: a bare one next to them, such as a mask token, often acts in training only."""
    found = candidates(model)
    origins, known = find_origins(model, found), tables(model)
    # The rows of a resized vocabulary have a place of their own in a file.
    resized = {id(table.weight) for name, table in known.items() if len(table.weight) != base_rows(model, name, table)}
    for name, owner, parameter in base_parameters(model, found):
        if owner._modules or id(parameter) in taken or id(parameter) in resized:
            continue
        if name in origins.fresh or name in origins.unknown:
            yield name, parameter


def warn_of_missing_parts(file: AdapterFile, plan: Plan, frozen: Iterable[str]) -> None:
    """Warn about weights that were drawn at random when this base was loaded, and of which the file says nothing.

    `frozen` are the names of `planned_frozen_weights`.
    """
    lacking = [name for name in frozen if name in plan.origins.fresh and name not in file.base]
    if lacking:
        warnings.warn(
            f"{file.path.parent} does not bring {shown(lacking)}, which this base's checkpoint lacks too: they were drawn "
            "at random when it was loaded, so results may differ from those in training.",
            stacklevel=4,
        )
