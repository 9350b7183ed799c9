"""Weights that are read and not called, bare parameters above all: where they stand, and what must not stand beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from minipeft import registry
from minipeft.config import AdapterConfig
from minipeft.errors import TargetError, shown
from minipeft.injection.module_tree import Candidate, occupants
from minipeft.injection.targets import within
from minipeft.layers.base import LayerOps
from minipeft.methods.base import Adapter


def parameter_sites(name: str, candidate: Candidate, owned: Sequence[str]) -> list[tuple[str, LayerOps]]:
    """For each of these parameters of one module, as it declares them: the wrapper's name, and the ops.

    Each wrapper goes around those of the parameters before it, as in PEFT's files: of two, the first is
    ``<module>.base_layer`` there, and the last ``<module>``.

    Raises:
        TargetError: a parameter cannot be adapted, or nothing would come of it.
    """
    for parent, attribute in candidate.places:
        if any(attribute in ops.read_children(parent) for _, ops in registry.layer_candidates(type(parent))):
            raise TargetError(
                f"{name}: {type(parent).__name__} reads it and never calls it, so an adapter there would do nothing. "
                "Target the module around it."
            )
    every_ops = [_ops_of(name, candidate.base, parameter) for parameter in owned]
    check_occupants(name, candidate.module, every_ops)
    heights = range(len(owned) - 1, -1, -1)
    return [(name + ".base_layer" * height, ops) for height, ops in zip(heights, every_ops, strict=True)]


def _ops_of(name: str, base: nn.Module, parameter: str) -> LayerOps:
    kinds = registry.layer_candidates(type(base._parameters[parameter]))
    ops = next((ops for ops in (ops.of_parameter(parameter) for _, ops in kinds) if ops.accepts(base)), None)
    if ops is None:
        raise TargetError(
            f"target_parameters: {name}.{parameter} is no plain floating-point parameter of 2 or 3 dimensions."
        )
    return ops


def check_occupants(name: str, module: nn.Module, ops: Sequence[LayerOps]) -> None:
    """Adapters of one module must adapt the same of it, since the place of a wrapper says in a file which parameter it is.

    Raises:
        TargetError: another adapter stands there and adapts something else.
    """
    there = {getattr(wrapper, "ops", None) for wrapper in occupants(module)}
    if there and there != set(ops):
        raise TargetError(
            f"{name}: another adapter adapts other weights of this module, or all of it, and they must do alike."
        )


def check_no_call(name: str, what: str, config: AdapterConfig) -> None:
    """Refuse options that need a call to act on.

    Raises:
        TargetError: there are such.
    """
    options = config.needs_a_call()
    if options:
        raise TargetError(f"{name}: the weight of {what} is read and not called, so {shown(options)} cannot act there.")


def check_alone(name: str, parameters: Mapping[str, object], others: Sequence[str]) -> None:
    """A module whose parameters are adapted is not also adapted or trained otherwise, nor is anything in it.

    Raises:
        TargetError: it is.
    """
    around = [other for other in others if within(other, [name]) or within(name, [other])]
    around += [other for other in parameters if other != name and within(other, [name])]
    if around:
        raise TargetError(
            f"target_parameters: {name} has parameters to adapt, and {around[0]} is to be adapted or trained as well. "
            "Choose one of the two (target_modules=[] selects no module)."
        )


def check_reads(name: str, ops: LayerOps, adapter_class: type[Adapter]) -> None:
    """Refuse a method that changes what goes into a layer, where a weight is read and there is no call.

    Raises:
        TargetError: it is such a method.
    """
    if ops.reads and adapter_class.acts_before:
        raise TargetError(
            f"{name}: its weight is read and not called, and {adapter_class.__name__} changes what a layer is given. "
            "Use another method there, such as LoRA."
        )
