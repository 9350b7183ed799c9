"""Which parameter of a layer its canonical weight is, and the way back to the shape in which the layer stores it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Shape = torch.Size


@dataclass(frozen=True)
class Layout:
    """One way to store a canonical weight."""

    # Whether a canonical weight of the first shape may be stored so in a parameter of the second
    fits: Callable[[Shape, Shape], bool]
    restore: Callable[[Tensor, Shape], Tensor]  # the values of a parameter of this shape


LAYOUTS: Mapping[str, Layout] = {
    "same": Layout(lambda canonical, own: canonical == own or len(own) != 2, lambda weight, own: weight.reshape(own)),
    "transposed": Layout(lambda canonical, own: canonical[::-1] == own, lambda weight, own: weight.t()),
    "stack, each transposed": Layout(
        lambda canonical, own: len(own) == 3, lambda weight, own: weight.reshape(own[0], own[2], own[1]).mT
    ),
}


@dataclass(frozen=True)
class Stored:
    """How a layer stores its canonical weight (out, in)."""

    name: str  # of the layer's parameter
    layout: str  # a key of `LAYOUTS`

    def from_canonical(self, weight: Tensor, own: Tensor) -> Tensor:
        """A canonical weight in the shape and dtype of the parameter."""
        return LAYOUTS[self.layout].restore(weight, own.shape).to(own.dtype)


def stored_weight(canonical: Tensor, module: nn.Module) -> Stored | None:
    """Find the parameter of a module that a canonical weight is a view of, or else a copy; None if it is neither."""
    own_name = next((name for name, own in module._parameters.items() if own is canonical), None)
    if own_name is not None:  # as of most layers
        return Stored(own_name, "same")
    for is_it in (_is_view, _is_copy):
        for name, own in module._parameters.items():
            if type(own) is not nn.Parameter or own.dtype != canonical.dtype or own.numel() != canonical.numel():
                continue
            for name_of_layout, layout in LAYOUTS.items():
                if layout.fits(canonical.shape, own.shape) and is_it(layout.restore(canonical, own.shape), own):
                    return Stored(name, name_of_layout)
    return None


def _is_view(value: Tensor, own: Tensor) -> bool:
    return value.data_ptr() == own.data_ptr() and value.stride() == own.stride()


def _is_copy(value: Tensor, own: Tensor) -> bool:
    return not own.is_meta and torch.equal(value, own)
