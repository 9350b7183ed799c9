"""Where adapters go: a module, or a bare parameter of one, with the class and configuration that adapt it, checked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from minipeft.config.adapter_config import AdapterConfig
from minipeft.ecosystem.packages import rounds_inputs
from minipeft.ecosystem.wrapper_names import nested_names
from minipeft.errors import OccupiedError, TargetError, shown
from minipeft.injection.module_tree import Candidate, is_callable, occupants, own_bias
from minipeft.injection.modules_to_save import SavedModule
from minipeft.injection.targets import within
from minipeft.injection.wrapper import Wrapper, innermost
from minipeft.layers.base import LayerOps, layer_ops
from minipeft.layers.uncalled import UncalledOps, matrices, parameter_ops
from minipeft.methods.base import Adapter
from minipeft.registry import registry
from minipeft.registry.type_names import qualified


@dataclass(frozen=True)
class AdapterSite:
    """A module to adapt, with the class and the configuration that will adapt it."""

    name: str
    candidate: Candidate
    ops: LayerOps
    adapter_class: type[Adapter]
    config: AdapterConfig
    targeted: bool = True  # by its own name; False for a bare parameter, or a child that its parent reads
    is_read: bool = False  # its weight is read, and the layer itself not called
    prefix: str = ""  # goes before its keys in a file, if a companion of the configuration adapts it
    tied_to: str | None = None  # the site whose adapter this one shares, since the two layers share a weight

    def wrapper(self) -> Wrapper | None:
        """The wrapper that holds the adapters of this site, if there is one."""
        return next((w for w in occupants(self.candidate.module) if getattr(w, "ops", None) == self.ops), None)


@dataclass(frozen=True)
class SavedSite:
    """A module to train in full, or only those of its parameters that `only` names."""

    name: str
    candidate: Candidate
    only: tuple[str, ...] | None
    trains: bool = True  # False: only saved, see `minipeft.injection.fresh_parts`
    tied_to: str | None = None  # the site whose copy holds the weight of this one's too, since the two share it

    def wrapper(self) -> Wrapper | None:
        """The wrapper that holds the copies of this site, if there is one."""
        here = occupants(self.candidate.module)
        return next((w for w in here if isinstance(w, SavedModule) and w.only == self.only), None)


def module_sites(name: str, candidate: Candidate, config: AdapterConfig) -> Iterator[AdapterSite]:
    """A site for the module itself and one for each child whose weight it reads; raises TargetError if one cannot be adapted so."""
    ops, base = ops_for(name, candidate), candidate.base
    check_occupants(name, candidate.module, [ops])
    children = ops.children if isinstance(ops, UncalledOps) else None
    yield site(name, candidate, ops, config, is_read=children is not None)
    for attribute, child_ops in children.items() if children else ():
        child_name, child = f"{name}.base_layer.{attribute}", base.get_submodule(attribute)
        inner = Candidate(child, innermost(child), (child_name,), ((base, attribute),))
        if not child_ops.accepts(inner.base):
            raise TargetError(
                f"{name}: the weight of its {attribute} is not a plain one, so it cannot be adapted along."
            )
        check_occupants(child_name, child, [child_ops])
        yield site(child_name, inner, child_ops, config, targeted=False, is_read=True)


def site(
    name: str, candidate: Candidate, ops: LayerOps, config: AdapterConfig, *, targeted: bool = True, is_read: bool
) -> AdapterSite:
    """One site, with the registry's class; raises TargetError if that changes inputs, and the weight is read without a call."""
    adapter_class = registry.adapter_class(config.adapter_method, name, type(candidate.base))
    if is_read and adapter_class.overrides("before"):
        raise TargetError(
            f"{name}: its weight is read without calling the layer, and {adapter_class.__name__} changes what a layer "
            "is given. Use another method there, such as LoRA."
        )
    return AdapterSite(name, candidate, ops, adapter_class, config, targeted, is_read)


def ops_for(name: str, candidate: Candidate) -> LayerOps:
    """The ops of a targeted layer; raises TargetError if there are none, OccupiedError if another adapter trains it in full."""
    base = candidate.base
    if isinstance(candidate.module, SavedModule):
        raise OccupiedError(f"{name}: already trained in full by another adapter's modules_to_save or bias='all'.")
    ops = layer_ops(base)
    if ops is not None:
        return ops
    if rounds_inputs(base):
        raise TargetError(
            f"{name}: torchao quantizes the input of this layer too, and passes no gradient on to what comes before it. "
            "Load the model with Int8WeightOnlyConfig."
        )
    check_called(name, candidate)
    kind, known = qualified(type(base)), ", ".join(registry.layer_type_names())
    if any(True for _ in registry.layer_candidates(type(base))):
        weight = getattr(base, "weight", None)
        holds = f", weight {type(weight).__name__} of {weight.dtype}" if isinstance(weight, Tensor) else ""
        raise TargetError(
            f"{name}: {kind} is registered, but this instance is refused (an unusual weight, or a layer that is read "
            f"and not called, or returns something else than its product{holds}). {_instead(name, base)}"
        )
    raise TargetError(f"{name}: no LayerOps for {kind}; registered: {known}. {_instead(name, base)}")


