"""What makes a model an adapted one: its state, its class, and which of its parameters train."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import nullcontext

from torch import nn

from minipeft.ecosystem.wrapper_names import named_modules
from minipeft.errors import StateError
from minipeft.injection.adapted_layer import AdaptedLayer
from minipeft.injection.apply import apply, discard, eject, follow_loads, has_hooks
from minipeft.injection.base_state import base_modules, buffer_samples, hold_still, let_go
from minipeft.injection.build import Parts
from minipeft.injection.checkpointing import leave_checkpoints_alone, let_checkpoints_train
from minipeft.injection.fresh_parts import ORIGINS
from minipeft.injection.module_tree import outside_adapters, wrappers_of
from minipeft.injection.modules_to_save import SavedModule
from minipeft.injection.plan import Plan
from minipeft.injection.rollback import flags_unchanged_on_error, unchanged_on_error
from minipeft.injection.row_order import mark_rows
from minipeft.injection.state import STATE, AdapterState, not_running, places_that_train, put_to_rest, state_of
from minipeft.injection.without_gradient import watch_gradients
from minipeft.injection.wrapper import Wrapper, parameters_at
from minipeft.python.class_swap import mixed_class, original_class


def attach(
    model: nn.Module, mixin: type[nn.Module], plan: Plan, parts: Parts, adapter_name: str, *, trainable: bool
) -> None:
    """Put built parts into a model; the first time, also freeze its base and add the adapter verbs to its class."""
    first = STATE not in model.__dict__
    state = AdapterState() if first else state_of(model)
    before, prepares = plan.outside, bool(plan.prepared)
    with unchanged_on_error(
        model, state, state.switch, outside=before, inside_layers=prepares, flags=first or prepares
    ):
        if first:
            state.trained_before = _trained(before)
            _mix(model, mixin)
        changed = apply(plan, parts, adapter_name, state.switch) or first
        if first:
            model.__dict__[STATE] = state
            model.__dict__[ORIGINS] = plan.origins
        outside = tuple(outside_adapters(model)) if changed else before  # one walk for all that follows
        here = [module for _, module in outside if isinstance(module, Wrapper)]
        _note(state, plan, adapter_name, here, trainable=trainable, acts=first)
        modules = base_modules(model) if changed else {}
        if first:
            _freeze(outside, parameters_at(state.resting[adapter_name]) if plan.saved else ())
            state.buffers = buffer_samples(modules)
            state.switch.active = (adapter_name,)
            let_checkpoints_train(model, state.switch)
        if changed:  # what was there before is known
            state.switch.order_unclear, state.switch.order_known = mark_rows(model, outside), False
            _hold_norms(state, modules, outside)
    if trainable:
        watch_gradients(model, adapter_name)


def _note(
    state: AdapterState, plan: Plan, adapter_name: str, here: list[Wrapper], *, trainable: bool, acts: bool
) -> None:
    """Record a new adapter in the state of its model, which has these wrappers. Unless it acts and trains, it is at rest."""
    state.configs[adapter_name] = plan.config
    state.kept[adapter_name] = tuple(site.name for site in plan.saved if not site.trains)
    for wrapper in here:
        if isinstance(wrapper, AdaptedLayer) and adapter_name in wrapper.parts:
            follow_loads(wrapper)
    state.places[adapter_name] = [place for wrapper in here for place in wrapper.places(adapter_name)]
    trained = (places_that_train if acts and trainable else put_to_rest)(state.places[adapter_name])
    state.resting[adapter_name] = trained if trainable else set()
    state.unwatched.add(adapter_name)
    if trainable:
        state.switch.trainable.add(adapter_name)


def _trained(modules: Iterable[tuple[str, nn.Module]]) -> frozenset[str]:
    """Full names of the parameters of these modules that require gradients."""
    return frozenset(
        f"{name}.{own}" if name else own
        for name, module in modules
        for own, parameter in module._parameters.items()
        if parameter is not None and parameter.requires_grad
    )


def _give_back_flags(model: nn.Module, trained: Collection[str]) -> None:
    """Let exactly the parameters with these full names require gradients."""
    for name, module in named_modules(model):
        for own, parameter in module._parameters.items():
            wanted = (f"{name}.{own}" if name else own) in trained
            if parameter is not None and parameter.requires_grad is not wanted:
                parameter.requires_grad_(wanted)


def _mix(model: nn.Module, mixin: type[nn.Module]) -> None:
    old_class = type(model)
    try:
        model.__class__ = mixed_class(mixin, old_class)
    except TypeError as error:
        raise StateError(
            f"{old_class.__name__} does not allow changing its class, which adapting does ({error})."
        ) from None


def _freeze(outside: Iterable[tuple[str, nn.Module]], training: Iterable[nn.Parameter]) -> None:
    """Freeze all parameters but those in `training`. A trained copy of an offloaded module holds others, too."""
    kept = set(map(id, training))
    for _, module in outside:
        for parameter in module._parameters.values():
            if parameter is not None and id(parameter) not in kept:
                parameter.requires_grad_(False)


def hold_norms(model: nn.Module) -> None:
    """Freeze the running statistics that no file will hold, see `minipeft.injection.base_state`."""
    _hold_norms(state_of(model), base_modules(model), outside_adapters(model))


def _hold_norms(
    state: AdapterState, modules: Mapping[str, nn.Module], outside: Iterable[tuple[str, nn.Module]]
) -> None:
    saved = [(name, module) for name, module in outside if isinstance(module, SavedModule)]
    state.held |= hold_still(modules, saved, state.switch.trainable)


def switch_to(model: nn.Module, names: tuple[str, ...], *, frozen: bool) -> None:
    """Let exactly these adapters act; if `frozen`, none of them trains meanwhile.

    The parameters of an idle adapter must not require gradients, or DDP would wait for them; they do again when it
    acts. Only adapters that train, and start or stop acting, have their parameters visited.
    """
    state = state_of(model)
    also = tuple(name for name in state.switch.also_trained if not (frozen and name in names))
    _wake(state, names, also, names if frozen else ())


def train_also(model: nn.Module, names: tuple[str, ...]) -> None:
    """Let the parameters of these adapters require gradients, besides those of the active ones."""
    state = state_of(model)
    _wake(state, state.switch.active, names, tuple(name for name in state.switch.frozen if name not in names))


def _wake(state: AdapterState, active: tuple[str, ...], also: tuple[str, ...], frozen: tuple[str, ...]) -> None:
    """Let exactly the adapters `active` act; they and `also` learn, except those in `frozen`."""
    switch, before = state.switch, set(state.switch.learning)
    changing = before.symmetric_difference({*active, *also}.difference(frozen) & switch.trainable)
    kept = flags_unchanged_on_error(_parameters(state, changing), state, switch) if changing else nullcontext()
    with kept:
        switch.active, switch.also_trained, switch.frozen = active, also, frozen
        for name in changing & before:
            state.resting[name] = put_to_rest(state.places[name])
        for name in changing - before:
            for parameter in parameters_at(state.resting[name]):
                parameter.requires_grad_(True)


def _parameters(state: AdapterState, names: Collection[str]) -> list[nn.Parameter]:
    return [parameter for name in names for parameter in parameters_at(state.places[name])]


def remove(model: nn.Module, adapter_names: Sequence[str], active: tuple[str, ...]) -> None:
    """Remove adapters, and what the model knows of them; afterwards exactly the adapters `active`, which stay, act."""
    state = state_of(model)
    switch = state.switch
    also = tuple(name for name in switch.also_trained if name not in adapter_names)
    frozen = tuple(name for name in switch.frozen if name in active)
    changing = switch.trainable.intersection(set(switch.learning).symmetric_difference((*active, *also)))
    kept = flags_unchanged_on_error(_parameters(state, changing))
    with not_running(state, adapter_names), unchanged_on_error(model, state, switch), kept:
        _wake(state, active, also, frozen)
        for name in adapter_names:
            discard(model, name)
            state.forget(name)


def rename(model: nn.Module, old: str, new: str) -> None:
    """Give an adapter another name, in the same place among the others; merged or not, it acts as before."""
    state = state_of(model)
    with not_running(state, [old]), unchanged_on_error(model, state, state.switch):
        state.rename(old, new)
        for _, wrapper in wrappers_of(model, old):
            wrapper.rename(old, new)


def detach(
    model: nn.Module, mixin: type[nn.Module], outside: Collection[tuple[str, nn.Module]], *, keep_trained: bool
) -> None:
    """Give a model with these `outside_adapters` back its base layers, its class and its trainable parameters.

    See `minipeft.injection.apply.eject`.
    """
    state = state_of(model)
    hooked = any(isinstance(module, Wrapper) and has_hooks(module) for _, module in outside)
    kept = unchanged_on_error(model, state, state.switch, outside=outside, takes_out=not hooked)
    with not_running(state), kept:
        leave_checkpoints_alone(outside)
        eject(outside, keep_trained=keep_trained)
        state.switch.trainable = set()
        del model.__dict__[STATE]
        model.__dict__.pop(ORIGINS, None)
        let_go(model, state.held)
        _give_back_flags(model, state.trained_before)
        model.__class__ = original_class(mixin, type(model))
