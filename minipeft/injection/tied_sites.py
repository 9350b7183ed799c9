"""Layers that share a weight: which of them an adapter is put on, and which it does not reach."""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import replace

from torch import nn

from minipeft.config import AdapterConfig
from minipeft.errors import TargetError, shown
from minipeft.injection.module_tree import Candidate, TensorIndex
from minipeft.injection.sites import AdapterSite, ops_for
from minipeft.injection.targets import within


def with_tied_sites(model: nn.Module, found: dict[str, Candidate], sites: list[AdapterSite]) -> list[AdapterSite]:
    """These sites and, after each whose method adapts tied layers, a site for every layer tied to it.

    Raises:
        TargetError: two tied layers are to be adapted in different ways, or one cannot be adapted.
    """
    if not any(site.adapter_class.overrides("for_tied") for site in sites):
        return sites
    index, names = TensorIndex(model), {id(candidate.base): name for name, candidate in found.items()}
    first_of: dict[int, AdapterSite] = {}  # by tied layer: the site it is tied to
    complete = []
    for site in sites:
        if not site.adapter_class.overrides("for_tied"):
            complete.append(site)
            continue
        first = first_of.get(id(site.candidate.base))
        if first is not None:  # the layer was reached through its tie, and is named too
            _check_alike(first, site)
            continue
        complete.append(site)
        weight = site.candidate.base._parameters.get("weight")
        for owner, module in index.owners(weight) if weight is not None else []:
            if module is site.candidate.base:
                continue
            if id(module) not in names:
                raise TargetError(f"{site.name} shares its weight with {owner}, which cannot be adapted along with it.")
            name = names[id(module)]
            ops = ops_for(name, found[name])
            complete.append(replace(site, name=name, candidate=found[name], ops=ops, targeted=False, tied_to=site.name))
            first_of[id(module)] = site
    return complete


def _check_alike(first: AdapterSite, second: AdapterSite) -> None:
    if replace(first.config, target_modules=None) != replace(second.config, target_modules=None):
        raise TargetError(
            f"{second.name} and {first.name} share their weight, and the configuration adapts them in different ways. "
            "Say the same for both, or name only one."
        )


def check_shared(config: AdapterConfig, sites: list[AdapterSite], saved: list[str]) -> None:
    """Check that a layer adapted by a companion method or through a tie is not adapted or trained a second time.

    Raises:
        TargetError: it is.
    """
    counts = Counter(id(site.candidate.base) for site in sites)
    for site in sites:
        if not site.prefix and site.tied_to is None:
            continue
        method = site.adapter_class.__name__
        why = f", which it shares with {site.tied_to}," if site.tied_to else ""
        if counts[id(site.candidate.base)] > 1 or within(site.name, saved):
            raise TargetError(
                f"{site.name}: {method} trains rows of its weight{why} so it cannot be adapted or trained in another "
                "way too. Choose one of the two."
            )
        if config.bias == "all" and site.candidate.base._parameters.get("bias") is not None:
            raise TargetError(
                f"{site.name}: bias='all' would leave out its bias, since {method} trains rows of its weight. "
                "Use bias='none' or 'lora_only'."
            )


def warn_of_tied_layers(model: nn.Module, sites: list[AdapterSite]) -> None:
    """Warn if another layer of the same type shares an adapted weight: the model may call that layer instead."""
    index, adapted = TensorIndex(model), {id(site.candidate.base) for site in sites}
    for site in sites:
        base = site.candidate.base
        weight = base._parameters.get("weight")
        owners = index.owners(weight) if weight is not None else []
        tied = [name for name, module in owners if type(module) is type(base) and id(module) not in adapted]
        if tied:
            warnings.warn(
                f"{site.name} shares its weight with {shown(tied)}, which the adapter does not reach; target "
                "those too if the model calls them.",
                stacklevel=5,
            )
