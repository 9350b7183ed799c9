"""Injection: put built parts in their places (a few assignments), and the way back.

A module object itself becomes the wrapper, and what it was moves into a new object, the wrapper's `base_layer`. So
everything that holds the module now holds the wrapper: its parents, and also lists, helper objects and bound methods that
no walk over the model finds.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from minipeft.injection.adapted_layer import AdaptedLayer
from minipeft.injection.adapted_weight import AdaptedWeight
from minipeft.injection.build import Parts
from minipeft.injection.module_tree import Candidate, occupants, outside_adapters, wrappers_of
from minipeft.injection.modules_to_save import SavedModule
from minipeft.injection.plan import Plan
from minipeft.injection.wrapper import Switch, Wrapper
from minipeft.layers.base import LayerOps
from minipeft.layers.uncalled import UncalledOps
from minipeft.python.class_swap import mixed_class, mixins_of

# Of an instance: they call the object that they were made for.
TIED_TO_THE_OBJECT = frozenset({"forward", "_compiled_call_impl"})
# The tables of a module's hooks on its calls: those whose hooks run before what is inside, and the others.
BEFORE = ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_backward_pre_hooks")
AFTER = ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_backward_hooks")


def put(wrap: Callable[[nn.Module], Wrapper], module: nn.Module, places: tuple[tuple[nn.Module, str], ...]) -> Wrapper:
    """Make the wrapper of a module and put it in the module's place.

    A module with a ``forward`` of its own, as accelerate's offloading gives it, or of a class that Python does not let it
    leave, stays what it is: the wrapper is a new object, in these places.

    Args:
        wrap: makes the wrapper of a base layer.
        module: to wrap; it may be a wrapper itself.
        places: (parent, attribute) that refer to it.
    """
    cls: type = type(module)
    if not TIED_TO_THE_OBJECT.isdisjoint(vars(module)) or not _may_become_wrapper(cls):
        wrapper = wrap(module)
        wrapper.is_the_module = False
        for parent, attribute in places:
            setattr(parent, attribute, wrapper)
        return wrapper
    former: nn.Module = object.__new__(cls)
    _become(former, module)
    _become(module, wrap(former))
    assert isinstance(module, Wrapper)
    return module


def take_out(wrapper: Wrapper, inner: nn.Module, places: tuple[tuple[nn.Module, str], ...]) -> None:
    """Undo `put`, with `inner` in the wrapper's place: its base layer, or a trained copy of that."""
    if wrapper.is_the_module:
        mixins = mixins_of(type(wrapper))
        _become(wrapper, inner)
        for mixin in reversed(mixins):  # such as those of `minipeft.lean`
            module: nn.Module = wrapper
            module.__class__ = mixed_class(mixin, type(module))
    else:
        for parent, attribute in places:
            setattr(parent, attribute, inner)


@functools.cache
def _may_become_wrapper(cls: type) -> bool:
    """Whether Python lets an object of this class become a wrapper: not if it has another layout in memory."""
    try:
        object.__setattr__(object.__new__(cls), "__class__", Wrapper)
    except TypeError:
        return False
    return True


def _become(module: nn.Module, other: nn.Module) -> None:
    state: dict[str, Any] = vars(other)
    object.__setattr__(module, "__class__", type(other))  # not by torch's own, which looks for parameters first
    object.__setattr__(module, "__dict__", state)


def apply(plan: Plan, parts: Parts, adapter_name: str, switch: Switch) -> bool:
    """Put the built parts of a plan in place. `minipeft.injection.attach` takes it back if it fails half way.

    Returns whether the model's modules changed, besides those in the adapters on adapted layers.
    """
    changed = bool(plan.prepared or plan.saved)
    for prepared, base in plan.prepared:
        prepared.prepare(base)
    for site, adapter in zip(plan.adapters, parts.adapters, strict=True):
        kind: type[AdaptedLayer] = AdaptedWeight if isinstance(site.ops, UncalledOps) else AdaptedLayer
        wrap = functools.partial(kind, switch=switch, ops=site.ops, targeted=site.targeted)
        wrapper = _wrapper_at(site.candidate, site.ops, wrap)
        changed |= not wrapper.parts
        wrapper.parts[adapter_name] = adapter
        if site.tied_to is not None:
            wrapper.tied_adapters.add(adapter_name)
    for saved, module in zip(plan.saved, parts.copies, strict=True):
        wrapper = _wrapper_at(saved.candidate, None, functools.partial(SavedModule, switch=switch, only=saved.only))
        wrapper.parts[adapter_name] = module
    return changed


