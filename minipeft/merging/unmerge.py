"""Undoing a merge bit for bit, mostly without a second copy of the weights.

With W' = round(W + D), the value round(W' - D) is W itself but for a few elements. So a merge keeps those few, the
factors that make D, and sums of W's bits, to prove that what comes back is W. A method whose merge is no plain sum,
or an update so large that many elements differ, keeps a copy of W instead.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from minipeft.errors import MergeError
from minipeft.injection.adapted_layer import AdaptedLayer
from minipeft.kernels.functional import accumulation_dtype
from minipeft.methods.base import Adapter

BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass
class Undo:
    """All it takes to bring one layer's weight and bias back."""

    base_layer: nn.Module
    bias: Tensor | None
    merged_sums: Tensor | None = None  # of the bits of W', to notice that it was written since
    weight: Tensor | None = None  # a copy of W; without it, the next five
    weight_sums: Tensor | None = None  # of the bits of W
    adapters: tuple[Adapter, ...] = ()
    positions: Tensor | None = None
    values: Tensor | None = None
    threads: int = 1
    untied: dict[str, nn.Parameter] = field(default_factory=dict)  # the shared parameters, to be put back as they are
    retie: bool = False  # whether the model's config said that they are tied
    tied: bool = False  # on the merge into another layer, whose weight this one holds

    @property
    def is_enough(self) -> bool:
        """Whether a written weight can be brought back."""
        return self.weight is not None or self.positions is not None

    def forget(self) -> None:
        """Keep nothing of the weight: the merge went into another layer."""
        self.weight = self.positions = self.values = None
        self.adapters = ()


def remember(
    undo: Undo,
    weight: Tensor,
    rounded: Tensor,
    adapters: tuple[Adapter, ...],
    update: Tensor | None,
    *,
    may_copy: bool = True,
) -> None:
    """Note down what brings `weight` back from `rounded`, the merged one; `update` is None for a merge that is no sum.

    Where that takes a copy of the weight and `may_copy` is False, only what tells the merged weight from others.
    """
    if update is not None:
        differs = _bits(_subtracted(rounded, update)) != _bits(weight)
        if int(differs.sum()) * 16 <= weight.numel():
            undo.positions, undo.values, undo.weight_sums = differs.nonzero(), weight[differs], _bit_sums(weight)
            undo.adapters = tuple(map(_snapshot, adapters))
            undo.threads = torch.get_num_threads()
    if may_copy and undo.positions is None:
        undo.weight = weight.clone()
    undo.merged_sums = _bit_sums(rounded)


def _snapshot(adapter: Adapter) -> Adapter:
    """A frozen copy, which later training leaves alone; buffers do not train, and are shared."""
    return copy.deepcopy(adapter, {id(buffer): buffer for buffer in adapter.buffers()}).requires_grad_(False)


def is_merged(layer: AdaptedLayer, undo: Undo) -> bool:
    """Whether the layer's weight is, bit for bit, the merged one that `remember` saw."""
    return _same_sums(layer.ops.read_weight(layer.base_layer).detach(), undo.merged_sums)


def original_weight(path: str, layer: AdaptedLayer, undo: Undo) -> Tensor | None:
    """The canonical weight as it was before the merge; None where the merge went into another layer or an untied copy.

    Raises:
        MergeError: the merged weight was written or converted in the meantime.
    """
    if undo.base_layer is not layer.base_layer or undo.untied or undo.tied:
        return None
    now = layer.ops.read_weight(layer.base_layer).detach()
    if _same_sums(now, undo.merged_sums):
        if undo.weight is not None:
            return undo.weight.to(now.device)
        assert undo.positions is not None
        assert undo.values is not None
        original = _subtracted(now, _with_threads(undo.threads, undo.adapters, now).to(now.device))
        rows, columns = undo.positions.to(now.device).unbind(1)
        original[rows, columns] = undo.values.to(now.device)
        if _same_sums(original, undo.weight_sums):
            return original
    raise MergeError(
        f"{path}: the merged weight was written or converted after the merge, so it cannot be undone exactly."
    )


def put_back(model: nn.Module, layer: AdaptedLayer, undo: Undo, weight: Tensor | None) -> None:
    """Give a layer its own base, weight (None: that has it still), bias and ties again."""
    for name, parameter in undo.untied.items():
        setattr(undo.base_layer, name, parameter)
    if undo.retie:
        model.config.tie_word_embeddings = True  # type: ignore[union-attr]
    if undo.base_layer is layer.base_layer:
        own = layer.ops.read_weight(undo.base_layer).detach() if weight is None else weight
        layer.ops.write_weight(undo.base_layer, own, undo.bias)
    layer.base_layer, layer.merged, layer.undo = undo.base_layer, (), None


def _with_threads(threads: int, adapters: tuple[Adapter, ...], weight: Tensor) -> Tensor:
    """The update, computed with as many threads as at the merge: another split of the product may round otherwise."""
    current = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        update = total_delta(adapters, weight)
    finally:
        torch.set_num_threads(current)
    assert update is not None
    return update


def total_delta(adapters: tuple[Adapter, ...], weight: Tensor) -> Tensor | None:
    """The dense update of several adapters together, or None where one of them is not additive."""
    total: Tensor | None = None
    for adapter in adapters:
        update = adapter.delta(weight)
        if update is None:
            return None
        total = update if total is None else total + update
    return total


def _subtracted(rounded: Tensor, update: Tensor) -> Tensor:
    dtype = accumulation_dtype(rounded)
    return (rounded.to(dtype) - update.to(dtype)).to(rounded.dtype)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(BITS[tensor.element_size()])


def _bit_sums(weight: Tensor) -> Tensor:
    """The element size, and the sums of the bit patterns along each row and column: exact integers."""
    bits = _bits(weight)
    size = torch.tensor([weight.element_size()], device=weight.device)
    return torch.cat([size, bits.sum(0, dtype=torch.int64), bits.sum(1, dtype=torch.int64)])


def _same_sums(weight: Tensor, sums: Tensor | None) -> bool:
    return sums is not None and torch.equal(_bit_sums(weight).cpu(), sums.cpu())
