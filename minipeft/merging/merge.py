"""Folding adapters into base weights: accumulated in float32, rounded once, checked before anything is written."""

from __future__ import annotations

import copy
import functools
import logging
import operator
import traceback
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minipeft import registry
from minipeft.errors import MergeError, shown
from minipeft.injection.adapted_layer import AdaptedLayer
from minipeft.injection.module_tree import TensorIndex, adapted_layers
from minipeft.kernels.functional import accumulation_dtype, largest, low_rank_additions, low_rank_bound
from minipeft.layers.uncalled import UncalledOps
from minipeft.merging.report import MergeReport, relative_error
from minipeft.merging.tied_weights import adapts_tied_layers, mark_untied, shared_parameters, tied_layers
from minipeft.merging.unmerge import Undo, is_merged, original_weight, put_back, remember, total_delta
from minipeft.quantization.dequantize import check_replaceable, dtype_to_merge_in, output_error

logger = logging.getLogger("minipeft")
_forward = operator.attrgetter("forward")
PROBE_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 5e-2}


@dataclass
class Step:
    """One layer's part in a merge: checked, not yet written."""

    path: str
    layer: AdaptedLayer
    names: tuple[str, ...]
    tied_layers: tuple[AdaptedLayer, ...]  # other layers that hold the same weight, and want the same of it
    undo: Undo
    factors: tuple[Tensor, Tensor] | None  # (up, down) of the whole update, if proved to keep every value finite
    dtype: torch.dtype  # to round the merged weight to


# ------------------------------------------------------------------------------------------------------- merging
@torch.no_grad()
def merge(
    model: nn.Module,
    adapter_names: Iterable[str],
    *,
    untie: bool = False,
    undoable: bool = True,
    dequantize: bool = False,
) -> MergeReport:
    """Fold the named adapters into the base weights of every layer that has them and has none merged.

    All is checked first, and an exception half way, Ctrl-C and a lack of memory too, takes back what was written: every
    weight is bit for bit what it was. There is one exception. A merge for good keeps no copy of the weights, so where
    the merge is no sum, or its update dwarfs the weight, a layer written by then stays merged. It is marked as merged
    and acts as before, and another call does the rest.

    With `dequantize`, a float layer takes the place of a quantized one; the quantized one stays as it is, and comes back
    when the merge is undone.

    Returns:
        What rounding cost; of a merge for good only where a layer was dequantized or the logger "minipeft" is to hear it.

    Raises:
        MergeError: a layer cannot be merged, a value is not finite, a weight is tied elsewhere and `untie` is False, or
            a layer is quantized and `dequantize` is False.
    """
    names, index = tuple(adapter_names), TensorIndex(model)
    if dequantize:
        check_replaceable(model)
    steps, tied_already = [], set[AdaptedLayer]()
    tied = [layer for _, layer in adapted_layers(model) if adapts_tied_layers(layer)]
    for path, layer in adapted_layers(model):
        here = tuple(name for name in names if name in layer.adapters)
        if here and not layer.merged and layer not in tied_already:
            dtype, along = dtype_to_merge_in(path, layer, model, dequantize), tied_layers(layer, names, tied)
            steps.append(_check(path, layer, here, along, index, untie, dtype))
            tied_already.update(along)
    begun: list[Step] = []
    in_place: list[Step] = []
    errors: dict[str, float] = {}
    output_errors: dict[str, float] = {}
    reported = undoable or logger.isEnabledFor(logging.INFO)
    try:
        for step in steps:
            begun.append(step)
            _untie(model, step)
            if not undoable and step.factors is not None and _holds_its_weight(step.layer):
                in_place.append(step)
                if reported:
                    errors[step.path] = relative_error(*_computed(step), step.dtype)
            else:
                quantized = step.layer.ops.is_quantized
                error, output = _write(step, undoable=undoable, reported=reported or quantized)
                errors.update({} if error is None else {step.path: error})
                output_errors.update({} if output is None else {step.path: output})
        _add_in_place(in_place)
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)  # which hold the tensors of the step that found no memory
        if not any(step.layer.merged for step in in_place):  # else it came when all was done
            for step in reversed(begun):
                _take_back(model, step)
        raise
    report = MergeReport(errors, output_errors)
    if errors:
        logger.log(logging.WARNING if output_errors else logging.INFO, "%s", report)
    return report


def merged_names(model: nn.Module) -> tuple[str, ...]:
    """The adapters that are in the weights of at least one layer."""
    return tuple(dict.fromkeys(name for _, layer in adapted_layers(model) for name in layer.merged))


def merged_weight(layer: AdaptedLayer, names: tuple[str, ...]) -> tuple[Tensor, Tensor | None]:
    """Canonical weight and bias with the named adapters folded in, not yet rounded to the layer's dtype."""
    weight, bias = layer.ops.read_weight(layer.base_layer).detach(), layer.ops.read_bias(layer.base_layer)
    dtype = accumulation_dtype(weight)
    weight, bias = weight.to(dtype), None if bias is None else bias.detach().to(dtype)
    base_weight = weight
    for name in names:
        weight, bias = layer.adapter(name).merge_after(weight, bias, base_weight)
    return weight, bias


