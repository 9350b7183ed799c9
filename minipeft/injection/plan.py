"""What an injection is going to do: the modules a configuration selects and the classes that adapt them, all checked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn
from torch.nn.parameter import UninitializedParameter

from minipeft.config.adapter_config import AdapterConfig
from minipeft.ecosystem.packages import is_compressed, is_from
from minipeft.ecosystem.transformers_model import model_type
from minipeft.ecosystem.wrapper_names import FIXED_PARAMETERS, wrapper_class
from minipeft.errors import OccupiedError, TargetError, shown
from minipeft.injection.adapted_layer import AdaptedLayer
from minipeft.injection.fresh_parts import (
    FreshParts,
    Origins,
    find_fresh_parts,
    find_origins,
    warn_of_fresh_parts,
    with_fresh_parts,
)
from minipeft.injection.module_tree import Candidate, candidates, is_callable, outside_adapters, own_bias
from minipeft.injection.modules_to_save import SavedModule
from minipeft.injection.sites import (
    AdapterSite,
    SavedSite,
    check_alone,
    check_needs_no_call,
    module_sites,
    parameter_sites,
)
from minipeft.injection.targets import Selection, to_prepare
from minipeft.injection.tied_sites import TiedLayers, check_shared, with_one_copy_of_tied
from minipeft.layers.base import LayerOps, layer_ops
from minipeft.layers.offloaded import is_absent, offloads


@dataclass(frozen=True)
class Plan:
    """All that an injection will do; made by `plan`, which has checked it."""

    config: AdapterConfig
    adapters: tuple[AdapterSite, ...]
    saved: tuple[SavedSite, ...]
    prepared: tuple[tuple[LayerOps, nn.Module], ...]  # layers, adapted or not, that need `LayerOps.prepare`
    origins: Origins
    outside: tuple[tuple[str, nn.Module], ...]  # the model's `outside_adapters`

    @property
    def sites(self) -> tuple[AdapterSite | SavedSite, ...]:
        """The sites of the adapters, then those of the trained copies."""
        return self.adapters + self.saved


def plan(
    model: nn.Module, config: AdapterConfig, *, every_pattern: bool = True, found: dict[str, Candidate] | None = None
) -> Plan:
    """Find what a configuration selects in a model and which classes adapt it; the model is only read.

    Args:
        model: the model to adapt.
        config: what to adapt and how.
        every_pattern: insist that each pattern and per-module option matches something. An adapter file says by its
            tensors what it adapts, so its patterns need not all match.
        found: the model's `candidates`, if they have been found already.

    Raises:
        TargetError: a pattern or per-module option matches nothing, or a selected module cannot be adapted.
        RegistryError: the method is unknown.
    """
    config = config.for_model_type(model_type(model))
    found = candidates(model) if found is None else found
    origins = find_origins(model, found)
    _check_can_be_adapted(found)
    # A file names all that it brings, so nothing is added to it.
    fresh = find_fresh_parts(model, config, found, origins) if every_pattern else FreshParts()
    config = with_fresh_parts(config, fresh)
    selection = Selection(model, config, found, every_pattern)
    saved = [SavedSite(name, found[name], None, name not in fresh.kept) for name in selection.saved]
    outside = tuple(outside_adapters(model))
    ties = TiedLayers(model, outside, config, found)
    saved = ties.with_one_copy(saved, every_pattern)
    sites = _targeted(selection, [site.name for site in saved])
    sites = ties.with_one_adapter(sites, saved)
    sites += _companions(selection)
    sites = ties.with_tied_sites(sites)
    check_shared(config, sites, [site.name for site in saved])
    saved = ties.with_tied_copies(saved, sites)
    _check_not_wrapped(outside, [*sites, *saved])
    if config.bias == "all":
        saved += _bias_sites(found, sites, saved)
    saved = with_one_copy_of_tied(saved)
    for site in saved:
        _check_saveable(site)
    ties.warn_of_tied_layers(sites, saved)
    if every_pattern:
        selection.warn_of_hidden([site.name for site in saved])
        warn_of_fresh_parts(model, config, found, fresh, origins)
    return Plan(config, tuple(sites), tuple(saved), tuple(to_prepare(found)), origins, outside)


def _check_can_be_adapted(found: Mapping[str, Candidate]) -> None:
    """Raise TargetError if PEFT has adapted the model, compressed-tensors has quantized it, or a lazy layer has no shape yet."""
    for name, candidate in found.items():
        if UninitializedParameter in map(type, candidate.base._parameters.values()):
            raise TargetError(f"{name}: this lazy layer has no weight yet. Call the model once, then adapt it.")
        if type(candidate.module).__module__.startswith("peft."):
            raise TargetError(f"{name}: PEFT has adapted this layer already; unload that adapter first.")
        if is_compressed(candidate.base):
            raise TargetError(
                f"{name}: compressed-tensors holds this model's weights and rounds what its layers compute, so training and "
                "merging would go wrong. Load the model with quantization_config=CompressedTensorsConfig(dequantize=True), which "
                "takes as much memory as its first call would."
            )


def _check_not_wrapped(outside: Iterable[tuple[str, nn.Module]], sites: Sequence[AdapterSite | SavedSite]) -> None:
    """Refuse to add parameters inside of DDP and the like, which would neither synchronise nor shard them."""
    if not any(site.candidate.wrapped_names for site in sites):
        return
    inside = {
        id(inner): kind
        for _, wrapper in outside
        if (kind := wrapper_class(wrapper)) in FIXED_PARAMETERS
        for inner in wrapper.modules()
    }
    for site in sites:
        kind = inside.get(id(site.candidate.base))
        if kind is not None:
            raise TargetError(
                f"{site.name}: {kind} wraps a part of the model and handles only the parameters that it was made with. "
                "Adapt the model first, then wrap it."
            )


def _targeted(selection: Selection, saved: Sequence[str]) -> list[AdapterSite]:
    """The sites that ``target_modules`` and ``target_parameters`` select, with the options that hold for each."""
    config, found = selection.config, selection.found
    names, parameters = selection.targets, selection.parameters
    targets = names + [f"{name}.{parameter}" for name, owned in parameters.items() for parameter in owned]
    unused = config.unused_options(targets) if selection.every_pattern else []
    if unused:
        raise TargetError(
            f"{shown(unused)} matches none of the {len(targets)} targeted modules (such as {targets[0]!r}), or only "
            "modules that an earlier key matches too."
        )
    configs = config.for_modules(targets)
    sites = [site for name in names for site in module_sites(name, found[name], configs[name])]
    for site in sites if selection.every_pattern else ():
        if site.targeted and site.is_read:
            check_needs_no_call(site.name, type(site.candidate.base).__name__, site.config)
    for name, owned in parameters.items():
        check_alone(name, parameters, [*names, *saved])
        sites += parameter_sites(name, found[name], owned, configs)
    return sites


def _companions(selection: Selection) -> list[AdapterSite]:
    """The sites of the configuration's companions, in the model's order: of tied layers the first owns the adapter."""
    sites: dict[str, list[AdapterSite]] = {}
    for prefix, companion in selection.config.companions():
        for name in replace(selection, config=companion).targets:
            own = module_sites(name, selection.found[name], companion)
            sites.setdefault(name, []).extend(replace(site, targeted=False, prefix=prefix) for site in own)
    return [site for name in selection.found for site in sites.get(name, ())]


def _bias_sites(
    found: Mapping[str, Candidate], sites: Sequence[AdapterSite], saved: Sequence[SavedSite]
) -> list[SavedSite]:
    """The modules with a bias that are neither adapted nor trained in full.

    A bias that a module shares with a layer in it, as in BERT's prediction head, belongs to the layer.
    """
    taken = {id(site.candidate.module) for site in sites}
    taken |= {id(module) for site in saved for module in site.candidate.base.modules()}
    of_layers = {id(own_bias(candidate.base)) for candidate in found.values() if not candidate.base._modules}
    biased = []
    for name, candidate in found.items():
        bias = own_bias(candidate.base)
        if bias is not None and id(candidate.module) not in taken:
            if candidate.base._modules and id(bias) in of_layers:
                continue
            if candidate.base._modules:
                raise TargetError(
                    f"{name} has a bias and also child modules, which bias='all' cannot train. Use bias='lora_only' or 'none'."
                )
            biased.append(SavedSite(name, candidate, ("bias",)))
    return biased


def _check_saveable(site: SavedSite) -> None:
    module, base = site.candidate.module, site.candidate.base
    if not is_callable(base):
        raise TargetError(
            f"modules_to_save: {site.name} is a {type(base).__name__}, which is never called itself, so a trained copy of "
            "it would not be used. Name modules that are called."
        )
    for inner in base.modules() if site.only is None else ():
        ops = layer_ops(inner)
        if (ops is not None and ops.is_quantized) or any(map(_holds_codes, inner._parameters.values())):
            raise TargetError(
                f"{site.name} holds a quantized {type(inner).__name__}, which cannot be trained in full. "
                "Keep it out of the quantization, or adapt it."
            )
    if any(isinstance(inner, AdaptedLayer) for inner in module.modules()):
        raise OccupiedError(f"{site.name}: adapted already, so it cannot also be trained in full.")
    if any(isinstance(inner, SavedModule) for inner in module.modules() if inner is not module):
        raise OccupiedError(
            f"{site.name}: another adapter's modules_to_save or bias='all' trains a part of it, so it cannot also be trained as a whole."
        )
    if isinstance(module, SavedModule) and module.only != site.only:
        raise OccupiedError(f"{site.name}: another adapter trains {module.only or 'all of it'} here.")


def _holds_codes(parameter: nn.Parameter | None) -> bool:
    """Whether a parameter looks like floats and is quantized, so that it gets no gradient."""
    if parameter is None:
        return False
    return is_from(type(parameter), "torchao") or (parameter.is_floating_point() and parameter.itemsize == 1)  # float8


def check_loaded(model: nn.Module, plan: Plan, *, may_be_empty: bool) -> None:
    """Raise TargetError if a layer to adapt or train has no values; an adapter there would have none either.

    `may_be_empty` allows a model without any value, as for counting its parameters.
    """
    if may_be_empty and all(parameter.is_meta for parameter in model.parameters()):
        if not any(map(offloads, model.modules())):
            return
    sites = [(site.name, [site.candidate.base]) for site in plan.adapters]
    sites += [(site.name, list(site.candidate.base.modules())) for site in plan.saved]
    for name, modules in sites:
        if any(map(is_absent, modules)):
            raise TargetError(
                f"{name}: its weight is on the meta device, without values, and no hook of its own loads it. Load the "
                "model's weights first; with accelerate, without preload_module_classes."
            )
