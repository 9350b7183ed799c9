"""Bringing a merged weight back bit for bit, mostly without a second copy of it.

With W' = round(W + D), the value round(W' - D) is W itself but for a few elements. So a merge keeps those few, the
adapters that make D, and sums of W's bits, to prove that the result is W. If the merge is not a sum, or the update is so
large that many elements differ, it keeps a copy of W instead.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from minipeft.ecosystem.transformers_model import mark_tied
from minipeft.errors import MergeError
from minipeft.injection.adapted_layer import AdaptedLayer
from minipeft.injection.modules_to_save import hooks_of_others
from minipeft.kernels.functional import accumulation_dtype, is_column_major
from minipeft.merging.rounding import rounded
from minipeft.methods.base import Adapter

BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
FEW = 1 / 16  # of the elements; more of them take as much memory as a copy


@dataclass
class Original:
    """What brings one weight W back from the merged W'; see `original_of`."""

    by_columns: bool  # whether W lies in memory column by column; then all else here is of its transpose
    merged_sums: Tensor  # of the bits of W', to notice that it was written since
    copy: Tensor | None = None  # of W; without it, what follows
    sums: Tensor | None = None  # of the bits of W
    adapters: tuple[Adapter, ...] = ()  # which make D
    positions: Tensor | None = None  # in memory, of the elements that round(W' - D) misses
    values: Tensor | None = None  # and their values
    threads: int = 1  # that D was computed with: another split of the product may round differently

    @property
    def is_enough(self) -> bool:
        """Whether W can be brought back; False after a permanent merge that is not a sum."""
        return self.copy is not None or self.values is not None

    def was_merged_into(self, now: Tensor) -> bool:
        """Whether a weight is, bit for bit, W'."""
        return _same_sums(self._in_order(now), self.merged_sums)

    def weight(self, now: Tensor) -> Tensor | None:
        """W on the device of `now`, which is W'; None if it cannot be reproduced exactly."""
        if self.copy is not None:
            return self.copy.to(now.device)
        if self.positions is None or self.values is None or self.sums is None:
            return None
        update = self._in_order(_with_threads(self.threads, self.adapters, now).to(now.device))
        original = _subtracted(self._in_order(now), update)
        original.view(-1)[self.positions.to(now.device)] = self.values.to(now.device)
        return self._in_order(original) if _same_sums(original, self.sums) else None

    def _in_order(self, weight: Tensor) -> Tensor:
        return weight.t() if self.by_columns else weight


def original_of(
    weight: Tensor, merged: Tensor, update: Tensor | None, adapters: tuple[Adapter, ...], *, may_copy: bool
) -> Original:
    """Record what brings `weight` back from `merged`.

    Args:
        weight: W, shape (out, in).
        merged: W', rounded to the dtype of W.
        update: D, if ``W' = round(W + D)``.
        adapters: which make D.
        may_copy: keep a copy if nothing smaller will do. False: then only what recognises W'.
    """
    own = weight.t() if is_column_major(weight) else weight
    if own is not weight:
        merged, update = merged.t(), None if update is None else update.t()
    original = Original(own is not weight, _bit_sums(merged))
    if update is not None:
        differs = _bits(_subtracted(merged, update)) != _bits(own)
        if int(differs.count_nonzero()) <= FEW * own.numel():
            original.positions = differs.flatten().nonzero().squeeze(1)
            original.values = own.contiguous().view(-1)[original.positions]
            original.sums, original.threads = _bit_sums(own), torch.get_num_threads()
            original.adapters = tuple(map(_frozen_copy, adapters))
            return original
    if may_copy:
        original.copy = weight.clone()
    return original


