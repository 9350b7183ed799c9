"""Knowing a base model again: a few of its weights, written into an adapter's file and compared when that is read."""

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
QUANTIZED = 0.5  # of their norm, for all samples together; 4 bits cost about 0.1, and an unrelated weight is off by 1.4


def base_samples(model: nn.Module, adapter_name: str) -> dict[str, list[float]]:
    """A few base weights of each layer the adapter is on, by which a reader knows the base again; not of merged layers."""
    remembered = model.__dict__[STATE].samples.get(adapter_name, {})
    return {
        name: sample(layer.ops, layer.base_layer, layer.adapter(adapter_name)) or remembered.get(name, [])
        for name, layer in adapted_layers(model)
        if layer.owns(adapter_name) and not layer.merged
    }


def remember_base(model: nn.Module) -> None:
    """Take samples of an adapted model's base while this process has the weights whole, before they are sharded."""
    state: AdapterState = model.__dict__[STATE]
    state.samples = {name: base_samples(model, name) for name in state.configs}


@torch.no_grad()
def sample(ops: LayerOps, base: nn.Module, adapter: Adapter) -> list[float]:
    """Eight elements of the canonical weight, evenly spread; rounded to 6 digits. None where they cannot be had.

    Of a quantized layer a ninth number, the tolerance, says that these are not the float weight's own.
    """
    weight = ops.read_weight(base)
    if weight.is_meta or weight.numel() == 0 or type(weight) not in (Tensor, nn.Parameter):
        return []  # the last is a weight held in shards, of which this process has one
    weight = adapter.untouched(weight)
    if weight.numel() == 0:
        return []
    rows, columns = _places(*weight.shape)
    values = [float(f"{value:.6g}") for value in weight[rows, columns].tolist()]
    values += [QUANTIZED] if ops.is_quantized else []
    return values if all(map(is_sample, values)) else []  # a broken base is not known again, and JSON has no NaN


@functools.cache
def _places(rows: int, columns: int) -> tuple[list[int], list[int]]:
    places = [index * (rows * columns - 1) // (SAMPLES - 1) for index in range(SAMPLES)]
    return [place // columns for place in places], [place % columns for place in places]


def check_base(file: AdapterFile, plan: Plan, parts: Parts) -> None:
    """Compare the base weights that the file was saved with, where it says, with those of this model.

    Raises:
        CheckpointError: they differ by more than half precision explains.
    """
    here = {
        site.name: sample(site.ops, site.candidate.base, adapter)
        for site, adapter in zip(plan.adapters, parts.adapters, strict=True)
    }
    check_samples(file, here, " Pass allow_base_mismatch=True if that is meant.")


def check_samples(file: AdapterFile, here: Mapping[str, list[float]], fix: str = "") -> None:
    """Compare the samples of base weights in a file with those of this model, where both have them.

    Raises:
        CheckpointError: they differ by more than half precision explains.
    """
    for name, values in here.items():
        saved = file.base.get(name)
        if saved and values and not _alike(saved, values):
            raise CheckpointError(
                f"{file.path} was trained on another base: the weights of {name} differ (first {saved[0]:g} there, "
                f"{values[0]:g} here).{fix}"
            )


def _alike(saved: list[float], here: list[float]) -> bool:
    """Equal up to a conversion to half precision: 1 % of a value, or of the values' root mean square.

    Where one of the two is of a quantized layer, up to what that costs.
    """
    rough = len(saved) > SAMPLES or len(here) > SAMPLES
    saved, here = saved[:SAMPLES], here[:SAMPLES]
    if len(saved) != len(here):
        return True
    if rough:
        return math.dist(saved, here) <= QUANTIZED * max(math.hypot(*saved), math.hypot(*here))
    size = math.sqrt(sum(value * value for value in saved) / len(saved)) if saved else 0.0
    return all(abs(a - b) <= 0.01 * max(abs(a), size) for a, b in zip(saved, here, strict=True))
