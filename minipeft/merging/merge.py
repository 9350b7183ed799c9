"""Folding adapters into base weights: accumulated in float32, rounded once, all or nothing. And taking them out again."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn

from minipeft.errors import MergeError
from minipeft.injection.module_tree import adapted_layers, outside_adapters
from minipeft.kernels.full_precision import full_precision
from minipeft.merging.plan import Options, plan_merge
from minipeft.merging.report import MergeReport
from minipeft.merging.steps import AddInPlace, Step
from minipeft.python.interrupts import interrupts_deferred

logger = logging.getLogger("minipeft")
Progress = Callable[[list[Step]], Iterable[Step]]


@torch.no_grad()
@full_precision()
def merge(
    model: nn.Module,
    adapter_names: Iterable[str],
    *,
    untie: bool = False,
    undoable: bool = True,
    dequantize: bool = False,
    progress: Progress = iter,
    outside: Sequence[tuple[str, nn.Module]] | None = None,
) -> MergeReport:
    """Fold the named adapters into the base weights of every layer that has them and has none merged.

    Everything is checked first, and an error or Ctrl-C on the way takes back what was written: every weight is bit for
    bit what it was. A permanent merge keeps no copies, so there is one exception: if it fails in the middle of writing,
    a layer whose weight cannot be brought back stays merged. It is marked as merged and acts as before, and another call
    merges the rest. Ctrl-C waits until all such layers are written.

    Args:
        model: an adapted model.
        adapter_names: in the order in which they act.
        untie: give a weight that is tied elsewhere a copy of its own instead of refusing.
        undoable: keep what `unmerge` needs.
        dequantize: replace quantized layers by float layers until they are unmerged instead of refusing.
        progress: wraps the list of steps, such as a progress bar.
        outside: the model's `outside_adapters`, if they have been found already.

    Returns:
        What rounding cost. For a permanent merge it has only the dequantized layers, unless the logger "minipeft" is at
        level INFO.

    Raises:
        MergeError: a layer cannot be merged, a value is not finite, a weight is tied and `untie` is False, or a layer is
            quantized and `dequantize` is False.
    """
    reported = undoable or logger.isEnabledFor(logging.INFO)
    outside = tuple(outside_adapters(model)) if outside is None else outside
    steps = plan_merge(model, tuple(adapter_names), Options(untie, undoable, dequantize, reported), outside)
    steps.sort(key=lambda step: isinstance(step, AddInPlace))  # last, since they cannot be taken back
    in_place = [step for step in steps if isinstance(step, AddInPlace)]
    begun: list[Step] = []
    try:
        for step in progress(steps[: len(steps) - len(in_place)]):
            begun.append(step)
            step.apply()
        with interrupts_deferred():
            for step in progress(in_place):  # type: ignore[arg-type]
                begun.append(step)
                step.apply()
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)  # they hold the tensors of the step that ran out of memory
        with interrupts_deferred():
            _take_back(begun)
        raise
    return _report(steps)


def _take_back(begun: list[Step]) -> None:
    if any(isinstance(step, AddInPlace) and step.layer.merged for step in begun):
        begun = begun[-1:]  # what is written stays; only the step that failed may be half done
    for step in reversed(begun):
        step.take_back()


def _report(steps: list[Step]) -> MergeReport:
    errors = {step.path: step.relative_error for step in steps if step.relative_error is not None}
    output_errors = {step.path: step.output_error for step in steps if step.output_error is not None}
    report = MergeReport(errors, output_errors)
    if errors:
        logger.log(logging.WARNING if output_errors else logging.INFO, "%s", report)
    return report


def merged_names(model: nn.Module) -> tuple[str, ...]:
    """The adapters that are merged into at least one layer."""
    return tuple(dict.fromkeys(name for _, layer in adapted_layers(model) for name in layer.merged))


@torch.no_grad()
@full_precision()
def unmerge(model: nn.Module) -> None:
    """Bring back, bit for bit, every weight that `merge` changed.

    After Ctrl-C, or without memory for a weight, some layers are brought back and the others stay merged.

    Raises:
        MergeError: a weight was written, or its dtype changed, since the merge; then every weight stays as it is.
    """
    merged = [(path, layer) for path, layer in adapted_layers(model) if layer.merged]
    for path, layer in merged:
        if layer.undo is None:
            raise MergeError(f"{path}: this merge is permanent and cannot be undone.")
        layer.undo.check(path, layer)  # all of them, before any layer is changed
    for path, layer in merged:
        weight = layer.undo.check(path, layer)
        with interrupts_deferred():
            layer.undo.restore(model, layer, weight)
