"""What an adapted model knows besides its modules, and what it allows to be done to its adapters now."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor, nn

from minipeft.config.adapter_config import AdapterConfig
from minipeft.errors import ConfigError, StateError, hint, shown, told
from minipeft.injection.rows import BASE
from minipeft.injection.wrapper import Place, Switch, replace_key

STATE = "_minipeft"  # the state's name in the model's __dict__, which is copied and pickled with the model


@dataclass
class AdapterState:
    """What an adapted model knows besides its modules: plain data, so copies and pickles of the model carry it."""

    configs: dict[str, AdapterConfig] = field(default_factory=dict)
    switch: Switch = field(default_factory=Switch)
    places: dict[str, list[Place]] = field(default_factory=dict)  # where the parameters of each adapter are
    resting: dict[str, set[Place]] = field(default_factory=dict)  # of those, what an idle adapter would train
    set_aside: tuple[str, ...] = ()  # merged ones that are taken out until the last of `pauses` contexts ends
    pauses: int = 0  # how many contexts are open in which nothing is merged
    trained_before: frozenset[str] = frozenset()  # names of the base parameters that required a gradient
    unwatched: set[str] = field(default_factory=set)  # adapters of which no forward pass has been watched yet
    unstarted: set[str] = field(default_factory=set)  # adapters without values, see `minipeft.injection.starting`
    given: set[str] = field(default_factory=set)  # names of the tensors that have been loaded while one is
    idle: dict[str, list[str]] = field(default_factory=dict)  # layers not using an adapter, see `injection.watch`
    refuses_idle: bool = False  # an idle layer is an error, not a warning
    kept: dict[str, tuple[str, ...]] = field(default_factory=dict)  # see `minipeft.injection.fresh_parts`
    samples: dict[str, dict[str, list[float]]] = field(default_factory=dict)  # see `minipeft.files.base_samples`
    held: set[str] = field(default_factory=set)  # norms of the base that would be in training mode, see `hold_norms`
    buffers: dict[str, Tensor] = field(default_factory=dict)  # samples of the base's, as they were when it was adapted

    def __getstate__(self) -> dict[str, Any]:
        """The state of a copy or a pickle: no context is open in it that would merge something again."""
        return {**vars(self), "set_aside": (), "pauses": 0}

    @property
    def merged(self) -> tuple[str, ...]:
        """The adapters that are in the base weights."""
        return self.switch.merged

    def _tables(self) -> tuple[dict[str, Any], ...]:
        """The tables with adapters' names as keys."""
        return self.configs, self.places, self.resting, self.idle, self.kept, self.samples

    def _sets(self) -> tuple[set[str], ...]:
        """The sets of adapters' names."""
        return self.switch.trainable, self.unwatched, self.unstarted

    def forget(self, name: str) -> None:
        """Drop all that is noted of an adapter, which does not act."""
        for table in self._tables():
            table.pop(name, None)
        for names in self._sets():
            names.discard(name)

    def rename(self, old: str, new: str) -> None:
        """Give an adapter another name, in the same place among the others."""

        def renamed(names: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(new if name == old else name for name in names)

        switch = self.switch
        switch.active, switch.merged, self.set_aside = map(renamed, (switch.active, switch.merged, self.set_aside))
        switch.also_trained, switch.frozen = renamed(switch.also_trained), renamed(switch.frozen)
        for table in self._tables():
            replace_key(table, old, new)
        for names in self._sets():
            if old in names:
                names.remove(old)
                names.add(new)

    def check_known(self, names: Sequence[object]) -> None:
        """Raise StateError if there is no adapter of one of these names."""
        for name in names:
            if not isinstance(name, str) or name not in self.configs:
                known = self.configs
                raise StateError(f"no adapter {told(name)}{hint(str(name), known)}; there are: {shown(known)}.")

    def check_unmerged(self) -> None:
        """Raise StateError if an adapter is merged, or counts as merged within `disable_adapter`."""
        if merged := self.merged or self.set_aside:
            raise StateError(f"{shown(merged)} is merged into the base; call unmerge_adapter() first.")


def state_of(model: nn.Module) -> AdapterState:
    """The state of an adapted model."""
    return cast(AdapterState, model.__dict__[STATE])


class WithAdapters(nn.Module):
    """What every part of `minipeft.AdaptedModel` builds on: the state of its adapters."""

    @property
    def _state(self) -> AdapterState:
        return state_of(self)

    def _check_known(self, names: Sequence[str]) -> None:
        self._state.check_known(names)
        if not names or len(set(names)) != len(names):
            raise StateError(
                f"adapter names must be given once each, and at least one: {shown(names)}; to switch all off use disable_adapter()."
            )


def names_given(value: Any) -> tuple[Any, ...]:
    """The names in an argument, which is one name or several; anything else is passed on, and no adapter has that name.

    A set is sorted, since adapters act in the order of their names here, and that of a set differs from run to run.
    """
    if isinstance(value, str | bytes):
        return (value,)
    try:
        return tuple(sorted(value, key=str) if isinstance(value, set | frozenset) else value)
    except TypeError:  # asking for Iterable would take a tensor that is a number for one
        return (value,)


def check_name(name: object, taken: Sequence[str] | Mapping[str, Any]) -> None:
    """Refuse an adapter name that is taken, or that could point outside its directory.

    Raises:
        ConfigError: it is not 1 to 64 letters, digits, '_' and '-', it is the name of an attribute of ModuleDict, or it is
            ``"__base__"``, which stands for no adapter.
        StateError: it is taken.
    """
    plain = isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name)
    if not isinstance(name, str) or not plain or hasattr(nn.ModuleDict(), name) or name == BASE:
        raise ConfigError(
            f"adapter name {name!r:.100} is not allowed: use 1 to 64 letters, digits, '_' and '-' that do not name a module "
            "attribute, such as 'default'."
        )
    if name in taken:
        raise StateError(
            f"there is an adapter {name!r} already; delete_adapter({name!r}) first, or choose another name. To give it the "
            "values of a file, call hotswap_adapter()."
        )


