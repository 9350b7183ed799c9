"""``target_parameters``: adapting bare parameters of a module, such as the fused experts of a mixture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import nn

from minipeft import registry
from minipeft.config import AdapterConfig
from minipeft.errors import TargetError
from minipeft.injection.module_tree import Candidate, is_callable
from minipeft.injection.sites import AdapterSite, check_called, check_needs_no_call, check_occupants, site
from minipeft.injection.targets import within
from minipeft.layers.base import LayerOps
from minipeft.layers.uncalled import UncalledOps


def parameter_sites(
    name: str, candidate: Candidate, parameters: Sequence[str], configs: Mapping[str, AdapterConfig]
) -> Iterator[AdapterSite]:
    """A site for each of these parameters of one module, in the order in which the module declares them.

    Each wrapper goes around those of the parameters before it, as in PEFT's files: of two parameters, the first is
    ``<module>.base_layer`` there, and the second ``<module>``.

    Raises:
        TargetError: a parameter cannot be adapted, or the model would never use the adapted value.
    """
    check_called(name, candidate)
    every_ops = [_ops_of(name, candidate.base, parameter) for parameter in parameters]
    if not is_callable(candidate.base):
        raise TargetError(
            f"target_parameters: {name} is a {type(candidate.base).__name__}, which is never called, so the adapted "
            "parameter would not be used. Only parameters of a module that is called can be adapted."
        )
    check_occupants(name, candidate.module, every_ops)
    for height, parameter, ops in zip(reversed(range(len(parameters))), parameters, every_ops, strict=True):
        config = configs[f"{name}.{parameter}"]
        check_needs_no_call(f"{name}.{parameter}", "a parameter", config)
        yield site(name + ".base_layer" * height, candidate, ops, config, targeted=False)


def _ops_of(name: str, base: nn.Module, parameter: str) -> LayerOps:
    kinds = registry.layer_candidates(type(base._parameters[parameter]))
    named = (type(ops)(parameter) for _, ops in kinds if isinstance(ops, UncalledOps))
    ops = next((ops for ops in named if ops.accepts(base)), None)
    if ops is None:
        raise TargetError(
            f"target_parameters: {name}.{parameter} is not a plain floating-point parameter of 2 or 3 dimensions."
        )
    return ops


def check_alone(name: str, parameters: Mapping[str, object], others: Sequence[str]) -> None:
    """Check that a module whose parameters are adapted, and everything in it, is not adapted or trained in another way.

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
