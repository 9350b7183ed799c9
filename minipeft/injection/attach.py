"""What makes a model an adapted one: its state, its class, and which of its parameters train."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from minipeft.class_swap import mixed_class, original_class
from minipeft.config import AdapterConfig
from minipeft.errors import ConfigError, StateError, shown
from minipeft.injection.adapted_layer import AdaptedLayer
from minipeft.injection.after_load import follow_loads
from minipeft.injection.apply import apply, discard, eject
from minipeft.injection.base_state import buffer_samples, hold_still, let_go
from minipeft.injection.build import Parts
from minipeft.injection.checkpointing import leave_checkpoints_alone, let_checkpoints_train
from minipeft.injection.fresh_parts import ORIGINS
from minipeft.injection.module_tree import wrappers
from minipeft.injection.plan import Plan
from minipeft.injection.resting import Place, parameters_at, places_in, put_to_rest
from minipeft.injection.rollback import flags_unchanged_on_error, unchanged_on_error
from minipeft.injection.row_marks import mark_rows
from minipeft.injection.rows import BASE
from minipeft.injection.wrapper import Switch, replace_key
from minipeft.wrapper_names import named_parameters

STATE = "_minipeft"  # the state's name in the model's __dict__, which is copied and pickled with the model


@dataclass
class AdapterState:
    """What an adapted model knows besides its modules: plain data, so copies and pickles of the model carry it."""

    configs: dict[str, AdapterConfig] = field(default_factory=dict)
    switch: Switch = field(default_factory=Switch)
    trainable: set[str] = field(default_factory=set)
    places: dict[str, list[Place]] = field(default_factory=dict)  # where the parameters of each adapter are
    resting: dict[str, set[Place]] = field(default_factory=dict)  # of those, what an idle adapter would train
    also_trained: tuple[str, ...] = ()  # adapters whose parameters require gradients though they may not act
    merged: tuple[str, ...] = ()
    set_aside: tuple[str, ...] = ()  # merged ones that are taken out until the last of `pauses` contexts ends
    pauses: int = 0  # how many contexts are open in which nothing is merged
    trained_before: frozenset[str] = frozenset()  # names of the base parameters that required a gradient
    unwatched: set[str] = field(default_factory=set)  # adapters of which no forward pass has been watched yet
    unstarted: set[str] = field(default_factory=set)  # adapters without values, see `minipeft.injection.starting`
    given: set[str] = field(default_factory=set)  # names of the tensors that have been loaded while one is
    idle: dict[str, list[str]] = field(default_factory=dict)  # layers not using an adapter, see `injection.watch`
    refuses_idle: bool = False  # an idle layer is an error, not a warning
    kept: dict[str, tuple[str, ...]] = field(default_factory=dict)  # see `minipeft.injection.fresh_parts`
    samples: dict[str, dict[str, list[float]]] = field(
        default_factory=dict
    )  # see `minipeft.files.base_samples.remember_base`
    held: set[str] = field(default_factory=set)  # norms of the base that would be in training mode, see `hold_norms`
    buffers: dict[str, Tensor] = field(default_factory=dict)  # samples of the base's, as they were when it was adapted


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
            f"there is an adapter {name!r} already; delete_adapter({name!r}) first, or choose another name."
        )


def attach(
    model: nn.Module,
    mixin: type[nn.Module],
    plan: Plan,
    parts: Parts,
    adapter_name: str,
    *,
    trainable: bool,
) -> None:
    """Put built parts into a model; the first time, also freeze its base and add the adapter verbs to its class.

    Raises:
        StateError: the class of the model cannot be changed.
    """
    state = model.__dict__.get(STATE) or AdapterState()
    with unchanged_on_error(model, state, state.switch):
        _attach(model, mixin, plan, parts, adapter_name, state, trainable)


def _attach(
    model: nn.Module,
    mixin: type[nn.Module],
    plan: Plan,
    parts: Parts,
    adapter_name: str,
    state: AdapterState,
    trainable: bool,
) -> None:
    first, old_class = STATE not in model.__dict__, type(model)
    if first:
        state.trained_before = frozenset(name for name, p in named_parameters(model) if p.requires_grad)
        try:
            model.__class__ = mixed_class(mixin, old_class)
        except TypeError as error:
            raise StateError(
                f"{old_class.__name__} does not allow changing its class, which adapting does ({error})."
            ) from None
    apply(plan, parts, adapter_name, state.switch)
    if first:
        model.__dict__[STATE] = state
        model.__dict__[ORIGINS] = plan.origins
        state.buffers = buffer_samples(model)
    state.configs[adapter_name] = plan.config
    state.kept[adapter_name] = tuple(site.name for site in plan.saved if not site.trains)
    state.places[adapter_name] = []
    for _, wrapper in wrappers(model):
        if isinstance(wrapper, AdaptedLayer):
            follow_loads(wrapper)
        state.places[adapter_name] += places_in(wrapper, adapter_name)
    state.resting[adapter_name] = put_to_rest(state.places[adapter_name])
    if not trainable:
        state.resting[adapter_name] = set()
    state.switch.order_told, state.switch.order_known = mark_rows(model), False
    state.unwatched.add(adapter_name)
    if trainable:
        state.trainable.add(adapter_name)
    if first:
        model.requires_grad_(False)
        _switch(state, (adapter_name,), {adapter_name} & state.trainable, ())
        let_checkpoints_train(model)
    hold_norms(model)


def hold_norms(model: nn.Module) -> None:
    """Hold the running statistics still that no file will hold, see `minipeft.injection.base_state`."""
    state: AdapterState = model.__dict__[STATE]
    state.held |= hold_still(model, state.trainable)


def switch_to(model: nn.Module, names: tuple[str, ...]) -> None:
    """Let exactly these adapters act.

    The parameters of an idle adapter must not require gradients, or DDP would wait for them; they do again when it
    acts. Only adapters that train, and start or stop acting, have their parameters visited.
    """
    state: AdapterState = model.__dict__[STATE]
    _wake(state, names, state.also_trained)


def train_also(model: nn.Module, names: tuple[str, ...]) -> None:
    """Let the parameters of these adapters require gradients, besides those of the active ones."""
    state: AdapterState = model.__dict__[STATE]
    _wake(state, state.switch.active, names)


def awake(state: AdapterState) -> tuple[str, ...]:
    """Names of the adapters whose parameters require gradients, if they train at all."""
    return tuple(dict.fromkeys((*state.switch.active, *state.also_trained)))


def _wake(state: AdapterState, active: tuple[str, ...], also: tuple[str, ...]) -> None:
    before, after = set(awake(state)), {*active, *also}
    changing = before.symmetric_difference(after) & state.trainable
    if not changing:
        state.switch.active, state.also_trained = active, also
        return
    with flags_unchanged_on_error(_parameters(state, changing), state, state.switch):
        state.also_trained = also
        _switch(state, active, changing & after, changing & before)


def _parameters(state: AdapterState, names: Collection[str]) -> list[nn.Parameter]:
    return [parameter for name in names for parameter in parameters_at(state.places[name])]


def _switch(state: AdapterState, names: tuple[str, ...], starting: Collection[str], stopping: Collection[str]) -> None:
    state.switch.active = names
    for name in stopping:
        state.resting[name] = put_to_rest(state.places[name])
    for name in starting:
        for parameter in parameters_at(state.resting[name]):
            parameter.requires_grad_(True)


def check_not_running(state: AdapterState, adapter_name: str | None = None) -> None:
    """Refuse to change adapters under a call with ``adapter_names``, which may run in another thread.

    Raises:
        StateError: such a call runs; if a name is given, one with that adapter.
    """
    busy = [name for names in list(state.switch.running) for name in names or (BASE,)]
    if busy and adapter_name in (None, *busy):
        raise StateError(
            f"a batch with adapter_names runs now and uses {shown(dict.fromkeys(busy))}; wait until it is done."
        )


def remove(model: nn.Module, adapter_names: Sequence[str], active: tuple[str, ...]) -> None:
    """Remove adapters, and what the model knows of them; afterwards exactly the adapters `active`, which stay, act."""
    state: AdapterState = model.__dict__[STATE]
    for name in adapter_names:
        check_not_running(state, name)
    also = tuple(name for name in state.also_trained if name not in adapter_names)
    changing = set(awake(state)).symmetric_difference((*active, *also)) & state.trainable
    flags = flags_unchanged_on_error(_parameters(state, changing))
    with unchanged_on_error(model, state, state.switch), flags:
        _wake(state, active, also)
        for name in adapter_names:
            discard(model, name)
            del state.configs[name], state.places[name], state.resting[name]
            for known in (state.kept, state.idle, state.samples):
                known.pop(name, None)
            state.trainable.discard(name)
            state.unwatched.discard(name)
            state.unstarted.discard(name)


def rename(model: nn.Module, old: str, new: str) -> None:
    """Give an adapter another name, in the same place among the others; merged or not, it acts as before."""
    state: AdapterState = model.__dict__[STATE]

    def renamed(names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(new if name == old else name for name in names)

    check_not_running(state, old)
    with unchanged_on_error(model, state, state.switch):
        state.also_trained = renamed(state.also_trained)
        state.switch.active, state.merged = renamed(state.switch.active), renamed(state.merged)
        state.set_aside = renamed(state.set_aside)
        for table in (state.configs, state.places, state.resting, state.idle, state.kept, state.samples):
            replace_key(table, old, new)
        for names in (state.trainable, state.unwatched, state.unstarted):
            if old in names:
                names.remove(old)
                names.add(new)
        for _, wrapper in wrappers(model):
            if old in wrapper.adapters:
                wrapper.rename(old, new)


def detach(model: nn.Module, mixin: type[nn.Module], *, keep_trained: bool) -> None:
    """Give a model back its base layers, its class and its trainable parameters; see `minipeft.injection.apply.eject`."""
    state: AdapterState = model.__dict__[STATE]
    check_not_running(state)
    with unchanged_on_error(model, state, state.switch):
        eject(model, keep_trained=keep_trained)
        leave_checkpoints_alone(model)
        del model.__dict__[STATE]
        model.__dict__.pop(ORIGINS, None)
        let_go(model, state.held)
        for name, parameter in named_parameters(model):
            parameter.requires_grad_(name in state.trained_before)
        model.__class__ = original_class(mixin, type(model))
