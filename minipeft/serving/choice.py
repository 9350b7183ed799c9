"""The next token of each row, from its logits and its own random numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def choose(
    logits: Tensor, temperatures: Sequence[float], top_ps: Sequence[float], randoms: Sequence[torch.Generator]
) -> list[int]:
    """A token for each row: the most likely one at temperature 0, else one drawn from the smallest set above ``top_p``.

    No row's token depends on another row (nucleus sampling, arXiv:1904.09751).

    Args:
        logits: shape (rows, vocabulary).
        temperatures, top_ps, randoms: of each row.
    """
    chosen = logits.argmax(-1)
    drawn = [row for row, temperature in enumerate(temperatures) if temperature > 0]
    if drawn:
        chosen[drawn] = _drawn(
            _divided(logits[drawn].double(), [temperatures[row] for row in drawn]),
            torch.tensor([top_ps[row] for row in drawn], dtype=torch.float64, device=logits.device),
            torch.stack([torch.rand((), generator=randoms[row], dtype=torch.float64, device="cpu") for row in drawn]),
        )
    found: list[int] = chosen.tolist()
    return found


def _divided(logits: Tensor, temperatures: Sequence[float]) -> Tensor:
    """Logits by temperatures, which may be as small as a number can be: the largest becomes 0, and no other infinite above it."""
    below = logits - logits.amax(-1, keepdim=True)
    return below / torch.tensor(temperatures, dtype=torch.float64, device=logits.device)[:, None]


def _drawn(logits: Tensor, top_p: Tensor, points: Tensor) -> Tensor:
    """The token at a point from 0 to 1 of each row's distribution, the likeliest first."""
    likely, tokens = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)
    before = likely.cumsum(-1) - likely
    likely = likely.where(before < top_p[:, None], 0)
    bounds = likely.cumsum(-1)
    # The last bound may be a little below or above 1, so points are scaled by it.
    places = torch.searchsorted(bounds, points.to(bounds.device)[:, None] * bounds[:, -1:], right=True)
    last = likely.count_nonzero(-1)[:, None] - 1
    return tokens.gather(-1, places.minimum(last)).squeeze(-1)
