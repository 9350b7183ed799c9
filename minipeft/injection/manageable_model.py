"""The verbs of an adapted model that manage its adapters: names, strength, status."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from minipeft.config.options import number
from minipeft.config.patterns import first_keys
from minipeft.errors import ConfigError, StateError, TargetError, all_or_nothing, hint, shown, told, warn
from minipeft.injection.adapted_layer import AdaptedLayer
from minipeft.injection.attach import rename
from minipeft.injection.module_tree import adapters_of, wrappers_of
from minipeft.injection.state import WithAdapters, check_name, not_running, state_of
from minipeft.injection.status import Status, adapter_status, layer_status
from minipeft.python.interrupts import interrupts_deferred


class ManageableModel(WithAdapters):
    """The part of `minipeft.AdaptedModel` that manages its adapters."""

    @all_or_nothing
    def rename_adapter(self, old: str, new: str) -> None:
        """Give an adapter another name. It stays active, merged and in training if it is, and keeps its place.

        Raises:
            ConfigError: the new name is not allowed, see `minipeft.injection.state.check_name`.
            StateError: the old name is unknown, or the new one is taken.
        """
        self._check_known([old])
        if new != old:
            check_name(new, self._state.configs)
            rename(self, old, new)

    def adapter_status(self) -> Status:
        """A row for each adapter: method, rank, strength, active, merged, trainable, dtype, device. A table if printed."""
        return adapter_status(self)

    def layer_status(self) -> Status:
        """As `adapter_status`, with a row for each adapter on each layer."""
        return layer_status(self)

    @all_or_nothing
    def set_scale(self, adapter_name: str, scale: float, pattern: str | None = None) -> None:
        """Let an adapter act with this multiple of its update, from now on; 1 is the adapter itself.

        Merging folds that in. A file holds the adapter at full strength, and saving it warns about that;
        ``save_pretrained(convert_to_lora=True)`` writes the scale into the factors.

        Args:
            adapter_name: which adapter.
            scale: any number; 0 is off, a negative one subtracts.
            pattern: a regular expression for the whole name of a layer or its end after a dot, as in ``rank_pattern``:
                only those layers. None: all of them, whatever was set before.

        Raises:
            StateError: the name is unknown or merged, or the effect of the adapter is not an update times a number, as
                with DoRA, OFT and (IA)^3; or a batch runs that uses it by ``adapter_names``.
            TargetError: the pattern matches no layer.
        """
        self._check_known([adapter_name])
        number("scale", scale)
        if pattern is not None and not (isinstance(pattern, str) and pattern):
            raise ConfigError(
                f"pattern must be a regular expression for names of layers, or None, not {told(pattern)}."
            )
        if adapter_name in (*self._state.merged, *self._state.set_aside):
            raise StateError(f"adapter {adapter_name!r} is merged into the base; call unmerge_adapter() first.")
        _rescale(self, adapter_name, scale, pattern)


def _rescale(model: nn.Module, adapter_name: str, scale: float, pattern: str | None) -> None:
    own = adapters_of(model, adapter_name)
    chosen = own if pattern is None else {path: own[path] for path in _matching(pattern, list(own))}
    for path, adapter in chosen.items():
        if not adapter.is_scalable:
            raise StateError(
                f"{path}: {type(adapter).__name__} has no scale: what it does to the layer is not an update times a number. "
                "Train LoRA to change the strength later, or switch it off by disable_adapter()."
            )
    here = list(wrappers_of(model, adapter_name))
    same = {id(parameter) for adapter in chosen.values() for parameter in adapter.parameters()}
    parts = [wrapper.adapter(adapter_name) for _, wrapper in here if isinstance(wrapper, AdaptedLayer)]
    follow = [part for part in parts if any(id(parameter) in same for parameter in part.parameters())]
    others = {path: wrapper for path, wrapper in here if path not in own}
    rest = [path for path, w in others.items() if not isinstance(w, AdaptedLayer) or w.owns(adapter_name)]
    if rest:
        warn(
            f"set_scale: adapter {adapter_name!r} trains {shown(rest)} by values and not by an update, so those stay at full "
            "strength."
        )
    state = state_of(model)
    with not_running(state, [adapter_name]), interrupts_deferred():
        for adapter in follow:  # the chosen ones, and those of layers tied to them
            adapter.rescale(scale)
        state.switch.changes += 1


def _matching(pattern: str, paths: Sequence[str]) -> list[str]:
    chosen = list(first_keys([pattern], paths, "pattern"))
    if not chosen:
        raise TargetError(
            f"pattern {pattern!r} matches none of the {len(paths)} layers of this adapter{hint(pattern, paths)}. It is for a "
            f"whole name or the end of one after a dot; {pattern + '.*'!r} is all that is inside."
        )
    return chosen
