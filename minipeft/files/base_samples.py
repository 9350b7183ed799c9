"""Recognising a base model: a few of its weights, written into an adapter's file and compared when that is read.

Besides those of the adapted layers, of frozen weights that an adapter leaves alone and that may not be in the base's
checkpoint.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from minipeft.ecosystem.wrapper_names import parameters_in
from minipeft.errors import CheckpointError, printable, shown, warn
from minipeft.files.format import LARGEST, AdapterFile
from minipeft.files.resized_vocabulary import tables
from minipeft.injection.adapted_layer import AdaptedLayer
from minipeft.injection.build import Parts
from minipeft.injection.fresh_parts import Origins, base_parameters, find_origins
from minipeft.injection.module_tree import Candidate, adapted_layers, candidates, wrappers
from minipeft.injection.modules_to_save import SavedModule
from minipeft.injection.plan import Plan
from minipeft.injection.state import state_of
from minipeft.injection.wrapper import innermost
from minipeft.kernels.functional import is_flat_part
from minipeft.layers.base import LayerOps
from minipeft.layers.offloaded import each_value, present

SAMPLES = 8
# Allowed difference of two samples, as a fraction of their norm, if one is quantized: 4 bits cost about 0.1, and an
# unrelated weight differs by 1.4.
QUANTIZED = 0.5


def base_samples(
    model: nn.Module, adapter_name: str, brought: Mapping[str, Collection[int]] | None = None
) -> dict[str, list[float]]:
    """A few base weights of each layer that the adapter is on and is not merged into, by the layer's name.

    And of the frozen weights that may not be in the base's checkpoint, by their own names.

    Args:
        model: the adapted model.
        adapter_name: which of its adapters.
        brought: of a table, by its name, the rows that the file brings: those that train, and those that the base lacks.
    """
    rows = brought or {}
    remembered = state_of(model).samples.get(adapter_name, {})
    layers = [(name, layer) for name, layer in adapted_layers(model) if layer.owns(adapter_name) and not layer.merged]
    adapted = _samples(
        (
            n,
            layer.ops,
            layer.base_layer,
            functools.partial(layer.adapter(adapter_name).untouched, brought=rows.get(n, ())),
        )
        for n, layer in layers
    )
    adapted = {name: values or remembered.get(name, []) for name, values in adapted.items()}
    weights = each_value(model, frozen_weights(model, adapter_name))
    frozen = _numbers({name: None if remembered.get(name) else _picked(weight) for name, weight in weights})
    return adapted | {name: values for name, row in frozen.items() if (values := remembered.get(name) or row)}


def remember_base(model: nn.Module) -> None:
    """Take samples of an adapted model's base while this process has whole weights, before they are sharded."""
    state = state_of(model)
    state.samples = {name: base_samples(model, name) for name in state.configs}


def planned_samples(
    model: nn.Module, plan: Plan, parts: Parts, frozen: Iterable[tuple[str, nn.Parameter]]
) -> dict[str, list[float]]:
    """What `base_samples` will return once the parts of a plan are in its model, with these of the frozen weights."""
    pairs = zip(plan.adapters, parts.adapters, strict=True)
    adapted = _samples((site.name, site.ops, site.candidate.base, adapter.untouched) for site, adapter in pairs)
    return adapted | _numbers({name: _picked(weight) for name, weight in each_value(model, frozen)})


@torch.no_grad()
def _samples(layers: Iterable[tuple[str, LayerOps, nn.Module, Callable[[Tensor], Tensor]]]) -> dict[str, list[float]]:
    """By the name of each layer, eight evenly spread elements of its canonical weight; empty if they cannot be read.

    They are of the part that the last function gives, see `minipeft.methods.base.Adapter.untouched`.
    A ninth number, the tolerance, marks the sample of a quantized layer, whose values are not the float weight's.
    """
    picked, quantized = {}, set()
    for name, ops, base, untouched in layers:
        owner = innermost(base)
        with present(owner):
            flat = [p for p in owner._parameters.values() if p is not None and is_flat_part(p)]
            weight = None if flat else ops.read_weight(base)
            picked[name] = None if weight is None or not _is_readable(weight) else _picked(untouched(weight))
        if ops.is_quantized:
            quantized.add(name)
    numbers = _numbers(picked)
    return {name: [*row, QUANTIZED] if row and name in quantized else row for name, row in numbers.items()}


def _picked(weight: Tensor) -> Tensor | None:
    """Eight evenly spread elements; None if they cannot be read."""
    return weight.detach().take(_places(weight.numel(), weight.device)) if _is_readable(weight) else None


def _is_readable(weight: Tensor) -> bool:
    # Another type is a sharded weight, of which this process has one part. One byte holds less than half precision does, as
    # in a base that diffusers' layerwise casting stores in float8.
    whole = type(weight) in (Tensor, nn.Parameter) and weight.itemsize > 1 and not is_flat_part(weight)
    return whole and weight.layout is torch.strided and not weight.is_meta and weight.numel() > 0


