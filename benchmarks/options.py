"""What `speed.py` was asked for, and how its parts keep to it."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from timing import MAX_DRIFT, steady_race
from torch import Tensor, nn


@dataclass(frozen=True)
class Options:
    """What `speed.py` was asked for, and how its parts are to keep to it."""

    device: str
    dtype: torch.dtype
    rounds: int | None
    quick: bool
    force: bool
    case: str = ""  # in the name of each case that is wanted

    def rounds_or(self, usual: int) -> int:
        return self.rounds or (1 if self.quick else usual)

    def place(self, module: nn.Module) -> nn.Module:
        return module.to(self.device, self.dtype)

    def race(self, calls: dict[str, Callable[[], Any]], rounds: int, reference: str, **others: Any) -> Any:
        if self.quick:  # the calls have run before, to see that they compute the same
            others["warm_ups"] = 0
        return steady_race(calls, rounds, reference, force=self.force, device=self.device, **others)


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without PEFT's notes on fan_in_fan_out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def refused(case: str) -> None:
    """Say that a case is left out."""
    print(f"{case}: refused, since the time of the reference drifted by more than {MAX_DRIFT:.0%}", flush=True)


@torch.no_grad()
def output(model: nn.Module, x: Tensor) -> Tensor:
    """What a model computes; the logits of a language model."""
    result = model(x)
    return getattr(result, "logits", result)


def hold_against(expected: Tensor, merged: nn.Module, x: Tensor, tolerance: float = 1e-3) -> None:
    """Check that a merge did not change what the model computes; otherwise its time would say nothing."""
    torch.testing.assert_close(output(merged, x), expected, rtol=tolerance, atol=tolerance)