def _check(
    path: str,
    layer: AdaptedLayer,
    names: tuple[str, ...],
    along: tuple[AdaptedLayer, ...],
    index: TensorIndex,
    untie: bool,
    dtype: torch.dtype,
) -> Step:
    """Whatever can be wrong with one layer's merge; nothing is written."""
    base, ops = layer.base_layer, layer.ops
    if not ops.can_merge:
        raise MergeError(f"{path}: {type(ops).__name__} cannot write a merged weight into {type(base).__name__}.")
    layer.check_separable(path, names)
    weight, bias = ops.read_weight(base).detach().to(dtype), ops.read_bias(base)
    written, factors = [weight], _proved_finite(layer, names, weight)
    if factors is None:
        merged, merged_bias = merged_weight(layer, names)
        rounded_bias = merged_bias if bias is None or merged_bias is None else merged_bias.to(bias.dtype)
        for what, tensor in (("weight", merged.to(weight.dtype)), ("bias", rounded_bias)):
            if tensor is not None and not _all_finite(tensor):
                raise MergeError(
                    f"{path}: the merged {what} is not finite in {weight.dtype} (adapter {shown(names)}). "
                    "Check the adapter for NaN, or merge in a wider dtype."
                )
        if bias is not None and rounded_bias is not None and not torch.equal(bias, rounded_bias):
            written.append(bias)
    kept = None if bias is None else bias.detach().clone()
    owners = [layer.owner, *(tied_layer.owner for tied_layer in along)]
    undo = Undo(base, kept, untied=shared_parameters(path, owners, written, index, untie))
    for holder in (layer, *along):
        _check_own_forward(path, holder, names)
    return Step(path, layer, names, along, undo, factors, dtype)


def _proved_finite(layer: AdaptedLayer, names: tuple[str, ...], weight: Tensor) -> tuple[Tensor, Tensor] | None:
    """The factors of the whole update, if the merged weight cannot overflow: ``|W + up @ down| <= |W| + r |up| |down|``.

    None where that is not so by far, where a value is not finite, and where the update has no such factors; it then
    takes the merged weight itself to tell.
    """
    pairs = [layer.adapter(name).factors() for name in names]
    dtype = accumulation_dtype(weight)
    known = [pair for pair in pairs if pair is not None]
    usable = all(torch.promote_types(x.dtype, dtype) == dtype and x.device == weight.device for p in known for x in p)
    if len(known) < len(pairs) or not usable:
        return None
    bound = largest(weight) + sum(low_rank_bound(up, down) for up, down in known)
    if not bound <= torch.finfo(weight.dtype).max / 2:  # NaN is not
        return None
    up, down = known[0]
    if len(known) > 1:
        up, down = torch.cat([up for up, _ in known], 1), torch.cat([down for _, down in known], 0)
    return up.to(dtype), down.to(dtype)


def _check_own_forward(path: str, layer: AdaptedLayer, names: tuple[str, ...]) -> None:
    """A subclass may use its weight in its own way: try the merge on a copy of such a layer, with a random input."""
    base = layer.base_layer
    registered = next((cls for cls, ops in registry.layer_candidates(type(base)) if ops == layer.ops), type(base))
    if isinstance(layer.ops, UncalledOps) or _forward(type(base)) is _forward(registered):
        return  # a weight that is read is the merged one at every call
    trial = copy.deepcopy(layer).eval()
    trial.switch.active, trial.switch.enabled, trial.merged = names, True, ()
    with torch.random.fork_rng(devices=[]):
        x = layer.ops.example_input(base)
    expected = trial(x)
    weight, bias = merged_weight(trial, names)
    merged = layer.ops.write_weight(trial.base_layer, weight, bias)(x)
    error = float((merged - expected).abs().max() / expected.abs().max().clamp_min(1e-12))
    if not error <= PROBE_TOLERANCE[layer.ops.read_weight(base).dtype]:
        raise MergeError(
            f"{path}: {type(base).__name__} has a forward of its own, and with the merged weight its output is off by {error:.2g}. "
            "Keep the adapter unmerged, or register_layer a LayerOps that knows this layer."
        )


def _all_finite(tensor: Tensor) -> bool:
    # One value that is not finite makes the sum not finite; only a sum that overflows by itself needs the closer look.
    return bool(tensor.sum(dtype=accumulation_dtype(tensor)).isfinite()) or bool(tensor.isfinite().all())


# ------------------------------------------------------------------------------------------------------- writing
def _untie(model: nn.Module, step: Step) -> None:
    base, undo = step.layer.base_layer, step.undo
    for parameter_name, shared in undo.untied.items():
        setattr(base, parameter_name, nn.Parameter(shared.detach().clone(), requires_grad=shared.requires_grad))
    if undo.untied:
        undo.retie = mark_untied(model)


