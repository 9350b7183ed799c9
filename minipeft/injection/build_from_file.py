"""Building what a plan puts into a model, with the values of a file; where possible, nothing is made or copied twice."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from minipeft.ecosystem.wrapper_names import modules_in, parameters_in
from minipeft.injection.alike import is_simple, twin
from minipeft.injection.build import Parts, build, shared_tensors, start_of
from minipeft.injection.plan import Plan
from minipeft.injection.sites import AdapterSite
from minipeft.kernels.generators import generators_kept
from minipeft.layers.offloaded import present
from minipeft.methods.base import Adapter

CONTAINERS = (dict, list, tuple)


def build_from(plan: Plan, shapes: Parts, tensors: Mapping[str, Tensor], values: dict[str, Tensor]) -> Parts:
    """Create the parts of a plan with these values, by key in a file, without advancing torch's random generator.

    Args:
        plan: what to create.
        shapes: the parts, as `build` makes them on the meta device. Adapters that a file brings whole, as nearly all do,
            are made of those, and not in the usual way.
        tensors: their `Parts.file_tensors`.
        values: taken out of the dictionary. Each part takes their memory as its own when it can, so that there is never a
            second copy of all of them.
    """
    devices = [_device(site) for site in plan.adapters]
    kinds = {id(adapter): adapter for adapter in shapes.adapters}
    keys = {kind: {id(t): key for key, t in adapter.file_tensors().items()} for kind, adapter in kinds.items()}
    shared = any(cls.overrides("share") for cls in {site.adapter_class for site in plan.adapters})
    whole = tensors.keys() <= values.keys() and all(_is_whole(adapter, keys[kind]) for kind, adapter in kinds.items())
    if shared or not whole or None in devices:
        return _filled(plan, values)
    simple = {kind for kind, adapter in kinds.items() if is_simple(adapter)}  # the others are for one layer each
    adapters = []
    for site, kind, device in zip(plan.adapters, shapes.adapters, devices, strict=True):
        adapters.append(twin(kind) if id(kind) in simple else kind)
        _materialise(adapters[-1], start_of(site), keys[id(kind)], values, device)
    return Parts(tuple(adapters), _filled(replace(plan, adapters=()), values).copies)


def _device(site: AdapterSite) -> torch.device | None:
    """The device that a layer's adapter is for; None if its layer does not tell, or the adapter belongs to another one."""
    base = site.candidate.base
    if site.tied_to is not None or site.ops.is_quantized:
        return None
    with present(base):
        first = next(parameters_in(base), None)
    return None if first is None else first.device


def _is_whole(adapter: Adapter, brought: Collection[int]) -> bool:
    """Whether the tensors with these ids are all that an adapter holds, so that nothing in it comes from its layer."""
    return all(id(value) in brought for module in modules_in(adapter) for value in _tensors_in(module))


def _tensors_in(module: nn.Module) -> list[Tensor]:
    """All that the module itself refers to, as parameters, buffers or anything else, in lists and dictionaries too."""
    own = list(vars(module).values())
    tables = [value for value in own if isinstance(value, CONTAINERS)]
    held = [item for table in tables for item in (table.values() if isinstance(table, dict) else table)]
    return [value for value in (*own, *held) if isinstance(value, Tensor)]


def _materialise(
    adapter: Adapter, start: str, keys: Mapping[int, str], values: dict[str, Tensor], device: torch.device | None
) -> None:
    """Put values into the place of an adapter's tensors on the meta device, which have these keys in a file, by id."""
    for module in modules_in(adapter):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                value = _in_place_of(parameter, values.pop(start + keys[id(parameter)]), device)
                module._parameters[name] = nn.Parameter(value, parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = _in_place_of(buffer, values.pop(start + keys[id(buffer)]), device)


def _in_place_of(shape: Tensor, value: Tensor, device: torch.device | None) -> Tensor:
    """A value that nothing else uses, as a tensor of this shape, dtype and strides; without a copy if it is one."""
    value = value.to(device, shape.dtype)
    if _is_plain(value, shape):
        return value
    return torch.empty_strided(shape.shape, shape.stride(), dtype=shape.dtype, device=device).copy_(value)


def _is_plain(value: Tensor, shape: Tensor) -> bool:
    """Whether it has these strides and its memory to itself."""
    return value.stride() == shape.stride() and value.untyped_storage().nbytes() == value.nbytes


def _filled(plan: Plan, values: dict[str, Tensor]) -> Parts:
    """The parts of a plan, made in the usual way, with these values in them."""

    @torch.no_grad()
    def fill(tensors: Mapping[str, Tensor], part: nn.Module | None) -> None:
        held = set() if part is None else {id(t) for t in (*part.parameters(), *part.buffers())}
        for key, live in tensors.items():
            if key in values:
                _give(live, values.pop(key), owned=id(live) in held)

    with generators_kept():
        parts = build(plan, fill=fill)
        fill(shared_tensors(parts.adapters), None)
    return parts


def _give(live: Tensor, value: Tensor, *, owned: bool) -> None:
    """Give a tensor this value, which nothing else uses; in its own memory, unless a module holds it as it is."""
    value = value.to(live.device, live.dtype)
    if owned and type(live) in (Tensor, nn.Parameter) and _is_plain(value, live):
        live.data = value
    else:
        live.copy_(value)
