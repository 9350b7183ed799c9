"""Which parameter of a layer its canonical weight is a view of, and the way back."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class Stored:
    """How a layer stores its canonical weight (out, in).

    Args:
        name: of the layer's parameter.
        layout: "same", "transposed" or "reshaped".
    """

    name: str
    layout: str

    def from_canonical(self, weight: Tensor, own: Tensor) -> Tensor:
        """A canonical weight in the shape and dtype of the parameter."""
        if self.layout == "transposed":
            weight = weight.t()
        return weight.reshape(own.shape).to(own.dtype)


def stored_weight(canonical: Tensor, module: nn.Module) -> Stored | None:
    """Which parameter of a module a canonical weight is a view of; None if it was computed."""
    for name, own in module._parameters.items():
        if own is None or type(own) is not nn.Parameter or own.dtype != canonical.dtype:
            continue
        if own.numel() != canonical.numel() or own.data_ptr() != canonical.data_ptr():
            continue
        if canonical.shape == own.shape and canonical.stride() == own.stride():
            return Stored(name, "same")
        if canonical.shape[::-1] == own.shape and canonical.stride()[::-1] == own.stride():
            return Stored(name, "transposed")
        if canonical.is_contiguous() and own.is_contiguous():
            return Stored(name, "reshaped")
    return None