def _holds_its_weight(layer: AdaptedLayer) -> bool:
    """Whether the canonical weight is a view of the layer's own parameter, and stays so when it is written."""
    base, ops = layer.base_layer, layer.ops
    weight = ops.read_weight(base).detach()
    is_own = any(
        own.data_ptr() == weight.data_ptr() and own.numel() == weight.numel() and own.dtype == weight.dtype
        for own in layer.owner.parameters(recurse=False)
    )
    return is_own and ops.write_weight(base, weight, ops.read_bias(base)) is base  # its own values: nothing is copied


def _computed(step: Step) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """One layer's weight, the merged weight and bias not yet rounded, and the update if the merge is a sum."""
    layer = step.layer
    weight, bias = layer.ops.read_weight(layer.base_layer).detach(), layer.ops.read_bias(layer.base_layer)
    update, dtype = total_delta(tuple(map(layer.adapter, step.names)), weight), accumulation_dtype(weight)
    if update is None or step.factors is None:
        return weight, *merged_weight(layer, step.names), update
    return weight, weight.to(dtype) + update, None if bias is None else bias.detach().to(dtype), update


def _write(step: Step, *, undoable: bool, reported: bool) -> tuple[float | None, float | None]:
    """Compute one layer's merged weight and write it; returns what rounding and what dequantizing cost, if that is wanted."""
    layer, undo, output = step.layer, step.undo, None
    weight, merged, bias, update = _computed(step)
    error = relative_error(weight, merged, bias, update, step.dtype) if reported else None
    if not undo.untied and not layer.ops.is_quantized:
        adapters = tuple(map(layer.adapter, step.names))
        remember(undo, weight, merged.to(weight.dtype), adapters, update, may_copy=undoable)
    if layer.ops.is_quantized:
        merged = merged.to(step.dtype)
    written = layer.ops.write_weight(layer.base_layer, merged, bias)
    if layer.ops.is_quantized:
        output = output_error(layer, step.names, written)
    layer.base_layer = written
    if layer.base_layer is not undo.base_layer:
        undo.forget()
    layer.merged, layer.undo = step.names, undo if undoable else None
    _mark_riders(step)
    return error, output


def _mark_riders(step: Step) -> None:
    """The layers that hold the weight too are merged as the step's own layer is, or are not."""
    for tied_layer in step.tied_layers:
        tied_layer.merged = step.layer.merged
        tied_layer.undo = Undo(tied_layer.base_layer, None, tied=True) if step.layer.undo is not None else None


def _add_in_place(steps: list[Step]) -> None:
    """Merge for good by ``weight.addmm_(up, down)``, all layers at once: nothing of a weight's size is made.

    The jobs are run from C code, between which Python handles no Ctrl-C, so either none of them is done or all are.
    """
    jobs: list[functools.partial[Tensor]] = []
    scratch: dict[object, Tensor] = {}
    ends = []
    for step in steps:
        assert step.factors is not None
        weight = step.layer.ops.read_weight(step.layer.base_layer).detach()
        jobs += low_rank_additions(weight, *step.factors, scratch)
        ends.append(len(jobs))
    done: list[Tensor] = []
    try:
        for step in steps:  # beforehand, so that the last thing that happens is the writing
            step.layer.merged, step.layer.undo = step.names, None
            _mark_riders(step)
        done.extend(map(functools.partial.__call__, jobs))
    except BaseException:
        for step, end in zip(steps, ends, strict=True):
            if end > len(done):
                step.layer.merged = ()
                _mark_riders(step)
        raise
    for step in steps:  # a layer that does more than to store its weight does it now
        base, ops = step.layer.base_layer, step.layer.ops
        step.layer.base_layer = ops.write_weight(base, ops.read_weight(base).detach(), ops.read_bias(base))


# ------------------------------------------------------------------------------------------------------- undoing
def _take_back(model: nn.Module, step: Step) -> None:
    """Undo what there is of one layer's merge after an exception half way."""
    layer, undo = step.layer, step.undo
    written = undo.base_layer is layer.base_layer and not undo.untied and is_merged(layer, undo)
    if written and not undo.is_enough:
        layer.merged = step.names
    else:
        put_back(model, layer, undo, original_weight(step.path, layer, undo) if written else None)
    _mark_riders(step)


@torch.no_grad()
def unmerge(model: nn.Module) -> None:
    """Bring back, bit for bit, every weight that `merge` changed.

    Raises:
        MergeError: a weight has been written, or its dtype changed, since the merge; then every weight stays as it is.
    """
    todo = []
    for path, layer in adapted_layers(model):
        if layer.merged:
            if layer.undo is None:
                raise MergeError(f"{path}: this merge was made for good, and cannot be undone.")
            original_weight(path, layer, layer.undo)  # raises here, before any layer has been touched
            todo.append((path, layer))
    for path, layer in todo:
        put_back(model, layer, layer.undo, original_weight(path, layer, layer.undo))
