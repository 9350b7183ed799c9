"""How strongly an adapter acts, changed live."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from torch import nn

from minipeft.errors import StateError, TargetError, hint, shown
from minipeft.injection.adapted_layer import AdaptedLayer
from minipeft.injection.module_tree import adapted_layers, layers_of, wrappers
from minipeft.interrupts import interrupts_deferred
from minipeft.patterns import first_keys


def rescale(model: nn.Module, adapter_name: str, scale: float, pattern: str | None) -> None:
    """See `minipeft.combining.model.CombinableModel.set_scale`.

    Raises:
        TargetError: the pattern matches no layer of the adapter.
        StateError: on a layer that it matches, the adapter's effect does not go with one factor.
    """
    layers = dict(layers_of(model, adapter_name))
    chosen = layers if pattern is None else {path: layers[path] for path in _matching(pattern, list(layers))}
    for path, layer in chosen.items():
        adapter = layer.adapter(adapter_name)
        if not adapter.is_scalable:
            raise StateError(
                f"{path}: {type(adapter).__name__} has no scale: what it does to the layer is not an update times a number. "
                "Train LoRA to change the strength later, or switch it off by disable_adapter()."
            )
    _warn_of_the_rest(model, adapter_name, layers)
    same = {id(p) for layer in chosen.values() for p in layer.adapter(adapter_name).parameters()}
    with interrupts_deferred():
        for _, layer in adapted_layers(model):
            if adapter_name in layer.adapters:  # tied layers follow the one whose parameters they share
                adapter = layer.adapter(adapter_name)
                if any(id(p) in same for p in adapter.parameters()):
                    adapter.rescale(scale)


def _matching(pattern: str, paths: Sequence[str]) -> list[str]:
    chosen = list(first_keys([pattern], paths, "pattern"))
    if not chosen:
        raise TargetError(
            f"pattern {pattern!r} matches none of the {len(paths)} layers of this adapter{hint(pattern, paths)}. It is for a "
            f"whole name or the end of one after a dot; {pattern + '.*'!r} is all that is inside."
        )
    return chosen


def _warn_of_the_rest(model: nn.Module, adapter_name: str, layers: dict[str, AdaptedLayer]) -> None:
    rest = [
        path
        for path, w in wrappers(model)
        if adapter_name in w.adapters and path not in layers and not _follows(w, adapter_name)
    ]
    if rest:
        warnings.warn(
            f"set_scale: adapter {adapter_name!r} trains {shown(rest)} by values and not by an update, so those stay at full "
            "strength.",
            stacklevel=4,
        )


def _follows(wrapper: nn.Module, adapter_name: str) -> bool:
    return isinstance(wrapper, AdaptedLayer) and adapter_name in wrapper.tied_adapters