def _wrapper_at(candidate: Candidate, ops: LayerOps | None, wrap: Callable[[nn.Module], Wrapper]) -> Wrapper:
    """The wrapper with these ops in a module's place, which is put there if there is none."""
    parent, attribute = candidate.places[0]
    occupant: Any = getattr(parent, attribute)  # of a parent that is a wrapper by now, its base layer has it
    for wrapper in occupants(occupant):
        own = getattr(wrapper, "ops", None)
        if own is ops or own == ops:  # nearly always the same object, and comparing two takes longer
            return wrapper
    return put(wrap, occupant, candidate.places)


def discard(model: nn.Module, adapter_name: str) -> None:
    """Remove one adapter; a wrapper left without adapters is replaced by its base layer."""
    for _, wrapper in list(wrappers_of(model, adapter_name)):
        wrapper.drop(adapter_name)
    outside = list(outside_adapters(model))
    _unwrap(outside, lambda wrapper: wrapper.base_layer if not wrapper.adapters else wrapper)


def has_hooks(wrapper: Wrapper) -> bool:
    """Whether a wrapper's calls have hooks, which somebody put there for the layer."""
    hooks = (
        wrapper._forward_hooks or wrapper._forward_pre_hooks or wrapper._backward_hooks or wrapper._backward_pre_hooks
    )
    return len(hooks) > 0


def _hand_over_hooks(wrapper: Wrapper, inner: nn.Module) -> None:
    """Move the hooks on a wrapper's calls to what takes its place, in the same tables, where their handles look for them."""
    outer, own = vars(wrapper), vars(inner)
    for table in (*BEFORE, *AFTER):
        if hooks := outer[table]:
            in_order = {**hooks, **own[table]} if table in BEFORE else {**own[table], **hooks}
            hooks.clear()
            hooks.update(in_order)
            own[table] = hooks
    if outer["_is_full_backward_hook"] is not None:
        own["_is_full_backward_hook"] = outer["_is_full_backward_hook"]


def eject(outside: Iterable[tuple[str, nn.Module]], *, keep_trained: bool) -> None:
    """Put every base layer among a model's `outside_adapters` back in its place.

    With `keep_trained`, a module trained in full keeps its trained values.
    """
    _unwrap(
        outside,
        lambda wrapper: wrapper.current() if keep_trained and isinstance(wrapper, SavedModule) else wrapper.base_layer,
    )


def _unwrap(outside: Iterable[tuple[str, nn.Module]], replacement: Callable[[Wrapper], nn.Module]) -> None:
    for _, parent in outside:
        for attribute, child in list(parent._modules.items()) if parent._modules else ():  # most have none
            left: nn.Module | None = child
            while isinstance(left, Wrapper) and (inner := replacement(left)) is not left:
                if has_hooks(left):
                    _hand_over_hooks(left, inner)
                left = inner
            if left is not child and isinstance(child, Wrapper) and left is not None:
                take_out(child, left, ((parent, attribute),))


def follow_loads(layer: AdaptedLayer) -> None:
    """Have the adapters of a layer read again what they keep of the base, after each ``load_state_dict``.

    A whole state (Lightning, ``accelerate.save_state``, ``torch.save``) brings the base along, often into a process in
    which it was another one until then: built empty, or with other random rows of a resized vocabulary. What an adapter
    keeps of the base is not in that state, so that older states still load.
    """
    if _after_load not in layer._load_state_dict_post_hooks.values():
        layer.register_load_state_dict_post_hook(_after_load)  # type: ignore[no-untyped-call]


def _after_load(layer: nn.Module, incompatible_keys: object) -> None:
    assert isinstance(layer, AdaptedLayer)
    if layer.merged or any(parameter.is_meta for parameter in layer.owner.parameters(recurse=False)):
        return  # then the weight is not the base's own, or not here
    for name in layer.adapters:
        layer.adapter(name).base_loaded(layer.owner, layer.ops)
