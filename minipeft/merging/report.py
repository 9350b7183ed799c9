"""What a merge cost, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from minipeft.kernels.functional import accumulation_dtype


@dataclass(frozen=True)
class MergeReport:
    """How exact a merge was.

    Args:
        relative_error: what rounding to the layer's dtype cost: ``|realised - wanted| / |wanted|`` of each update, in
            Frobenius norms.
        output_error: for each quantized layer that a float layer replaced, the largest difference between the outputs
            of the layer with its adapters and of the merged layer on a random input, as a share of the largest value.
    """

    relative_error: dict[str, float] = field(default_factory=dict)
    output_error: dict[str, float] = field(default_factory=dict)

    @property
    def worst(self) -> float:
        """The largest relative error, 0 if nothing was merged."""
        return max(self.relative_error.values(), default=0.0)

    def __str__(self) -> str:
        where = max(self.relative_error, key=self.relative_error.__getitem__, default="")
        text = f"merged {len(self.relative_error)} layers; rounding changed the update by at most {self.worst:.2g}"
        text += f" of its norm ({where})" if where else ""
        if self.output_error:
            where = max(self.output_error, key=self.output_error.__getitem__)
            text += (
                f"; {len(self.output_error)} of them were dequantized, which changed an output by at most "
                f"{self.output_error[where]:.2g} of the largest ({where})"
            )
        return text


def relative_error(before: Tensor, after: Tensor, wanted: Tensor) -> float:
    """How far the realised update ``after - before`` of a weight is from the wanted one, as a share of its norm."""
    dtype = accumulation_dtype(before)
    norm = float(torch.linalg.vector_norm(wanted))
    realised = after.to(dtype) - before
    error = float(torch.linalg.vector_norm(realised.sub_(wanted.to(dtype))))
    return error / norm if norm > 0 else error
