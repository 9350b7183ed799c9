"""What a diagnosis looks at, the checks that look at it, and the findings that they make."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from minipeft.diagnosis.trial import Trial, try_batch
from minipeft.diagnosis.view import Part, View
from minipeft.errors import shown


@dataclass
class Setup:
    """See `minipeft.diagnosis.diagnose.diagnose`."""

    view: View  # of the model
    batch: Mapping[str, Any] | None  # what the model is called with
    optimizer: Any  # of the run, possibly in a wrapper of accelerate's
    tokenizer: Any  # that made the batch
    adapter_dir: Path | None  # where an adapter was loaded from

    @cached_property
    def trial(self) -> Trial:
        """What becomes of the batch, which is run when a check first asks."""
        assert self.batch is not None
        return try_batch(self.view, self.batch, must_train=self.is_training)

    @property
    def is_training(self) -> bool:
        """Whether this is a set-up for training, not for use: it has an optimizer, or the model is in training mode."""
        return self.optimizer is not None or self.view.root.training

    @cached_property  # asked for each parameter
    def rates(self) -> dict[int, float]:
        """The learning rate of each parameter in the optimizer, by its id: that of the schedule's peak, if there is one."""
        groups = self.optimizer.param_groups if self.optimizer is not None else ()
        return {id(p): float(group.get("initial_lr", group["lr"])) for group in groups for p in group["params"]}

    @property
    def is_adam(self) -> bool:
        """Whether the optimizer moves each value by about the learning rate, whatever the size of the gradient."""
        return "adam" in type(getattr(self.optimizer, "optimizer", self.optimizer)).__name__.lower()

    @property
    def is_causal(self) -> bool:
        """Whether the model predicts each token from those before it, and shifts the labels itself."""
        can_generate = getattr(self.view.root, "can_generate", None)
        return not self.is_encoder_decoder and callable(can_generate) and bool(can_generate())

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether the model reads one sequence and writes another."""
        return bool(getattr(getattr(self.view.root, "config", None), "is_encoder_decoder", False))

    def tensor(self, name: str) -> Tensor | None:
        """A tensor of the batch."""
        found = None if self.batch is None else self.batch.get(name)
        return found if isinstance(found, Tensor) else None

    def trainable_base(self) -> dict[str, nn.Parameter]:
        """The base's parameters that require a gradient, without the biases that an adapter's ``bias`` option trains."""
        biases = any(getattr(config, "bias", "none") != "none" for config in self.view.configs.values())
        return {
            name: parameter
            for name, parameter in self.view.base.items()
            if parameter.requires_grad and not (biases and name.endswith("bias"))
        }


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


Look = Callable[[Setup], Iterable[Seen]]


def about(parts: Iterable[Part], what: str, fix: str, of: Sequence[Part] | None = None) -> list[Seen]:
    """What was seen of these adapters on these layers, if there are any. `of`: all that could have been among them."""
    found = list(parts)
    names, layers = dict.fromkeys(part.adapter for part in found), dict.fromkeys(part.layer for part in found)
    share = "" if of is None else f" ({len(found)} of {len(of)} layers)"
    return [Seen(f"adapter {shown(names)} on {shown(layers, 3)}{share}", what, fix)] if found else []


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
