"""One view of an adapted model, whether minipeft or PEFT adapted it, with all that a diagnosis looks at."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from minipeft.injection.watch import Pass


def unknown() -> None:
    """The answer of a part that cannot know one: None."""


@dataclass(frozen=True)
class Part:
    """One adapter on one layer, or a module that an adapter trains in full."""

    adapter: str
    layer: str  # name of the layer in the model, without wrappers
    module: nn.Module  # stands in the place of the layer
    base: nn.Module  # the layer itself
    parameters: Mapping[str, nn.Parameter]  # what the adapter holds here, by name
    active: bool  # whether it is among the adapters that act
    merged: bool = False  # whether it is in the base weight
    is_full: bool = False  # a module that is trained in full
    scaling: float | None = None  # factor of the update; None for a method without one
    # LoRA's A (r, in) and B (out, r) on a layer that multiplies by its weight; of experts, side by side
    pair: tuple[Tensor, Tensor] | None = None
    dropout: float = 0.0  # the probability that the adapter drops a feature in training
    drops: bool = False  # whether it does so now, if that is not 0
    # Whether the update is exactly zero; None if the method has no such state
    is_zero: Callable[[], bool | None] = unknown
    # Frobenius norms: of the update, None if it is not a sum with the weight; of the base weight, None if it cannot be read
    update_norm: Callable[[], float | None] = unknown
    weight_norm: Callable[[], float | None] = unknown

    @property
    def trained(self) -> list[nn.Parameter]:
        """Its parameters that require a gradient."""
        return [parameter for parameter in self.parameters.values() if parameter.requires_grad]


@dataclass(frozen=True)
class View:
    """An adapted model; by default one without adapters."""

    model: nn.Module  # what is called
    root: nn.Module  # the model that the adapters are in: the same, or inside a `peft.PeftModel`
    others: Sequence[object] = ()  # objects besides modules that a call may change
    parts: Sequence[Part] = ()  # every adapter on every layer
    configs: Mapping[str, Any] = field(default_factory=dict)  # configuration of each adapter, by name
    active: Sequence[str] = ()  # names of the adapters that act, or would if they were not `disabled`
    disabled: bool = False  # whether adapters are switched off
    base: Mapping[str, nn.Parameter] = field(default_factory=dict)  # the parameters of the base, by name
    # Names of the layers that a forward pass left out, see `minipeft.injection.watch`
    idle: Callable[[Pass], Collection[str]] = lambda seen: ()
    is_peft: bool = False  # whether PEFT adapted it

    @property
    def acting(self) -> list[Part]:
        """The parts of active adapters that are not merged."""
        return [part for part in self.parts if part.active and not part.merged and not self.disabled]

    @property
    def training(self) -> list[Part]:
        """The active parts with parameters that require a gradient."""
        return [part for part in self.parts if part.active and part.trained]

    @property
    def learning(self) -> list[Part]:
        """The parts in training that can get a gradient: those that are not merged."""
        return [part for part in self.training if not part.merged]


def by_adapter(parts: Iterable[Part]) -> Iterable[list[Part]]:
    """These parts, those of each adapter together."""
    found: dict[str, list[Part]] = {}
    for part in parts:
        found.setdefault(part.adapter, []).append(part)
    return found.values()
