"""A law: something that is true of every right solution, and what to say of one that breaks it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

Look = Callable[[SimpleNamespace], None]


class Broken(Exception):
    """A solution breaks a law; the message says how, to the learner."""


class Result(NamedTuple):
    """What came of one law: its promise, and how it is broken or "" if it is kept."""

    promise: str
    broken: str


@dataclass
class Laws:
    """The laws of one exercise, in order."""

    independent: bool = False  # all are looked at; otherwise the first broken one ends it, since it explains the others
    laws: list[tuple[str, Look]] = field(default_factory=list)

    def law(self, promise: str) -> Callable[[Look], Look]:
        """Register the decorated function, which gets the names of the learner's file and raises `Broken`."""

        def register(look: Look) -> Look:
            self.laws.append((promise, look))
            return look

        return register

    def judge(self, work: SimpleNamespace) -> Iterator[Result]:
        """Look at the learner's work; what its own code raises passes through."""
        for promise, look in self.laws:
            try:
                look(work)
            except Broken as broken:
                yield Result(promise, str(broken))
                if not self.independent:
                    return
            else:
                yield Result(promise, "")


def require(holds: object, message: str) -> None:
    """Raise `Broken` with this message unless it holds."""
    if not holds:
        raise Broken(message)


def gap(one: Tensor, other: Tensor) -> float:
    """The largest difference of two arrays."""
    return float((one - other).detach().abs().max())


def same(one: Tensor, other: Tensor, tolerance: float = 1e-4) -> bool:
    """Whether two arrays of one shape are equal, up to rounding of numbers about 1."""
    return one.shape == other.shape and gap(one, other) <= tolerance


def as_number(value: object, what: str) -> float:
    """The number that a learner's function or name gives; raises Broken if it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Broken(f"{what} is {value!r:.60}, not a number.")
    return float(value)
