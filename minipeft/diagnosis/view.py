"""What an adapted model of minipeft's and one of PEFT's have in common, as far as a diagnosis looks at it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from minipeft.errors import shown
from minipeft.injection.watch import Pass


@dataclass(frozen=True)
class Part:
    """One adapter on one layer, or a module that an adapter trains in full.

    Args:
        adapter: its name.
        layer: name of the layer in the model, without wrappers.
        module: stands in the place of the layer.
        base: the layer itself.
        parameters: what the adapter holds here, by name.
        active: whether it is among the adapters that act.
        merged: whether it is in the base weight.
        is_full: a module that is trained in full.
        scaling: factor of the update; None for a method without one.
        pair: LoRA's A (r, in) and B (out, r) on a layer that multiplies by its weight; of experts in one parameter, side by
            side.
        dropout: the probability that the adapter drops a feature in training.
        drops: whether it does so now, if that is not 0.
        is_zero: whether the update is exactly zero; None if the method has no such state.
        update_norm: Frobenius norm of the update, None if it is not a sum with the weight.
        weight_norm: Frobenius norm of the base weight, None if it cannot be read.
    """

    adapter: str
    layer: str
    module: nn.Module
    base: nn.Module
    parameters: Mapping[str, nn.Parameter]
    active: bool
    merged: bool
    is_full: bool
    scaling: float | None
    pair: tuple[Tensor, Tensor] | None
    dropout: float
    drops: bool
    is_zero: Callable[[], bool | None]
    update_norm: Callable[[], float | None]
    weight_norm: Callable[[], float | None]

    @property
    def trained(self) -> list[nn.Parameter]:
        """Its parameters that require a gradient."""
        return [parameter for parameter in self.parameters.values() if parameter.requires_grad]


@dataclass(frozen=True)
class View:
    """An adapted model.

    Args:
        model: what is called.
        root: the model that the adapters are in: the same, or inside a `peft.PeftModel`.
        others: objects besides modules that a call may change.
        parts: every adapter on every layer.
        configs: configuration of each adapter, by name.
        active: names of the adapters that act, or would if they were not `disabled`.
        disabled: whether adapters are switched off.
        base: the parameters of the base, by name.
        idle: names of the layers that a forward pass left out, see `minipeft.injection.watch`.
        is_peft: whether PEFT adapted it.
    """

    model: nn.Module
    root: nn.Module
    others: Sequence[object]
    parts: Sequence[Part]
    configs: Mapping[str, Any]
    active: Sequence[str]
    disabled: bool
    base: Mapping[str, nn.Parameter]
    idle: Callable[[Pass], Collection[str]]
    is_peft: bool

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
        """Those of them that can get one, since they are not merged."""
        return [part for part in self.training if not part.merged]


def told_places(parts: Iterable[Part], of: int | None = None) -> str:
    """The layers of some parts, for a message, after the names of their adapters.

    Args:
        parts: at least one.
        of: how many there are in all, if that is to be told.
    """
    found = list(parts)
    names = shown(dict.fromkeys(part.adapter for part in found))
    share = "" if of is None else f" ({len(found)} of {of} layers)"
    return f"adapter {names} on {shown(dict.fromkeys(part.layer for part in found), 3)}{share}"
