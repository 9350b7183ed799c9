"""``W + s B A`` as one tensor, where a module does more with its parameter than to multiply by it; said if that is large."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from minipeft.kernels.low_rank_sum import LowRankSum

SAID_FROM = 2**26  # bytes kept for the backward pass


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # a compiler may call it while it traces
def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=3)


@dataclass(frozen=True)
class Origin:
    """The parameter that a weight comes from."""

    name: str  # for messages
    size: int  # in bytes

    def say_formed(self, why: str) -> None:
        """Warn that autograd keeps the adapted parameter, if it is large."""
        if self.size >= SAID_FROM:
            _warn(
                f"{self.name}: {why}, so W + BA is formed at each call and kept for the backward pass, "
                f"{self.size / 2**20:.0f} MiB. Gradient checkpointing forms it again instead."
            )


def formed(parts: LowRankSum, picks: Tensor | None, origin: Origin, learns: bool) -> Tensor:
    """The sum, or the matrices of it with the indices `picks`, whatever autocast says; `learns`: for a backward pass."""
    if learns:
        origin.say_formed("its module does more with it than to multiply by it")
    with torch.autocast(parts.own.device.type, enabled=False):
        return (parts if picks is None else parts.picked(picks)).formed()
