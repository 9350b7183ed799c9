"""Adapters of a model that was built on the meta device: they start once the model has its weights.

Such an adapter has shapes and no values. ``to_empty`` gives it memory, which is not a start either. So the adapter waits
until ``load_state_dict`` has given values to the layers that it is on, then starts as on any other model, with what the
state holds of it in place of a starting value. Until then it is neither run, saved nor merged.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from minipeft.config.patterns import endings
from minipeft.ecosystem.wrapper_names import parameters_in
from minipeft.errors import StateError, shown
from minipeft.injection.base_state import base_modules, buffer_samples
from minipeft.injection.build import Parts, build
from minipeft.injection.plan import Plan
from minipeft.injection.plan import plan as plan_injection
from minipeft.injection.sites import AdapterSite, SavedSite
from minipeft.injection.state import STATE, AdapterState, state_of


def await_values(model: nn.Module, adapter_name: str, parts: Parts) -> None:
    """Let a new adapter wait for the values of the model, if it was made without any."""
    modules: list[nn.Module] = [*parts.adapters, *parts.copies]
    if any(parameter.is_meta for module in modules for parameter in parameters_in(module)):
        state = state_of(model)
        state.unstarted.add(adapter_name)
        if _after_load not in model._load_state_dict_post_hooks.values():
            model.register_load_state_dict_post_hook(_after_load)  # type: ignore[no-untyped-call]


def stop_waiting(model: nn.Module) -> None:
    """Undo `await_values` in a model without adapters."""
    hooks = model._load_state_dict_post_hooks
    for key in [key for key, hook in hooks.items() if hook is _after_load]:
        del hooks[key]


def check_started(state: AdapterState, names: Iterable[str]) -> None:
    """Raise StateError if one of these adapters still waits for its values."""
    waiting = [name for name in names if name in state.unstarted]
    if waiting:
        raise StateError(
            f"adapter {shown(waiting)} was made on the meta device and has no values yet. Give the model its weights by "
            "load_state_dict(..., strict=False), which starts the adapter too; or unload(), load them, and adapt it then."
        )


def _after_load(model: nn.Module, incompatible_keys: Any) -> None:
    state: AdapterState | None = model.__dict__.get(STATE)
    if state is None or not state.unstarted:
        return
    # A module around the model puts a prefix before the names.
    missing = {ending for key in incompatible_keys.missing_keys for ending in endings(key)}
    names = {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    state.given |= names.keys() - missing
    given = {identity for name, identity in names.items() if name in state.given}
    for name in sorted(state.unstarted):
        plan = plan_injection(model, state.configs[name], every_pattern=False)
        if all(not tensor.is_meta and id(tensor) in given for tensor in _base_tensors(plan)):
            _start(plan, name, given)
            state.unstarted.discard(name)
            state.buffers = buffer_samples(base_modules(model))


def _base_tensors(plan: Plan) -> Iterator[nn.Parameter]:
    """The parameters of the layers that a plan adapts or copies."""
    for site in plan.sites:
        yield from site.candidate.base.parameters()


def _start(plan: Plan, adapter_name: str, given: Collection[int]) -> None:
    """Give an adapter the starting values that it would have if it were made now; what is loaded already stays."""
    parts, base = build(plan), {id(tensor) for tensor in _base_tensors(plan)}
    for site, fresh in zip(plan.adapters, parts.adapters, strict=True):
        if site.tied_to is None:
            _take_over(_waiting(site, adapter_name), fresh, given, base)
    for saved, copy in zip(plan.saved, parts.copies, strict=True):
        _take_over(_waiting(saved, adapter_name), copy, given, base)


def _waiting(site: AdapterSite | SavedSite, adapter_name: str) -> nn.Module:
    wrapper = site.wrapper()
    assert wrapper is not None
    return wrapper.adapters[adapter_name]


@torch.no_grad()
def _take_over(waiting: nn.Module, fresh: nn.Module, given: Collection[int], base: Collection[int]) -> None:
    for module, new in zip(waiting.modules(), fresh.modules(), strict=True):
        pairs: list[tuple[dict[str, Any], Mapping[str, Tensor | None]]] = [
            (module._parameters, new._parameters),
            (module._buffers, new._buffers),
        ]
        for own, values in pairs:
            for key, value in values.items():
                own[key] = None if value is None else _started(own[key], value, given, base)
        vars(module).update({key: value for key, value in vars(new).items() if not key.startswith("_")})


def _started(live: Any, fresh: Tensor, given: Collection[int], base: Collection[int]) -> Tensor:
    """The tensor to have in the place of `live`: the same object if it has memory, since an optimizer may hold it."""
    if id(fresh) in base:  # a parameter of the layer that a trained copy shares
        return fresh
    if live is None or live.is_meta:
        return fresh.requires_grad_(live is not None and live.requires_grad)
    if id(live) not in given:
        live.copy_(fresh)
    assert isinstance(live, Tensor)
    return live
