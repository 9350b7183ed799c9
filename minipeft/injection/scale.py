"""How strongly an adapter acts, changed live."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from minipeft.config.patterns import first_keys
from minipeft.errors import StateError, TargetError, hint, shown, warn
from minipeft.injection.adapted_layer import AdaptedLayer
from minipeft.injection.module_tree import wrappers_of
from minipeft.injection.state import state_of
from minipeft.python.interrupts import interrupts_deferred


def rescale(model: nn.Module, adapter_name: str, scale: float, pattern: str | None) -> None:
    """See `minipeft.injection.manageable_model.ManageableModel.set_scale`.

    Raises:
        TargetError: the pattern matches no layer of the adapter.
        StateError: on a layer that it matches, the adapter's effect does not go with one factor.
    """
    here = dict(wrappers_of(model, adapter_name))
    parts = {path: layer.adapter(adapter_name) for path, layer in here.items() if isinstance(layer, AdaptedLayer)}
    own = {path: part for path, part in parts.items() if here[path].owns(adapter_name) and not part.key_prefix}
    chosen = own if pattern is None else {path: own[path] for path in _matching(pattern, list(own))}
    for path, adapter in chosen.items():
        if not adapter.is_scalable:
            raise StateError(
                f"{path}: {type(adapter).__name__} has no scale: what it does to the layer is not an update times a number. "
                "Train LoRA to change the strength later, or switch it off by disable_adapter()."
            )
    same = {id(parameter) for adapter in chosen.values() for parameter in adapter.parameters()}
    follow = [part for part in parts.values() if any(id(parameter) in same for parameter in part.parameters())]
    rest = [path for path in here if path not in own and (path not in parts or here[path].owns(adapter_name))]
    if rest:
        warn(
            f"set_scale: adapter {adapter_name!r} trains {shown(rest)} by values and not by an update, so those stay at full "
            "strength."
        )
    with interrupts_deferred():
        for adapter in follow:  # the chosen ones, and those of layers tied to them
            adapter.rescale(scale)
        state_of(model).switch.changes += 1


def _matching(pattern: str, paths: Sequence[str]) -> list[str]:
    chosen = list(first_keys([pattern], paths, "pattern"))
    if not chosen:
        raise TargetError(
            f"pattern {pattern!r} matches none of the {len(paths)} layers of this adapter{hint(pattern, paths)}. It is for a "
            f"whole name or the end of one after a dot; {pattern + '.*'!r} is all that is inside."
        )
    return chosen
