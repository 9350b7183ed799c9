"""What a merge is going to do: one checked step per layer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minipeft.errors import MergeError
from minipeft.injection.adapted_layer import AdaptedLayer
from minipeft.injection.module_tree import TensorIndex
from minipeft.kernels.functional import accumulation_dtype, largest, low_rank_bound
from minipeft.layers.offloaded import offloads
from minipeft.memory.dequantize import check_replaceable, float_dtype
from minipeft.merging.steps import AddInPlace, Replace, Step, Write
from minipeft.merging.tied_weights import adapts_tied_layers, shared_parameters, tied_layers
from minipeft.merging.trial import check_by_trial, check_order, check_own_forward, check_stored
from minipeft.methods.base import Adapter


@dataclass(frozen=True)
class Options:
    """How to merge; see `minipeft.merging.merge.merge`."""

    untie: bool = False
    undoable: bool = True
    dequantize: bool = False
    reported: bool = True


def plan_merge(
    model: nn.Module, names: tuple[str, ...], options: Options, outside: Sequence[tuple[str, nn.Module]]
) -> list[Step]:
    """The steps that fold these adapters into every layer among the model's `outside_adapters` that has them and has none merged.

    Everything is checked that can be without the merged values, and the model is only read. A reversible step checks
    the values as it writes them, since the steps before it can be taken back, so no two merged weights are in memory at
    once. A permanent step computes them here already, unless their bound proves that they are finite.

    Raises:
        MergeError: a layer cannot be merged, or not with these options.
    """
    if options.dequantize:
        check_replaceable(model)
    index, steps, done = TensorIndex(model, outside), list[Step](), set[AdaptedLayer]()
    layers = [(path, layer) for path, layer in outside if isinstance(layer, AdaptedLayer)]
    may_be_tied = [layer for _, layer in layers if adapts_tied_layers(layer, names)] if index.is_shared else []
    for path, layer in layers:
        here = tuple([name for name in names if name in layer.parts])
        if here and not layer.merged and layer not in done:
            tied = tied_layers(layer, names, may_be_tied)
            steps.append(plan_step(model, path, layer, here, tied, index, options))
            done.update(tied)
    return steps


def plan_step(
    model: nn.Module,
    path: str,
    layer: AdaptedLayer,
    names: tuple[str, ...],
    tied: tuple[AdaptedLayer, ...],
    index: TensorIndex,
    options: Options,
) -> Step:
    """The step for one layer, checked; see `plan_merge`."""
    base, ops = layer.base_layer, layer.ops
    if not ops.can_merge:
        raise MergeError(f"{path}: {type(ops).__name__} cannot write a merged weight into {type(base).__name__}.")
    holders = [(holder, holder.owner) for holder in (layer, *tied)]
    written = [] if ops.is_quantized else _written(layer, names, index)
    dtype = written[0].dtype if written else _dtype_of_replacement(path, layer, model, options.dequantize)
    for holder, owner in holders:
        _check_holder(path, holder, owner, written if holder is layer else written[:1], names, options)
    owners = [owner for _, owner in holders]
    shared = shared_parameters(path, owners, written, index, options.untie)  # none of a quantized layer
    kind: Callable[..., Step] = Replace if ops.is_quantized else Write
    if kind is Write and not options.undoable:
        factors = _proved_finite(layer, names, written[0])
        if factors is not None and _holds(owners[0], written[0]):
            kind = functools.partial(AddInPlace, factors=factors)
    step = kind(
        model=model,
        path=path,
        layer=layer,
        names=names,
        tied=tied,
        shared=shared,
        dtype=dtype,
        undoable=options.undoable,
        reported=options.reported,
    )
    if kind is Write and not options.undoable:
        step.merged()  # raises now what `apply` would raise, since what that writes could not be taken back
    return step


def _check_holder(
    path: str,
    holder: AdaptedLayer,
    owner: nn.Module,
    written: list[Tensor],
    names: tuple[str, ...],
    options: Options,
) -> None:
    """Raise MergeError unless the layer, or one tied to it, can take and keep the merged tensors `written`."""
    if offloads(owner):
        raise MergeError(
            f"{path}: accelerate offloads its weight, so a merged one would be lost at the next call. Load the model "
            "without offloading to merge, or keep the adapter unmerged."
        )
    check_stored(path, holder, owner, written)
    check_order(path, holder, names, permanent=not options.undoable)
    check_by_trial(path, holder, names)
    if not options.undoable:
        check_own_forward(path, holder)


def _dtype_of_replacement(path: str, layer: AdaptedLayer, model: nn.Module, dequantize: bool) -> torch.dtype:
    """The dtype a merged weight is rounded to for the float layer that replaces a quantized one.

    Raises:
        MergeError: `dequantize` is False.
    """
    if not dequantize:
        raise MergeError(
            f"{path}: {type(layer.base_layer).__name__} is quantized, and rounding to its few values would lose most of an update. "
            "Keep the adapter unmerged, or pass dequantize=True for float layers."
        )
    return float_dtype(model)


def _written(layer: AdaptedLayer, names: tuple[str, ...], index: TensorIndex) -> list[Tensor]:
    """The tensors of the base layer that a merge writes: its weight, and its bias unless that stays the same."""
    base, ops = layer.base_layer, layer.ops
    weight, bias = ops.read_weight(base).detach(), ops.read_bias(base)
    if bias is None or not writes_bias(map(layer.adapter, names), bias):
        return [weight]
    if index.also_used_by(bias, layer.owner):  # then it matters, and is worth merging once to tell
        merged = layer.folded(names)[1]
        if merged is not None and torch.equal(merged.to(bias.dtype), bias):
            return [weight]
    return [weight, bias]


@functools.lru_cache(1024)  # asked of every layer, and it takes a twentieth of a merge to find out
def _merges_itself(cls: type[Adapter]) -> bool:
    return cls.overrides("merge", "merge_after")


def writes_bias(adapters: Iterable[Adapter], bias: Tensor) -> bool:
    """Whether merging these adapters may change a bias."""
    merged: Tensor | None = bias
    for adapter in adapters:
        if _merges_itself(type(adapter)):
            return True  # what they make of it takes the merge to tell
        merged = adapter.merge_bias(merged)
    return merged is not bias and not torch.equal(merged, bias)  # type: ignore[arg-type]


def _proved_finite(layer: AdaptedLayer, names: tuple[str, ...], weight: Tensor) -> tuple[Tensor, Tensor] | None:
    """The factors of the whole update, if the merged weight cannot overflow: ``|W + up @ down| <= |W| + r |up| |down|``.

    None if it might, if a value is not finite, or if the update has no such factors; then only the merged weight tells.
    """
    dtype, bound, ups, downs = accumulation_dtype(weight), 0.0, list[Tensor](), list[Tensor]()
    for name in names:
        pair = layer.adapter(name).factors()
        if pair is None:
            return None
        up, down = pair
        if not up.dtype == down.dtype == dtype or not up.device == down.device == weight.device:
            return None
        bound += low_rank_bound(up, down)
        ups.append(up)
        downs.append(down)
    if not bound + largest(weight) <= torch.finfo(weight.dtype).max / 2:  # also if it is NaN
        return None
    if len(ups) > 1:
        up, down = torch.cat(ups, 1), torch.cat(downs)
    return up, down


def _holds(owner: nn.Module, weight: Tensor) -> bool:
    """Whether the canonical weight is a view of the layer's own parameter, so that adding to it changes the layer."""
    address, size = weight.data_ptr(), weight.numel()
    for own in owner._parameters.values():
        if own is not None and own.data_ptr() == address and own.numel() == size and own.dtype == weight.dtype:
            return True
    return False