@functools.lru_cache(256)
def _places(count: int, device: torch.device) -> Tensor:
    return torch.tensor([index * (count - 1) // (SAMPLES - 1) for index in range(SAMPLES)], device=device)


def _numbers(picked: Mapping[str, Tensor | None]) -> dict[str, list[float]]:
    """Elements as numbers, rounded to 6 digits, by name; read together, since each read waits for a GPU."""
    groups: dict[tuple[torch.device, torch.dtype], dict[str, Tensor]] = {}
    for name, values in picked.items():
        if values is not None:
            groups.setdefault((values.device, values.dtype), {})[name] = values
    rows: dict[str, list[float]] = {}
    for group in groups.values():
        stack = torch.stack(list(group.values()))
        sound = (stack.abs() < LARGEST).all(1).tolist()  # JSON has no NaN
        rows.update((name, row) for name, row, good in zip(group, stack.tolist(), sound, strict=True) if good)
    return {name: [float(f"{value:.6g}") for value in rows.get(name, ())] for name in picked}


def check_samples(file: AdapterFile, here: Mapping[str, list[float]], *, exact: bool, advice: str) -> None:
    """Compare the samples in a file with those of this model, for the layers that both have.

    `exact` samples of one kind must be equal to 4 digits, others as close as half precision is.

    Raises:
        CheckpointError: they differ by more than that; the message ends with `advice`.
    """
    for name, values in here.items():
        saved = file.base.get(name)
        if saved and values and saved != values and not _alike(saved, values, exact):
            raise CheckpointError(
                f"{file.path} was trained on another base: the weights of {printable(name, 200)} differ (first {saved[0]:g} there, "
                f"{values[0]:g} here).{advice}"
            )


def _alike(saved: list[float], here: list[float], exact: bool) -> bool:
    """Equal up to a conversion to half precision: 1 % of a value, or of the root mean square. Looser if quantized."""
    same_kind, quantized = len(saved) == len(here), max(len(saved), len(here)) > SAMPLES
    saved, here = saved[:SAMPLES], here[:SAMPLES]
    if len(saved) != len(here):
        return True
    if exact and same_kind:
        return all(math.isclose(a, b, rel_tol=1e-4) for a, b in zip(saved, here, strict=True))
    if quantized:
        return math.dist(saved, here) <= QUANTIZED * max(math.hypot(*saved), math.hypot(*here))
    size = math.hypot(*saved) / math.sqrt(len(saved))
    return all(abs(a - b) <= 0.01 * max(abs(a), size) for a, b in zip(saved, here, strict=True))


def frozen_weights(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, nn.Parameter]]:
    """The weights to sample for an adapter, by full name: frozen, not in its file, and not known to be the checkpoint's."""
    origins = find_origins(model)
    if origins.all_known:
        return iter(())
    taken: set[int] = set()
    for _, wrapper in wrappers(model):
        base = innermost(wrapper)
        if isinstance(wrapper, AdaptedLayer) and (wrapper.owns(adapter_name) or wrapper.merged):
            taken.update(map(id, parameters_in(base)))
        elif isinstance(wrapper, SavedModule) and adapter_name in wrapper.adapters:
            taken |= _saved(base, wrapper.only)
    unsure = _of_unsure_origin(model, taken, candidates(model), origins)
    return ((name, p) for name, p in unsure if not p.requires_grad)


def planned_frozen_weights(
    model: nn.Module, plan: Plan, found: Mapping[str, Candidate], sampled: Collection[str]
) -> Iterator[tuple[str, nn.Parameter]]:
    """What `frozen_weights` will return once a plan is carried out in a model with these `candidates`.

    Nothing if it is not needed: all samples of a file, named in `sampled`, are of adapted layers, and no weight was drawn at random.
    """
    asked = plan.origins.fresh or set(sampled).difference(site.name for site in plan.adapters)
    if plan.origins.all_known or not asked:
        return iter(())
    taken = {id(parameter) for site in plan.adapters for parameter in parameters_in(site.candidate.base)}
    for site in plan.saved:
        taken |= _saved(site.candidate.base, site.only)
    return _of_unsure_origin(model, taken, found, plan.origins)


def _saved(base: nn.Module, only: Collection[str] | None) -> set[int]:
    return {id(parameter) for name, parameter in base.named_parameters() if only is None or name in only}


def _of_unsure_origin(
    model: nn.Module, taken: Collection[int], found: Mapping[str, Candidate], origins: Origins
) -> Iterator[tuple[str, nn.Parameter]]:
    """Weights of layers without children: a bare one next to them, such as a mask token, often acts in training only."""
    # The rows of a resized vocabulary have a place of their own in a file.
    resized = {id(table.weight) for table in tables(model).values() if len(table.weight) != table.base_rows}
    for name, owner, parameter in base_parameters(model, found):
        if owner._modules or id(parameter) in taken or id(parameter) in resized:
            continue
        if name in origins.fresh or name in origins.unknown:
            yield name, parameter


def warn_of_missing_parts(model: nn.Module, file: AdapterFile, plan: Plan, frozen: Iterable[str]) -> None:
    """Warn about weights that were drawn at random when this base was loaded, and of which the file says nothing.

    An adapted layer is one of them, if the file has no sample of it: PEFT's brings its update alone. `frozen` are the names
    of `planned_frozen_weights`.
    """
    if not plan.origins.fresh:
        return
    known = tables(model)  # whose new rows have a place of their own
    unseen = [site for site in plan.adapters if site.name not in file.base and site.name not in known]
    updated = [f"{site.name}.{own}" for site in unseen for own, _ in site.candidate.base.named_parameters()]
    lacking = [name for name in (*frozen, *updated) if name in plan.origins.fresh and name not in file.base]
    if lacking:
        warn(
            f"{file.path.parent} does not bring {shown(lacking)}, which this base's checkpoint lacks too: they were drawn "
            "at random when it was loaded, so results may differ from those in training."
        )
