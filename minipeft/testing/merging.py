"""Merging keeps the output, unmerging restores every bit, and an adapter's delta and factors match its merge."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minipeft.errors import MergeError
from minipeft.injection.adapted_layer import AdaptedLayer
from minipeft.kernels.functional import accumulation_dtype
from minipeft.model import AdaptedModel
from minipeft.testing.case import (
    SIZES,
    SQUARE,
    Case,
    Holder,
    bits,
    fingerprint,
    layers_of,
    read_and_written,
    relative_error,
)

OWN_NOISE = 0.05  # how far a layer may be from its own weight's output, as a fraction of it: int8 rounds its input


def merges(dtype: torch.dtype) -> Callable[[Case], str | None]:
    """The check of merging in one dtype, for example ``merge_float32``."""
    name = f"merge_{str(dtype).removeprefix('torch.')}"

    def check(case: Case) -> str | None:
        if not case.ops.can_merge:
            return _refuses_to_merge(case, name)
        reason = case.no(dtype)
        if reason is not None:
            return reason
        for sizes in (SIZES, SQUARE) if dtype == torch.float64 else (SIZES,):  # a square hides no rounding
            _merge(case, name, dtype, sizes)
        return None

    check.__doc__ = f"Merged, the output is the same up to the rounding of {dtype}; unmerged, every bit is as before."
    check.__name__ = name
    return check


def _refuses_to_merge(case: Case, name: str) -> str:
    model = case.adapted()
    before = fingerprint(model)
    try:
        model.merge_adapter()
    except MergeError:
        if fingerprint(model) == before:
            return f"{type(case.ops).__name__}.can_merge is False, and merging is refused"
    raise case.fail(name, "can_merge is False, but merging is not refused, or changes the model")


def _merge(case: Case, name: str, dtype: torch.dtype, sizes: tuple[int, int]) -> None:
    model, base = case.adapted(dtype, sizes), case.base(dtype, sizes)
    x = case.input(base)
    for layer in layers_of(model):
        _algebra(case, name, layer)
    before, expected, plain = fingerprint(model), model(x), base(x)
    noise = _own_noise(case, name, model, x, plain)
    options = _merge_options(case)
    model.merge_adapter(**options)
    case.same(name, "the merged output", model(x), expected, noise)
    model.unmerge_adapter()
    if fingerprint(model) != before or not torch.equal(model(x), expected):
        raise case.fail(name, "unmerging does not bring back every bit")
    _scale(case, name, model, x, noise)
    merged = model.merge_and_unload(**options)
    if type(merged) is not Holder or layers_of(merged):
        raise case.fail(name, "merge_and_unload leaves something of the adapter in the model")
    case.same(name, "the output after merge_and_unload", merged(x), expected, noise)
    restored = case.adapted(dtype, sizes)
    wanted = [bits(tensor) for tensor in base.state_dict().values()]
    if [bits(tensor) for tensor in restored.unload().state_dict().values()] != wanted:
        raise case.fail(name, "unload does not bring back the base")


@torch.no_grad()
def _algebra(case: Case, name: str, layer: AdaptedLayer) -> None:
    """Check that the adapter's `delta` and `factors`, which make merging cheaper, give what its `merge` gives."""
    adapter, weight = layer.adapter("default"), layer.ops.read_weight(layer.base_layer).detach()
    weight, bias = weight.to(accumulation_dtype(weight)), layer.ops.read_bias(layer.base_layer)
    kept = weight.clone()
    merged, _ = adapter.merge(weight, None if bias is None else bias.detach().to(weight))
    if not torch.equal(weight, kept):
        raise case.fail(name, "merge writes the weight that it is given")
    delta, factors = adapter.delta(weight), adapter.factors()
    if delta is not None:
        case.same(name, "W + delta(W)", weight + delta.to(weight), merged)
        if bias is not None:
            wide = bias.detach().to(weight)
            moved, still = adapter.merge_bias(wide + 1), adapter.merge_bias(wide)
            assert moved is not None
            assert still is not None
            case.same(name, "what merge_bias adds to another bias", moved - 1, still)
    if factors is not None:
        case.same(name, "W + up @ down, its factors", weight + (factors[0] @ factors[1]).to(weight), merged)


def _scale(case: Case, name: str, model: AdaptedModel, x: Tensor, noise: float) -> None:
    """Check that a method with a `scaling` reads it at every use: in the forward pass, and in what is merged."""
    layers = layers_of(model)
    if not all(layer.adapter("default").is_scalable for layer in layers):
        return
    expected, options = model(x), _merge_options(case)
    full = [_update(layer) for layer in layers]
    model.set_scale("default", 0.5)
    for layer, whole in zip(layers, full, strict=True):
        case.same(name, "the update at half strength", _update(layer), whole / 2)
    half = model(x)
    if torch.equal(half, expected):
        raise case.fail(name, "set_scale does not change the output: forward must read self.scaling")
    model.merge_adapter(**options)
    case.same(name, "the merged output at half strength", model(x), half, noise)
    model.unmerge_adapter()
    model.set_scale("default", 1.0)
    if not torch.equal(model(x), expected):
        raise case.fail(name, "set_scale(1) does not bring back the output")


def _update(layer: AdaptedLayer) -> Tensor:
    update = layer.adapter("default").delta(layer.ops.read_weight(layer.base_layer).detach())
    assert update is not None
    return update.detach()


def _merge_options(case: Case) -> dict[str, Any]:
    # A quantized layer is merged only on request, since a float layer replaces it.
    return {"dequantize": True} if case.ops.is_quantized else {}


def _own_noise(case: Case, name: str, model: AdaptedModel, x: Tensor, plain: Tensor) -> float:
    """How far the layers' outputs are from those of the weights read from them; 0 unless writing replaces a layer."""
    trial = copy.deepcopy(model)
    replaced = False
    for layer in layers_of(trial):
        base = layer.base_layer
        layer.put_base(read_and_written(layer))
        replaced |= type(layer.base_layer) is not type(base)
    with trial.disable_adapter():
        noise = relative_error(trial(x), plain) if replaced else 0.0
    if noise > OWN_NOISE:
        raise case.fail(name, f"the layer that write_weight returns is off by {noise:.2g} with its own weight")
    return 3 * noise
