"""The steps of a merge, one per layer: three ways to fold adapters into a base weight, and back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from minipeft.ecosystem.transformers_model import mark_as_loaded, mark_untied
from minipeft.errors import MergeError, shown
from minipeft.injection.adapted_layer import AdaptedLayer
from minipeft.kernels.functional import accumulation_dtype, is_finite, low_rank_product
from minipeft.merging.report import relative_error
from minipeft.merging.rounding import add_product, rounded
from minipeft.merging.trial import output_error
from minipeft.merging.unmerge import Undo, original_of, sums_of, total_delta


@dataclass
class Step(ABC):
    """One layer's part in a merge. Made by `minipeft.merging.plan`, which has checked it; nothing is written yet."""

    model: nn.Module
    path: str  # name of the layer
    layer: AdaptedLayer
    names: tuple[str, ...]  # of the adapters, in order
    tied: tuple[AdaptedLayer, ...]  # layers that share the weight and these adapters, so they are merged along
    shared: dict[str, nn.Parameter]  # parameters that others use too, by name; the layer gets its own copies
    dtype: torch.dtype  # to round the merged weight to
    undoable: bool  # keep what it takes to unmerge
    reported: bool  # measure what rounding costs
    relative_error: float | None = field(default=None, init=False)
    output_error: float | None = field(default=None, init=False)
    undo: Undo = field(init=False)

    def __post_init__(self) -> None:
        bias = self.layer.ops.read_bias(self.layer.base_layer)
        kept = None if bias is None else bias.detach().clone()
        self.undo = Undo(self.layer.base_layer, kept, untied=self.shared)

    def apply(self) -> None:
        """Write the merged weight and mark the layer as merged.

        Raises:
            MergeError: a merged value is not finite; then nothing was written.
        """
        for name, parameter in self.shared.items():
            own = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
            setattr(self.layer.base_layer, name, own)
        if self.shared:
            self.undo.retie = mark_untied(self.model)
        self.write()

    @abstractmethod
    def write(self) -> None:
        """Write the merged weight and `mark`."""

    @abstractmethod
    def take_back(self) -> None:
        """Undo what was done of `apply`, also if that was interrupted."""

    def mark(self) -> None:
        """Mark the layer, and those tied to it, as merged."""
        self.layer.note_merged(self.names, self.undo if self.undoable else None)
        for layer in self.tied:
            layer.note_merged(self.names, Undo(layer.base_layer) if self.undoable else None)

    def unmark(self) -> None:
        """Mark the layers tied to this one as not merged; `Undo.restore` does it for the layer itself."""
        for layer in self.tied:
            layer.note_merged(())

    def merged(self) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
        """The merged weight and bias, rounded, the update if it is a sum, and the wanted change.

        Raises MergeError if a merged value is not finite.
        """
        base, ops = self.layer.base_layer, self.layer.ops
        adapters = tuple(map(self.layer.adapter, self.names))
        weight, bias = ops.read_weight(base).detach(), ops.read_bias(base)
        wide = weight.to(accumulation_dtype(weight))
        update = total_delta(adapters, weight)
        if update is None or any(adapter.overrides("merge") for adapter in adapters):
            exact, exact_bias = self.layer.folded(self.names)
        else:
            exact, exact_bias = wide + update, None if bias is None else bias.detach().to(wide.dtype)
            for adapter in adapters:
                exact_bias = adapter.merge_bias(exact_bias)
        new = rounded(exact, self.dtype)
        new_bias = exact_bias if bias is None or exact_bias is None else rounded(exact_bias, bias.dtype)
        for what, tensor in (("weight", new), ("bias", new_bias)):
            if tensor is not None and not is_finite(tensor):
                raise MergeError(
                    f"{self.path}: the merged {what} is not finite in {tensor.dtype} (adapter {shown(self.names)}). "
                    "Check the adapter for NaN, or merge in a wider dtype."
                )
        return new, new_bias, update, exact - wide if update is None else update


@dataclass
class AddInPlace(Step):
    """A permanent merge by ``weight += up @ down``, with factors proved to keep every value finite.

    No array of the weight's size is made, so there is nothing to take it back with.
    """

    factors: tuple[Tensor, Tensor]

    def __post_init__(self) -> None:
        self.undo = Undo(self.layer.base_layer, untied=self.shared)  # the bias stays as it is

    def write(self) -> None:
        base, ops = self.layer.base_layer, self.layer.ops
        weight = ops.read_weight(base).detach()
        before = weight.clone() if self.reported else None
        add_product(weight, *self.factors)
        self.mark()
        # For a layer that does more than storing its weight.
        self.layer.put_base(ops.write_weight(base, weight, ops.read_bias(base)))
        if before is not None:  # last, since memory may not suffice for it
            self.relative_error = relative_error(before, weight, low_rank_product(*self.factors))

    def take_back(self) -> None:
        if not self.layer.merged:
            self.undo.restore(self.model, self.layer, None)


@dataclass
class Write(Step):
    """A merge that writes the merged weight into the layer; some layers return a replacement that holds it."""

    def write(self) -> None:
        base, ops, undo = self.layer.base_layer, self.layer.ops, self.undo
        weight = ops.read_weight(base).detach()
        new, bias, update, change = self.merged()
        if self.reported:
            self.relative_error = relative_error(weight, new, change)
        untied = {self.layer.owner._parameters[name].data_ptr() for name in self.shared}  # type: ignore[union-attr]
        if weight.data_ptr() not in untied:  # perhaps the bias alone is shared
            adapters = tuple(map(self.layer.adapter, self.names))
            undo.original = original_of(weight, new, update, adapters, may_copy=self.undoable)
        self.layer.put_base(ops.write_weight(base, new, bias))
        if self.layer.base_layer is not base:
            undo.original, undo.stand_in = None, sums_of(self.layer.base_layer.train(base.training))
        self.mark()

    def take_back(self) -> None:
        undo, weight = self.undo, None
        if undo.original is not None and self.layer.base_layer is undo.base_layer:
            now = self.layer.ops.read_weight(undo.base_layer).detach()
            if undo.original.was_merged_into(now):
                if not undo.original.is_enough:  # permanent, and not a sum: it stays merged, and acts as before
                    self.mark()
                    return
                weight = undo.check(self.path, self.layer)
        undo.restore(self.model, self.layer, weight)
        self.unmark()


@dataclass
class Replace(Step):
    """A merge into a float layer that takes the place of a quantized one, which stays as it is."""

    def write(self) -> None:
        base, ops = self.layer.base_layer, self.layer.ops
        new, bias, _, change = self.merged()
        self.relative_error = relative_error(ops.read_weight(base).detach(), new, change)
        replacement = ops.write_weight(base, new, bias)
        mark_as_loaded(replacement, base)
        dtype = next(replacement.parameters()).dtype
        self.output_error = output_error(self.layer, self.names, lambda x: replacement(x.to(dtype)))
        self.layer.put_base(replacement.train(base.training))
        if self.undoable:
            self.undo.stand_in = sums_of(replacement)
        self.mark()

    def take_back(self) -> None:
        self.undo.restore(self.model, self.layer, None)
        self.unmark()