def places_that_train(places: Iterable[Place]) -> set[Place]:
    """The places whose parameter requires a gradient."""
    return {place for place in places if (p := place[0]._parameters.get(place[1])) is not None and p.requires_grad}


def put_to_rest(places: Iterable[Place]) -> set[Place]:
    """Freeze the parameters there; returns the places of those that required gradients."""
    trained: set[Place] = set()
    for module, name in places:
        parameter = module._parameters.get(name)
        if parameter is not None and parameter.requires_grad:
            parameter.requires_grad_(False)
            trained.add((module, name))
    return trained


@contextlib.contextmanager
def not_running(state: AdapterState, adapter_names: Collection[str] | None = None) -> Iterator[None]:
    """Within the context these adapters (None: all) may change. A call with ``adapter_names`` starts after it has ended.

    Raises StateError if such a call runs, perhaps in another thread, that uses one of them.
    """
    with state.switch.changing:
        busy = [name for names in list(state.switch.running) for name in names or (BASE,)]
        if busy and (adapter_names is None or not set(busy).isdisjoint(adapter_names)):
            raise StateError(
                f"a batch with adapter_names runs now and uses {shown(dict.fromkeys(busy))}; wait until it is done."
            )
        yield


def active_without(state: AdapterState, names: Sequence[str], wanted: tuple[str, ...] | None) -> tuple[str, ...]:
    """The adapters that act once these are deleted: those that are wanted, or those that act now and stay.

    `wanted` None: nobody said. Raises StateError if one to delete is merged, nothing would act, or the wanted ones cannot now.
    """
    merged = (*state.merged, *state.set_aside)
    if held := [name for name in names if name in merged]:
        raise StateError(f"adapter {shown(held)} is in use: it is merged into the base. unmerge_adapter() first.")
    stay = [name for name in state.configs if name not in names]
    if gone := [name for name in wanted or () if name in names]:
        raise StateError(f"activate: {shown(gone)} is to be deleted; left are: {shown(stay)}.")
    if wanted is not None and wanted != state.switch.active:
        state.check_unmerged()
    active = tuple(name for name in state.switch.active if name not in names) if wanted is None else wanted
    if not active:
        fix = f"say what acts instead: delete_adapter({names[0]!r}, activate={stay[0]!r})" if stay else "call unload()"
        raise StateError(f"adapter {shown(names)} is in use, and no other one is active; {fix}.")
    return active
