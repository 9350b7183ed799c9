"""Which parameter of a layer its canonical weight is, and the way back to the shape in which the layer stores it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Stored:
    """How a layer stores its canonical weight (out, in)."""

    name: str  # of the layer's parameter
    layout: str  # one of those that `_layouts` names

    def from_canonical(self, weight: Tensor, own: Tensor) -> Tensor:
        """A canonical weight in the shape and dtype of the parameter."""
        return next(value for layout, value in _layouts(weight, own) if layout == self.layout).to(own.dtype)


def _layouts(weight: Tensor, own: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A canonical weight in each way in which this parameter may store it, by name."""
    if weight.shape == own.shape or own.ndim != 2:
        yield "same", weight.reshape(own.shape)
    if weight.shape[::-1] == own.shape:
        yield "transposed", weight.t()
    if own.ndim == 3:
        yield "stack, each transposed", weight.reshape(own.shape[0], own.shape[2], own.shape[1]).mT


def stored_weight(canonical: Tensor, module: nn.Module) -> Stored | None:
    """Find the parameter of a module that a canonical weight is a view of, or else a copy; None if it is neither."""
    own_name = next((name for name, own in module._parameters.items() if own is canonical), None)
    if own_name is not None:  # as of most layers
        return Stored(own_name, "same")
    for is_it in (_is_view, _is_copy):
        for name, own in module._parameters.items():
            if type(own) is nn.Parameter and own.dtype == canonical.dtype and own.numel() == canonical.numel():
                for layout, value in _layouts(canonical, own):
                    if is_it(value, own):
                        return Stored(name, layout)
    return None


def _is_view(value: Tensor, own: Tensor) -> bool:
    return value.data_ptr() == own.data_ptr() and value.stride() == own.stride()


def _is_copy(value: Tensor, own: Tensor) -> bool:
    return not own.is_meta and torch.equal(value, own)
