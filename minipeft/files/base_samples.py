"""Recognising a base model: a few of its weights, written into an adapter's file and compared when that is read."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from minipeft.errors import CheckpointError
from minipeft.files.format import AdapterFile, is_sample
from minipeft.injection.attach import STATE, AdapterState
from minipeft.injection.build import Parts
from minipeft.injection.module_tree import adapted_layers
from minipeft.injection.plan import Plan
from minipeft.layers.base import LayerOps
from minipeft.methods.base import Adapter

SAMPLES = 8
# Allowed difference of two samples, as a fraction of their norm, if one is quantized: 4 bits cost about 0.1, and an
# unrelated weight differs by 1.4.
QUANTIZED = 0.5


def base_samples(model: nn.Module, adapter_name: str) -> dict[str, list[float]]:
    """A few base weights of each layer that the adapter is on and is not merged into, by the layer's name."""
    remembered = model.__dict__[STATE].samples.get(adapter_name, {})
    return {
        name: sample(layer.ops, layer.base_layer, layer.adapter(adapter_name)) or remembered.get(name, [])
        for name, layer in adapted_layers(model)
        if layer.owns(adapter_name) and not layer.merged
    }


def remember_base(model: nn.Module) -> None:
    """Take samples of an adapted model's base while this process has whole weights, before they are sharded."""
    state: AdapterState = model.__dict__[STATE]
    state.samples = {name: base_samples(model, name) for name in state.configs}


def planned_samples(plan: Plan, parts: Parts) -> dict[str, list[float]]:
    """What `base_samples` will return once the parts of a plan are in its model."""
    return {
        site.name: sample(site.ops, site.candidate.base, adapter)
        for site, adapter in zip(plan.adapters, parts.adapters, strict=True)
    }


@torch.no_grad()
def sample(ops: LayerOps, base: nn.Module, adapter: Adapter) -> list[float]:
    """Eight evenly spread elements of the canonical weight, rounded to 6 digits; empty if they cannot be read.

    A ninth number, the tolerance, marks the sample of a quantized layer, whose values are not the float weight's.
    """
    weight = ops.read_weight(base)
    if weight.is_meta or weight.numel() == 0 or type(weight) not in (Tensor, nn.Parameter):
        return []  # another type is a sharded weight, of which this process has one part
    weight = adapter.untouched(weight)
    if weight.numel() == 0:
        return []
    rows, columns = _places(*weight.shape)
    values = [float(f"{value:.6g}") for value in weight[rows, columns].tolist()]
    values += [QUANTIZED] if ops.is_quantized else []
    return values if all(map(is_sample, values)) else []  # JSON has no NaN


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
                f"{file.path} was trained on another base: the weights of {name} differ (first {saved[0]:g} there, "
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
