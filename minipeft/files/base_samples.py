"""Recognising a base model: a few of its weights, written into an adapter's file and compared when that is read."""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from minipeft.errors import CheckpointError, printable
from minipeft.files.format import AdapterFile, is_sample
from minipeft.files.frozen_weights import frozen_weights, planned_frozen_weights
from minipeft.injection.build import Parts
from minipeft.injection.module_tree import adapted_layers
from minipeft.injection.plan import Plan
from minipeft.injection.state import STATE, AdapterState
from minipeft.injection.wrapper import innermost
from minipeft.layers.base import LayerOps
from minipeft.layers.offloaded import each_value, present
from minipeft.methods.base import Adapter

SAMPLES = 8
# Allowed difference of two samples, as a fraction of their norm, if one is quantized: 4 bits cost about 0.1, and an
# unrelated weight differs by 1.4.
QUANTIZED = 0.5


def base_samples(model: nn.Module, adapter_name: str) -> dict[str, list[float]]:
    """A few base weights of each layer that the adapter is on and is not merged into, by the layer's name.

    And of the frozen weights that may not be in the base's checkpoint, by their own names.
    """
    remembered = model.__dict__[STATE].samples.get(adapter_name, {})
    adapted = {
        name: sample(layer.ops, layer.base_layer, layer.adapter(adapter_name)) or remembered.get(name, [])
        for name, layer in adapted_layers(model)
        if layer.owns(adapter_name) and not layer.merged
    }
    weights = each_value(model, frozen_weights(model, adapter_name))
    frozen = {name: remembered.get(name) or _sample_of(weight) for name, weight in weights}
    return adapted | {name: values for name, values in frozen.items() if values}


def remember_base(model: nn.Module) -> None:
    """Take samples of an adapted model's base while this process has whole weights, before they are sharded."""
    state: AdapterState = model.__dict__[STATE]
    state.samples = {name: base_samples(model, name) for name in state.configs}


def planned_samples(model: nn.Module, plan: Plan, parts: Parts, wanted: Collection[str]) -> dict[str, list[float]]:
    """What `base_samples` will return once the parts of a plan are in its model; of frozen weights only those `wanted`."""
    adapted = {
        site.name: sample(site.ops, site.candidate.base, adapter)
        for site, adapter in zip(plan.adapters, parts.adapters, strict=True)
    }
    weights = [(name, weight) for name, weight in planned_frozen_weights(model, plan) if name in wanted]
    return adapted | {name: _sample_of(weight) for name, weight in each_value(model, weights)}


@torch.no_grad()
def sample(ops: LayerOps, base: nn.Module, adapter: Adapter) -> list[float]:
    """Eight evenly spread elements of the canonical weight, rounded to 6 digits; empty if they cannot be read.

    A ninth number, the tolerance, marks the sample of a quantized layer, whose values are not the float weight's.
    """
    with present(innermost(base)):
        return _sampled(ops, base, adapter)


def _sampled(ops: LayerOps, base: nn.Module, adapter: Adapter) -> list[float]:
    weight = ops.read_weight(base)
    if not _is_readable(weight):
        return []
    values = _sample_of(adapter.untouched(weight))
    return [*values, QUANTIZED] if values and ops.is_quantized else values


@torch.no_grad()
def _sample_of(weight: Tensor) -> list[float]:
    if not _is_readable(weight):
        return []
    weight = weight if weight.ndim == 2 else weight.reshape(1, -1)
    rows, columns = _places(*weight.shape)
    values = [float(f"{value:.6g}") for value in weight[rows, columns].tolist()]
    return values if all(map(is_sample, values)) else []  # JSON has no NaN


def _is_readable(weight: Tensor) -> bool:
    # Another type is a sharded weight, of which this process has one part.
    return not weight.is_meta and weight.numel() > 0 and type(weight) in (Tensor, nn.Parameter)


@functools.cache
def _places(rows: int, columns: int) -> tuple[list[int], list[int]]:
    places = [index * (rows * columns - 1) // (SAMPLES - 1) for index in range(SAMPLES)]
    return [place // columns for place in places], [place % columns for place in places]


def check_samples(file: AdapterFile, here: Mapping[str, list[float]], *, exact: bool = False, advice: str = "") -> None:
    """Compare the samples in a file with those of this model, for the layers that both have.

    `exact` samples of one kind must be equal to 4 digits, others as close as half precision is.

    Raises:
        CheckpointError: they differ by more than that; the message ends with `advice`.
    """
    for name, values in here.items():
        saved = file.base.get(name)
        if saved and values and not _alike(saved, values, exact):
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
