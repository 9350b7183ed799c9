"""What a combination of adapters cost, layer by layer."""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass(frozen=True)
class CombineReport:
    """How far a combined adapter is from the weighted sum of the updates that it was made of.

    Args:
        combination_type: how they were combined.
        rank: of the combined adapter.
        norms: for each layer ``|sum|``, the Frobenius norm of the weighted sum.
        distances: for each layer ``|combined - sum|``, rounding to the adapter's dtype included.
    """

    combination_type: str
    rank: int
    norms: dict[str, float] = field(default_factory=dict)
    distances: dict[str, float] = field(default_factory=dict)

    @property
    def relative_error(self) -> dict[str, float]:
        """For each layer ``|combined - sum| / |sum|``."""
        return {path: _ratio(distance, self.norms[path]) for path, distance in self.distances.items()}

    @property
    def total(self) -> float:
        """``|combined - sum| / |sum|`` over all layers as one matrix, 0 if all is exact."""
        return _ratio(math.hypot(*self.distances.values()), math.hypot(*self.norms.values()))

    @property
    def worst(self) -> float:
        """The largest relative error of a layer."""
        return max(self.relative_error.values(), default=0.0)

    def __str__(self) -> str:
        errors = self.relative_error
        where = max(errors, key=errors.__getitem__, default="")
        text = f"{self.combination_type}: {len(errors)} layers combined at rank {self.rank}; the update is "
        return f"{text}{self.total:.2g} of its norm from the weighted sum, at most {self.worst:.2g} ({where})"


def _ratio(distance: float, norm: float) -> float:
    return distance / norm if norm > 0 else distance
