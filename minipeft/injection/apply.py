"""Injection: put built parts in their places (a few assignments), and the way back."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

from minipeft.injection import place
from minipeft.injection.adapted_layer import AdaptedLayer
from minipeft.injection.adapted_weight import AdaptedWeight
from minipeft.injection.build import Parts
from minipeft.injection.module_tree import Candidate, occupants, outside_adapters, wrappers
from minipeft.injection.modules_to_save import SavedModule
from minipeft.injection.plan import Plan
from minipeft.injection.wrapper import Switch, Wrapper
from minipeft.layers.uncalled import UncalledOps


def apply(plan: Plan, parts: Parts, adapter_name: str, switch: Switch) -> None:
    """Put the built parts of a plan in place. `minipeft.injection.attach` takes it back if it fails half way."""
    sites: list[tuple[Candidate, nn.Module, object, Callable[[nn.Module], Wrapper], bool]] = []
    for site, adapter in zip(plan.adapters, parts.adapters, strict=True):
        kind: type[AdaptedLayer] = AdaptedWeight if isinstance(site.ops, UncalledOps) else AdaptedLayer
        own = partial(kind, switch=switch, ops=site.ops, targeted=site.targeted)
        sites.append((site.candidate, adapter, site.ops, own, site.tied_to is not None))
    for saved, module in zip(plan.saved, parts.copies, strict=True):
        sites.append((saved.candidate, module, None, partial(SavedModule, switch=switch, only=saved.only), False))
    for prepared, base in plan.prepared:
        prepared.prepare(base)
    for candidate, part, ops, wrap, follows in sites:
        parent, attribute = candidate.places[0]
        occupant = parent.get_submodule(attribute)
        wrapper = next((w for w in occupants(occupant) if getattr(w, "ops", None) == ops), None)
        if wrapper is None:
            wrapper = place.put(wrap, occupant, candidate.places)
        wrapper.adapters[adapter_name] = part
        if follows:
            wrapper.tied_adapters.add(adapter_name)


def discard(model: nn.Module, adapter_name: str) -> None:
    """Remove one adapter; a wrapper left without adapters is replaced by its base layer."""
    for _, wrapper in list(wrappers(model)):
        if adapter_name in wrapper.adapters:
            wrapper.drop(adapter_name)
    _unwrap(model, lambda wrapper: wrapper.base_layer if not wrapper.adapters else wrapper)


def eject(model: nn.Module, *, keep_trained: bool) -> None:
    """Put every base layer back in its place; with `keep_trained`, a module trained in full keeps its trained values."""
    _unwrap(
        model,
        lambda wrapper: wrapper.current() if keep_trained and isinstance(wrapper, SavedModule) else wrapper.base_layer,
    )


def _unwrap(model: nn.Module, replacement: Callable[[Wrapper], nn.Module]) -> None:
    for _, parent in list(outside_adapters(model)):
        for attribute, child in list(parent._modules.items()):
            left: nn.Module | None = child
            while isinstance(left, Wrapper) and (inner := replacement(left)) is not left:
                left = inner
            if left is not child and isinstance(child, Wrapper) and left is not None:
                place.take_out(child, left, ((parent, attribute),))