def _instead(name: str, base: nn.Module) -> str:
    """What to name instead of a module that cannot be adapted: a layer in it, or its own matrices."""
    for path, part in base.named_modules():
        if path and layer_ops(part) is not None:
            return f"Name a layer in it, such as {f'{name}.{path}'!r}, or see register_layer."
    last = name.rpartition(".")[2]
    own = [f"{last}.{key}" for key in matrices(base)]
    return f"See register_layer{f'; target_parameters can name {shown(own)}' if own else ''}."


def check_occupants(name: str, module: nn.Module, ops: Sequence[LayerOps]) -> None:
    """Raise TargetError unless all adapters of one module adapt the same weights of it.

    In a file the nesting of the wrappers says which parameter each one adapts, so they must agree.
    """
    present = [getattr(wrapper, "ops", None) for wrapper in occupants(module)]
    if present and not (len(present) == len(ops) and all(own in ops for own in present)):
        raise TargetError(
            f"{name}: another adapter adapts other weights of this module, or all of it. All adapters of one module must "
            "adapt the same weights."
        )


def check_needs_no_call(name: str, what: str, config: AdapterConfig) -> None:
    """Raise TargetError if an option acts on a layer's input or output; this weight is read without calling a layer."""
    options = config.needs_a_call()
    if options:
        raise TargetError(f"{name}: the weight of {what} is read and not called, so {shown(options)} cannot act there.")


def reader_of(candidate: Candidate) -> nn.Module | None:
    """The module around this one that reads its weight and never calls it."""
    for parent, attribute in candidate.places:
        parent_ops = [ops for _, ops in registry.layer_candidates(type(parent)) if isinstance(ops, UncalledOps)]
        if any(attribute in ops.children for ops in parent_ops):
            return parent
    return None


def check_called(name: str, candidate: Candidate) -> None:
    """Raise a TargetError if the module around this one reads its weight and never calls it."""
    parent = reader_of(candidate)
    if parent is not None:
        raise TargetError(
            f"{name}: {type(parent).__name__} reads its weight and never calls it, so an adapter there would do "
            "nothing. Target the module around it. PEFT's training does not move it either: to load such a file, delete "
            "this module's keys from it and name the module in exclude_modules of its adapter_config.json."
        )


def parameter_sites(
    name: str, candidate: Candidate, parameters: Sequence[str], configs: Mapping[str, AdapterConfig]
) -> Iterator[AdapterSite]:
    """A site for each of these parameters of one module, under its `nested_names`.

    Raises TargetError if the model would never use one.
    """
    check_called(name, candidate)
    every_ops = [_ops_of(name, candidate.base, parameter) for parameter in parameters]
    if not is_callable(candidate.base):
        raise TargetError(
            f"target_parameters: {name} is a {type(candidate.base).__name__}, which is never called, so the adapted "
            "parameter would not be used. Only parameters of a module that is called can be adapted."
        )
    check_occupants(name, candidate.module, every_ops)
    for (parameter, nested), ops in zip(nested_names(name, parameters).items(), every_ops, strict=True):
        config = configs[f"{name}.{parameter}"]
        asked: Any = config
        if config.bias != "none" and own_bias(candidate.base) is None:
            asked = replace(asked, bias="none")  # there is none to train
        check_needs_no_call(f"{name}.{parameter}", "a parameter", asked)
        yield site(nested, candidate, ops, config, targeted=False, is_read=True)


def _ops_of(name: str, base: nn.Module, parameter: str) -> LayerOps:
    ops = parameter_ops(base, parameter)
    if ops is None:
        raise TargetError(
            f"target_parameters: {name}.{parameter} is not a plain floating-point parameter of 2 or 3 dimensions."
        )
    return ops


def check_alone(name: str, parameters: Mapping[str, object], others: Sequence[str]) -> None:
    """Raise TargetError if a module whose parameters are adapted, or anything in it, is adapted or trained in another way."""
    around = [other for other in others if within(other, [name]) or within(name, [other])]
    around += [other for other in parameters if other != name and within(other, [name])]
    if around:
        raise TargetError(
            f"target_parameters: {name} has parameters to adapt, and {around[0]} is to be adapted or trained as well. "
            "Choose one of the two (target_modules=[] selects no module)."
        )
