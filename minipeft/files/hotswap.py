"""Hot swap: a live adapter gets the weights of another file in the tensors that it has.

A compiled model and a captured CUDA graph hold on to tensors and to the numbers that they were made with. So nothing here
makes a new parameter: the values are copied into the old ones, a smaller rank is filled with zeros, and with
`prepare_hotswap` the scaling is a tensor too. All is read and compared before the first value is written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from os import PathLike
from typing import Any

import torch
from torch import nn

from minipeft.config.options import flags
from minipeft.config.options import rank as checked_rank
from minipeft.ecosystem.wrapper_names import unwrapped
from minipeft.errors import CheckpointError, ConfigError, StateError, all_or_nothing
from minipeft.files.foreign_options import check_options
from minipeft.files.hub import adapter_directory
from minipeft.files.load import load_parts
from minipeft.files.save_pretrained import DEFAULT
from minipeft.injection.adapted_layer import AdaptedLayer
from minipeft.injection.build import Parts
from minipeft.injection.module_tree import wrappers_of
from minipeft.injection.plan import Plan
from minipeft.injection.state import WithAdapters, not_running
from minipeft.injection.wrapper import Wrapper
from minipeft.layers.offloaded import check_values_here
from minipeft.methods.base import Adapter
from minipeft.methods.swapping import copy_tensors, unlike
from minipeft.python.interrupts import interrupts_deferred

Pairs = list[tuple[str, Wrapper, nn.Module, nn.Module]]  # name, where it is, what is there, what comes


class HotswapModel(WithAdapters):
    """The part of `minipeft.AdaptedModel` that replaces the weights of a live adapter."""

    @all_or_nothing
    def prepare_hotswap(self, max_rank: int, adapter_name: str | None = None) -> None:
        """Make room in an adapter for others of up to this rank. Call it before compiling the model or making an optimizer.

        The factors get zeros up to `max_rank`, which are neither saved nor, as they get no gradient, trained. The scaling
        becomes a tensor, so that a compiled model reads it anew at each run.

        Args:
            max_rank: the largest rank of an adapter that `hotswap_adapter` will bring, for every layer.
            adapter_name: None: each adapter.

        Raises:
            ConfigError: an adapter here has a larger rank already, or its rank cannot change.
            StateError: there is no such adapter; or it has gradients, which have the old shape, or it is sharded or
                offloaded, or a batch runs that uses it by ``adapter_names``.
        """
        checked_rank("max_rank", max_rank)
        names = list(self._state.configs) if adapter_name is None else [adapter_name]
        self._check_known(names)
        adapters = [(path, part) for name in names for path, _, part in _parts(self, name) if isinstance(part, Adapter)]
        for path, adapter in adapters:
            _check_room(path, adapter, max_rank)
        with not_running(self._state, names), interrupts_deferred():
            for _, adapter in adapters:
                adapter.room_for(max_rank)

    @all_or_nothing
    def hotswap_adapter(
        self,
        directory: str | PathLike[str],
        adapter_name: str = DEFAULT,
        *,
        allow_base_mismatch: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        subfolder: str | None = None,
        local_files_only: bool = False,
        **others: Any,
    ) -> None:
        """Give a live adapter the weights of a file, in the parameters that it has; its name and its part stay.

        It may train on, but an optimizer still has the averages of the old weights. A layer that the file does not adapt
        is left with an update of zero. What `save_pretrained` writes afterwards is what the file held.

        Args:
            directory: as for `minipeft.load_adapter`, and so are the other options.
            adapter_name: the adapter that gets the weights.
            allow_base_mismatch, key_mapping, revision, token, subfolder, local_files_only, others: see `minipeft.load_adapter`.

        Raises:
            CheckpointError: the file is damaged, for another base, or does not fit the adapter: it has another method, a
                larger rank than there is room for, or adapts what the adapter does not. The old weights go on acting.
            StateError: there is no such adapter, one is merged into the base, accelerate offloads this one, or a batch runs
                that uses it by ``adapter_names``.
        """
        check_options("hotswap_adapter", others)
        self._check_known([adapter_name])
        flags(allow_base_mismatch=allow_base_mismatch)
        self._state.check_unmerged()
        path = adapter_directory(
            directory, revision=revision, token=token, subfolder=subfolder, local_files_only=local_files_only
        )
        plan, parts, _ = load_parts(
            self, path, strict=True, allow_base_mismatch=allow_base_mismatch, key_mapping=key_mapping
        )
        try:
            pairs = _paired(adapter_name, plan, parts)
            left = _left(self, adapter_name, pairs)
        except ConfigError as error:
            raise CheckpointError(f"{path} does not fit adapter {adapter_name!r}: {error}") from None
        for name, _, part in _parts(self, adapter_name):
            check_values_here(name, part)
        with not_running(self._state, [adapter_name]), interrupts_deferred(), torch.no_grad():
            for _, _, here, there in pairs:
                _give(here, there)
            for layer, adapter in left:
                _vacate(layer, adapter)
            self._state.switch.changes += 1
            self._state.configs[adapter_name] = plan.config
            self._state.kept[adapter_name] = tuple(site.name for site in plan.saved if not site.trains)
            self._state.samples.pop(adapter_name, None)


def hotswap_adapter(
    model: nn.Module, directory: str | PathLike[str], adapter_name: str = DEFAULT, **options: Any
) -> None:
    """`AdaptedModel.hotswap_adapter` of a model that may be compiled or wrapped.

    Raises:
        StateError: the model is not adapted.
        MinipeftError: see there.
    """
    inner = unwrapped(model)
    if not isinstance(inner, HotswapModel):
        raise StateError(f"{type(inner).__name__} is not adapted, so there is no adapter to swap.")
    inner.hotswap_adapter(directory, adapter_name, **options)


def _parts(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, Wrapper, nn.Module]]:
    return ((path, wrapper, wrapper.adapters[adapter_name]) for path, wrapper in wrappers_of(model, adapter_name))


def _check_room(path: str, adapter: Adapter, max_rank: int) -> None:
    """Raise StateError if an adapter cannot change its shape now, ConfigError if it can never have this rank."""
    check_values_here(path, adapter)
    for name, parameter in adapter.named_parameters():
        if parameter.grad is not None:
            raise StateError(f"{path}: {name} has a gradient, which fits its present rank. Prepare before training.")
    try:
        adapter.check_room(max_rank)
    except ConfigError as error:
        raise ConfigError(f"prepare_hotswap: {path}: {error}") from None


def _paired(adapter_name: str, plan: Plan, parts: Parts) -> Pairs:
    """Each part of a file with the live part that it replaces; raises ConfigError if there is none or it does not fit."""
    pairs: Pairs = []
    for site, new in zip(plan.sites, (*parts.adapters, *parts.copies), strict=True):
        wrapper = site.wrapper()
        if wrapper is None or adapter_name not in wrapper.adapters:
            raise ConfigError(
                f"it adapts {site.name}, which this adapter does not. load_adapter takes it as an adapter of its own."
            )
        pairs.append((site.name, wrapper, wrapper.adapters[adapter_name], new))
    for name, _, here, there in pairs:
        why = _misfit(here, there)
        if why:
            raise ConfigError(f"{name}: {why}.")
    return pairs


def _misfit(here: nn.Module, there: nn.Module) -> str:
    if isinstance(here, Adapter) and type(here) is type(there):
        return here.misfit(there)
    return unlike(here, there)


def _give(here: nn.Module, there: nn.Module) -> None:
    if isinstance(here, Adapter) and isinstance(there, Adapter):
        _scale_as_in_file(here)
        here.take(there)
        here.is_vacant = False
    else:
        copy_tensors(here, there)


def _vacate(layer: AdaptedLayer, adapter: Adapter) -> None:
    _scale_as_in_file(adapter)
    adapter.vacate(layer.owner, layer.ops)
    adapter.is_vacant = True


def _scale_as_in_file(adapter: Adapter) -> None:
    if adapter.strength != 1:
        adapter.rescale(1.0)  # whatever `set_scale` made of the old one


def _left(model: nn.Module, adapter_name: str, pairs: Pairs) -> list[tuple[AdaptedLayer, Adapter]]:
    """The layers that the file leaves out, and the parts that are to do nothing there; raises ConfigError if one cannot."""
    taken = {id(wrapper) for _, wrapper, _, _ in pairs}
    left = []
    for path, wrapper, part in _parts(model, adapter_name):
        if id(wrapper) in taken:
            continue
        if not isinstance(wrapper, AdaptedLayer) or not isinstance(part, Adapter) or not part.overrides("vacate"):
            raise ConfigError(f"it has nothing for {path}, where a {type(part).__name__} cannot stay and do nothing.")
        left.append((wrapper, part))
    return left
