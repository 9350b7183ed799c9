"""What a merge changes in a checkpoint: which values, under which keys. Settled before anything is written."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minipeft.ecosystem.transformers_model import mark_untied, says_tied
from minipeft.errors import MergeError, shown
from minipeft.injection.adapted_layer import AdaptedLayer
from minipeft.injection.module_tree import TensorIndex, adapted_layers, outside_adapters, wrappers_of
from minipeft.injection.modules_to_save import SavedModule
from minipeft.layers.uncalled import UncalledOps
from minipeft.merging.from_disk.disk_model import DiskModel
from minipeft.merging.plan import writes_bias
from minipeft.merging.tied_weights import adapts_tied_layers, check_trained_copies, shared_parameters, tied_layers


@dataclass(frozen=True)
class Value:
    """A value of the merged model."""

    names: tuple[str, ...]  # of the parameters that share it
    trained: Tensor | None  # the tensor, if the adapter brings it
    merged: bool  # whether an adapter is folded into it

    @property
    def changes(self) -> bool:
        """Whether it is not the base's."""
        return self.trained is not None or self.merged


@dataclass(frozen=True)
class Outcome:
    """All values of the merged model, and the layers to merge into: path, layer and the parameters that a merge writes."""

    values: tuple[Value, ...]
    layers: tuple[tuple[str, AdaptedLayer, tuple[str, ...]], ...]

    @property
    def by_name(self) -> dict[str, Value]:
        """The values by each of their names."""
        return {name: value for value in self.values for name in value.names}


def settle(disk: DiskModel, adapter_name: str, *, untie: bool) -> Outcome:
    """Say what `merge_and_unload` would make of the model that has this adapter; no weight is read.

    Raises MergeError if a weight to merge into is tied elsewhere and `untie` is False, or is not in the base, or a trained value is
    not finite.
    """
    model = disk.model
    was_tied, names = says_tied(model), (adapter_name,)
    unties = check_trained_copies(model, names, outside_adapters(model))
    layers, untied = _layers(model, names, untie)
    if unties or untied:
        mark_untied(model)
    cut = was_tied and not says_tied(model)  # then nothing is tied in the merged model
    trained = dict(_trained(model, adapter_name))
    merged = {name for _, _, written in layers for name in written}
    groups: dict[object, list[str]] = {}
    for name in disk.state:
        if name in trained and not cut:
            key: object = id(trained[name])
        elif cut or name in untied:
            key = (name,)
        else:
            key = disk.tied(name)
        groups.setdefault(key, []).append(name)
    values = [
        Value(tuple(group), next((trained[name] for name in group if name in trained), None), bool(merged & {*group}))
        for group in groups.values()
    ]
    outcome = Outcome(tuple(values), tuple(layers))
    _check_stored(disk, outcome)
    return outcome


def _layers(
    model: nn.Module, names: tuple[str, ...], untie: bool
) -> tuple[list[tuple[str, AdaptedLayer, tuple[str, ...]]], set[str]]:
    """The layers to merge into, one of those that are merged together, and the parameters that get a value of their own."""
    index, done, untied = TensorIndex(model), set[AdaptedLayer](), set[str]()
    may_be_tied = [layer for _, layer in adapted_layers(model) if adapts_tied_layers(layer, names)]
    layers = []
    for path, layer in adapted_layers(model):
        if layer in done:
            continue
        tied = tied_layers(layer, names, may_be_tied)
        done.update(tied)
        owners, own = [layer.owner, *(other.owner for other in tied)], _written(layer)
        weights = [parameter for name in own if (parameter := layer.owner._parameters[name]) is not None]
        place = _plain(path)
        for name in shared_parameters(path, owners, list[Tensor](weights), index, untie):
            untied.add(f"{place}.{name}")
        layers.append((path, layer, tuple(f"{place}.{name}" for name in own)))
    return layers, untied


def _written(layer: AdaptedLayer) -> tuple[str, ...]:
    """The names of the parameters of a layer that a merge writes."""
    if isinstance(layer.ops, UncalledOps):
        return (layer.ops.parameter,)
    own = [name for name, parameter in layer.owner._parameters.items() if parameter is not None]
    if "weight" not in own:
        return tuple(own)
    return ("weight", "bias") if "bias" in own and _writes_bias(layer) else ("weight",)


def _writes_bias(layer: AdaptedLayer) -> bool:
    bias = layer.ops.read_bias(layer.base_layer)
    return bias is not None and writes_bias(map(layer.adapter, layer.adapters), torch.zeros(bias.shape))


def _trained(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors that the adapter trains in full, by the names that they have in the model; one that is tied has several."""
    saved = [(path, w) for path, w in wrappers_of(model, adapter_name) if isinstance(w, SavedModule)]
    own = {id(tensor) for _, wrapper in saved for tensor in wrapper.file_tensors(adapter_name).values()}
    for path, wrapper in saved:
        for name, tensor in wrapper.adapters[adapter_name].state_dict(keep_vars=True).items():
            if id(tensor) in own:
                yield f"{_plain(path)}.{name}", tensor


def _plain(path: str) -> str:
    """A name in the model without adapters."""
    return re.sub(r"\.base_layer(?=\.|$)", "", path)


def _check_stored(disk: DiskModel, outcome: Outcome) -> None:
    """Check that the base has all that the adapter does not bring."""
    for value in outcome.values:
        source = next((disk.source(name) for name in value.names if disk.source(name) is not None), None)
        if value.trained is not None:
            continue
        if value.merged and source is None:
            raise MergeError(f"{value.names[0]}: the base does not have it, so there is nothing to merge into.")
        unfit = [name for name in value.names if name in disk.unfit]
        if unfit:
            there, here = disk.unfit[unfit[0]].made[unfit[0]].shape, disk.state[unfit[0]].shape
            raise MergeError(
                f"{unfit[0]} is {list(there)} in the base and {list(here)} in the model that the adapter is for, and the "
                "adapter does not bring it."
            )
    layers = {name: layer for _, layer, written in outcome.layers for name in written}
    for name in sorted(disk.tables):
        group, value = disk.groups.get(name), outcome.by_name[name]
        rows = 0 if group is None else group.stored[0].shape[0]
        if group is None or len(group.made[name]) == rows or value.trained is not None:
            continue
        changed = next((layers[each].changed_rows() for each in value.names if each in layers), None)
        brought = {int(row) for rows, _ in changed or () for row in rows}
        lacking = [row for row in range(rows, len(group.made[name])) if row not in brought]
        if lacking:
            raise MergeError(
                f"{name} has {rows} rows in the base, and the adapter was trained with {len(group.made[name])}; rows "
                f"{shown(lacking)} are in neither. Resize the base as for training, save it, and merge into that."
            )
