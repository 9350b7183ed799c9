"""What an injection is going to do: the modules a configuration selects, the classes that adapt them, all checked."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import Tensor, nn

from minipeft import registry
from minipeft.config import AdapterConfig
from minipeft.errors import TargetError, shown
from minipeft.injection.adapted_layer import AdaptedLayer
from minipeft.injection.module_tree import Candidate, TensorIndex, candidates
from minipeft.injection.modules_to_save import SavedModule
from minipeft.injection.target_parameters import (
    check_alone,
    check_no_call,
    check_occupants,
    check_reads,
    parameter_sites,
)
from minipeft.injection.targets import select_parameters, select_saved, select_targets, to_prepare, within
from minipeft.layers.base import LayerOps, layer_ops
from minipeft.methods.base import Adapter


@dataclass(frozen=True)
class AdapterSite:
    """A module to adapt, with the class and the configuration that will adapt it."""

    name: str
    candidate: Candidate
    ops: LayerOps
    adapter_class: type[Adapter]
    config: AdapterConfig
    targeted: bool = True  # by its name, and not by a parameter's or along with the module that reads its weight
    prefix: str = ""  # before its keys in a file, if a companion of the configuration adapts it
    tied_to: str | None = None  # the module with whose adapter it is adapted along, since they share their weight


@dataclass(frozen=True)
class SavedSite:
    """A module to train in full, or only the parameters named in `only`."""

    name: str
    candidate: Candidate
    only: tuple[str, ...] | None


@dataclass(frozen=True)
class Plan:
    """All that an injection will do; made by `plan`, which has checked it."""

    config: AdapterConfig
    adapters: tuple[AdapterSite, ...]
    saved: tuple[SavedSite, ...]
    prepared: tuple[tuple[LayerOps, nn.Module], ...] = ()  # layers, adapted or not, that need `LayerOps.prepare`


def plan(model: nn.Module, config: AdapterConfig, *, every_pattern: bool = True) -> Plan:
    """Find what a configuration selects in a model and which classes adapt it; the model is only read.

    Raises:
        TargetError: a pattern or per-module option fits nothing, or a selected module cannot be adapted.
        RegistryError: the method is unknown.
    """
    config = config.for_model_type(getattr(getattr(model, "config", None), "model_type", None))
    found = candidates(model)
    for name, candidate in found.items():
        if type(candidate.module).__module__.startswith("peft."):
            raise TargetError(f"{name}: PEFT has adapted this layer already; unload that adapter first.")
    saved = [
        SavedSite(name, found[name], None) for name in select_saved(model, config, found, every_pattern=every_pattern)
    ]
    names = select_targets(model, config, found, every_pattern=every_pattern)
    parameters = select_parameters(model, config, found, every_pattern=every_pattern)
    targets = names + [f"{name}.{parameter}" for name, owned in parameters.items() for parameter in owned]
    unused = config.unused_options(targets) if every_pattern else []
    if unused:
        raise TargetError(
            f"{shown(unused)} fits none of the {len(targets)} targeted modules (such as {targets[0]!r}), or none that an earlier "
            "key leaves it."
        )
    configs = config.for_modules(targets)
    sites: list[AdapterSite] = []
    for name in names:
        sites += _module_sites(name, found[name], configs[name], every_pattern)
    for name, owned in parameters.items():
        check_alone(name, parameters, [*names, *(site.name for site in saved)])
        for parameter, (site_name, ops) in zip(owned, parameter_sites(name, found[name], owned), strict=True):
            own_config = configs[f"{name}.{parameter}"]
            check_no_call(f"{name}.{parameter}", "a parameter", own_config)
            sites.append(_site(site_name, found[name], ops, own_config, targeted=False))
    beside: dict[str, list[AdapterSite]] = {}
    for prefix, companion in config.companions():
        for name in select_targets(model, companion, found, every_pattern=every_pattern):
            own = _module_sites(name, found[name], companion, every_pattern)
            beside.setdefault(name, []).extend(replace(site, targeted=False, prefix=prefix) for site in own)
    # In the model's order, since of layers that share a weight the first leads.
    sites = _with_followers(model, found, sites + [site for name in found for site in beside.get(name, ())])
    _check_shared(config, sites, [site.name for site in saved])
    if config.trains_all_biases:
        saved += _bias_sites(found, sites, saved)
    for saved_site in saved:
        _check_saveable(saved_site)
    _warn_of_twins(model, sites)
    return Plan(config, tuple(sites), tuple(saved), tuple(to_prepare(found)))


def _module_sites(name: str, candidate: Candidate, config: AdapterConfig, every_pattern: bool) -> Iterator[AdapterSite]:
    """The module itself, and the children whose weights it reads."""
    ops, base = _ops_for(name, candidate), candidate.base
    check_occupants(name, candidate.module, [ops])
    if ops.reads and every_pattern:
        check_no_call(name, type(base).__name__, config)
    yield _site(name, candidate, ops, config)
    for attribute, part_ops in ops.read_children(base).items():
        part_name, child = f"{name}.base_layer.{attribute}", base.get_submodule(attribute)
        part = Candidate(child, (part_name,), ((base, attribute),))
        check_occupants(part_name, child, [part_ops])
        yield _site(part_name, part, part_ops, config, targeted=False)


def _site(
    name: str, candidate: Candidate, ops: LayerOps, config: AdapterConfig, *, targeted: bool = True
) -> AdapterSite:
    adapter_class = registry.adapter_class(config.adapter_method, name, type(candidate.base))
    check_reads(name, ops, adapter_class)
    return AdapterSite(name, candidate, ops, adapter_class, config, targeted)


def _with_followers(model: nn.Module, found: dict[str, Candidate], sites: list[AdapterSite]) -> list[AdapterSite]:
    """These sites and, behind each whose method follows ties, the other layers that hold the very weight."""
    if not any(site.adapter_class.adapts_tied_layers for site in sites):
        return sites
    index, names = TensorIndex(model), {id(candidate.base): name for name, candidate in found.items()}
    leaders: dict[int, AdapterSite] = {}
    complete = []
    for site in sites:
        leader = leaders.get(id(site.candidate.base)) if site.adapter_class.adapts_tied_layers else None
        if leader is not None and _apart_from_targets(leader.config) == _apart_from_targets(site.config):
            continue  # a tied layer that is named too
        if leader is not None:
            raise TargetError(
                f"{site.name} and {leader.name} share their weight, and are to be adapted in different ways. "
                "Say the same of both, or name one of them."
            )
        complete.append(site)
        weight = site.candidate.base._parameters.get("weight") if site.adapter_class.adapts_tied_layers else None
        for owner, module in index.owners(weight) if weight is not None else []:
            if module is site.candidate.base:
                continue
            if id(module) not in names:
                raise TargetError(f"{site.name} shares its weight with {owner}, which cannot be adapted along.")
            name = names[id(module)]
            ops = _ops_for(name, found[name])
            complete.append(replace(site, name=name, candidate=found[name], ops=ops, targeted=False, tied_to=site.name))
            leaders[id(module)] = site
    return complete


def _apart_from_targets(config: AdapterConfig) -> AdapterConfig:
    return replace(config, target_modules=None)


def _check_shared(config: AdapterConfig, sites: list[AdapterSite], saved: list[str]) -> None:
    """See that what a companion adapts, or an adapter follows to, is not adapted or trained otherwise as well."""
    counts = Counter(id(site.candidate.base) for site in sites)
    for site in sites:
        if not site.prefix and site.tied_to is None:
            continue
        why = f", which {site.tied_to} shares," if site.tied_to else ""
        if counts[id(site.candidate.base)] > 1 or within(site.name, saved):
            raise TargetError(
                f"{site.name}: {site.adapter_class.__name__} trains parts of its weight{why} so this adapter cannot also adapt or "
                "train it otherwise. Choose one of the two."
            )
        if config.trains_all_biases and site.candidate.base._parameters.get("bias") is not None:
            raise TargetError(
                f"{site.name}: bias='all' would leave out its bias, since {site.adapter_class.__name__} trains parts of its weight. "
                "Use bias='none' or 'lora_only'."
            )


def _bias_sites(found: dict[str, Candidate], sites: list[AdapterSite], saved: list[SavedSite]) -> list[SavedSite]:
    """The modules with a bias that are neither adapted nor trained in full."""
    taken = {id(site.candidate.module) for site in sites}
    taken |= {id(module) for site in saved for module in site.candidate.base.modules()}
    biased = []
    for name, candidate in found.items():
        if candidate.base._parameters.get("bias") is not None and id(candidate.module) not in taken:
            if candidate.base._modules:
                raise TargetError(f"{name} has a bias beside modules of its own, which bias='all' cannot train.")
            biased.append(SavedSite(name, candidate, ("bias",)))
    return biased


def _warn_of_twins(model: nn.Module, sites: list[AdapterSite]) -> None:
    """Say so where another layer of the same type shares a targeted weight: the model may call that one instead."""
    index, adapted = TensorIndex(model), {id(site.candidate.base) for site in sites}
    for site in sites:
        base = site.candidate.base
        weight = base._parameters.get("weight")
        owners = index.owners(weight) if weight is not None else []
        twins = [name for name, module in owners if type(module) is type(base) and id(module) not in adapted]
        if twins:
            warnings.warn(
                f"{site.name} shares its weight with {shown(twins)}, which the adapter does not reach; target "
                "those too if the model calls them.",
                stacklevel=5,
            )


def _ops_for(name: str, candidate: Candidate) -> LayerOps:
    module, base = candidate.module, candidate.base
    if isinstance(module, SavedModule):
        raise TargetError(f"{name}: already trained in full by another adapter's modules_to_save or bias='all'.")
    ops = layer_ops(base)
    if ops is not None:
        return ops
    kind, known = registry.qualified(type(base)), ", ".join(registry.layer_type_names())
    if any(True for _ in registry.layer_candidates(type(base))):
        weight = getattr(base, "weight", None)
        holds = f", weight {type(weight).__name__} of {weight.dtype}" if isinstance(weight, Tensor) else ""
        raise TargetError(
            f"{name}: {kind} is registered, but this instance is refused (packed or unusual weight, or a layer that is read and not "
            f"called{holds}). See register_layer."
        )
    raise TargetError(f"{name}: no LayerOps for {kind}; registered: {known}. See register_layer.")


def _check_saveable(site: SavedSite) -> None:
    for module in site.candidate.base.modules() if site.only is None else ():
        ops = layer_ops(module)
        if ops is not None and ops.is_quantized:
            raise TargetError(
                f"{site.name} holds a quantized {type(module).__name__}, which cannot be trained in full. "
                "Keep it out of the quantization, or adapt it."
            )
    if isinstance(site.candidate.module, AdaptedLayer) or any(
        isinstance(m, AdaptedLayer) for m in site.candidate.module.modules()
    ):
        raise TargetError(f"{site.name}: adapted already, so it cannot also be trained in full.")
    if isinstance(site.candidate.module, SavedModule) and site.candidate.module.only != site.only:
        raise TargetError(f"{site.name}: another adapter trains {site.candidate.module.only or 'all of it'} here.")
