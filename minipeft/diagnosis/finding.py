"""What a diagnosis says: findings, and the checks that make them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from minipeft.diagnosis.setup import Setup


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Args:
        name: of the check, for programs, such as "adapter-frozen".
        where: the adapter, layer, parameter, batch or optimizer it is about.
        what: what was seen there, with figures.
        why: what comes of it.
        fix: what to do, as code where code does it.
    """

    name: str
    where: str
    what: str
    why: str
    fix: str

    def __str__(self) -> str:
        lines = (f"{self.name}: {self.where}", f"what  {self.what}", f"why   {self.why}", f"fix   {self.fix}")
        return "\n  ".join(lines)

    def to_dict(self) -> dict[str, str]:
        """For JSON."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Seen:
    """What a check has seen: a `Finding` without what is the same for all findings of the check."""

    where: str
    what: str
    fix: str


Look = Callable[[Setup], Iterator[Seen]]


@dataclass(frozen=True)
class Check:
    """A function that looks at a set-up."""

    name: str  # of its findings
    why: str  # of its findings
    look: Look  # yields what it sees; nothing if all is well
    unless: tuple[str, ...] = ()  # names of other findings that explain what this check would see; it is then left out
    stops: bool = False  # with such a finding the batch cannot be run, and is not tried
    needs_trial: bool = False  # it looks at what became of the batch

    def findings(self, setup: Setup) -> Iterator[Finding]:
        """What it finds in this set-up."""
        for seen in self.look(setup):
            yield Finding(self.name, seen.where, seen.what, self.why, seen.fix)


def check(
    name: str, why: str, *, unless: Sequence[str] = (), stops: bool = False, needs_trial: bool = False
) -> Callable[[Look], Check]:
    """Make a `Check` of the decorated function. The checks of a file are made in their order there."""
    return lambda look: Check(name, why, look, tuple(unless), stops, needs_trial)
