"""What a merge cost, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class MergeReport:
    """What a merge cost in exactness.

    Args:
        relative_error: what rounding to the layer's own dtype cost: ``|realised - wanted| / |wanted|`` of each update,
            Frobenius norms.
        output_error: for each quantized layer that a float one replaced, how far the two outputs lie apart at most, on
            a random input, as a share of the largest value: the layer with its adapters, and the merged one.
    """

    relative_error: dict[str, float] = field(default_factory=dict)
    output_error: dict[str, float] = field(default_factory=dict)

    @property
    def worst(self) -> float:
        """The largest of the errors of rounding, 0 where nothing was merged."""
        return max(self.relative_error.values(), default=0.0)

    def __str__(self) -> str:
        where = max(self.relative_error, key=self.relative_error.__getitem__, default="")
        text = f"merged {len(self.relative_error)} layers; rounding changed the update by at most {self.worst:.2g}" + (
            f" of its norm ({where})" if where else ""
        )
        if self.output_error:
            where = max(self.output_error, key=self.output_error.__getitem__)
            text += (
                f"; {len(self.output_error)} of them were dequantized, which changed an output by at most "
                f"{self.output_error[where]:.2g} of the largest ({where})"
            )
        return text


def relative_error(
    weight: Tensor, merged: Tensor, bias: Tensor | None, update: Tensor | None, dtype: torch.dtype
) -> float:
    """How far an update that is rounded to `dtype` with the weight lies from the wanted one, as a share of its norm."""
    wanted = merged - weight if update is None else update.to(merged.dtype)
    norm = float(torch.linalg.vector_norm(wanted))
    realised = merged.to(dtype).to(merged.dtype) - weight
    error = float(torch.linalg.vector_norm(realised.sub_(wanted)))
    return error / norm if norm > 0 else error