@dataclass
class Undo:
    """What brings one layer back to before its merge."""

    base_layer: nn.Module
    bias: Tensor | None = None  # a copy of the layer's own
    original: Original | None = None  # None: the weight of `base_layer` was not written
    stand_in: Tensor | None = None  # `sums_of` the layer that replaced it, to notice that it was written since
    untied: dict[str, nn.Parameter] = field(default_factory=dict)  # the shared parameters, to put back
    retie: bool = False  # the model's config said that they are tied

    def check(self, path: str, layer: AdaptedLayer) -> Tensor | None:
        """The canonical weight to restore, or None if the base layer still has it.

        Raises MergeError if the merged weight was written or converted since the merge.
        """
        weight = None
        if self.original is not None:
            now = layer.ops.read_weight(self.base_layer).detach()
            weight = self.original.weight(now) if self.original.was_merged_into(now) else None
            is_lost = weight is None
        else:
            is_lost = self.stand_in is not None and not torch.equal(sums_of(layer.base_layer), self.stand_in)
        if is_lost:
            raise MergeError(
                f"{path}: the merged weight was written or converted after the merge, so it cannot be undone exactly."
            )
        return weight

    def restore(self, model: nn.Module, layer: AdaptedLayer, weight: Tensor | None) -> None:
        """Give a layer back its base layer, the weight that `check` returned, its bias and its ties."""
        for name, parameter in self.untied.items():
            setattr(self.base_layer, name, parameter)
        if self.retie:
            mark_tied(model)
        if layer.base_layer is self.base_layer and (weight is not None or self.bias is not None):
            own = layer.ops.read_weight(self.base_layer).detach() if weight is None else weight
            layer.ops.write_weight(self.base_layer, own, self.bias)
        if layer.base_layer is not self.base_layer:
            _follow(self.base_layer, layer.base_layer)
        layer.put_base(self.base_layer)
        layer.note_merged(())


def _follow(layer: nn.Module, stand_in: nn.Module) -> None:
    """Do to a layer what was done to the model while another one stood in for it: set its mode, and move it."""
    layer.train(stand_in.training)
    device = next(stand_in.parameters()).device
    if any(tensor.device != device for tensor in (*layer.parameters(), *layer.buffers())):
        layer.to(device)


def sums_of(layer: nn.Module) -> Tensor:
    """Sums of the bits of a float layer's parameters, on the CPU."""
    return torch.cat([_bit_sums(p.detach().reshape(len(p), -1)).cpu() for p in layer.parameters()])


def _frozen_copy(adapter: Adapter) -> Adapter:
    """A copy that later training does not change; buffers do not train, and are shared."""
    shared = {id(buffer): buffer for buffer in adapter.buffers()} | hooks_of_others(adapter)
    return copy.deepcopy(adapter, shared).requires_grad_(False)


def total_delta(adapters: tuple[Adapter, ...], weight: Tensor) -> Tensor | None:
    """The dense update (out, in) of several adapters together, or None if one of them does not add to the weight."""
    total: Tensor | None = None
    for adapter in adapters:
        update = adapter.delta(weight)
        if update is None:
            return None
        total = update if total is None else total + update
    return total


def _with_threads(threads: int, adapters: tuple[Adapter, ...], weight: Tensor) -> Tensor:
    current = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        update = total_delta(adapters, weight)
    finally:
        torch.set_num_threads(current)
    assert update is not None
    return update


def _subtracted(merged: Tensor, update: Tensor) -> Tensor:
    dtype = accumulation_dtype(merged)
    return rounded(merged.to(dtype) - update.to(dtype), merged.dtype).contiguous()


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(BITS[tensor.element_size()])


def _bit_sums(weight: Tensor) -> Tensor:
    """The element size, and the sums of the bit patterns along each row and column: integers modulo 2**64.

    Eight bytes make one integer if a row can be cut so, which takes a tenth of the time of widening each element to one.
    """
    (rows, columns), size = weight.shape, weight.element_size()
    flat = weight.contiguous().flatten()
    if columns * size % 8:
        bits = _bits(flat).view(rows, columns)
    else:
        bits = (flat.clone() if flat.storage_offset() * size % 8 else flat).view(torch.int64)
        bits = bits.view(rows, columns * size // 8)
    own = torch.tensor([size], device=weight.device)
    return torch.cat([own, bits.sum(0, dtype=torch.int64), bits.sum(1, dtype=torch.int64)])


def _same_sums(weight: Tensor, sums: Tensor) -> bool:
    return torch.equal(_bit_sums(weight).cpu(), sums.cpu())
