"""What adapters a model has, how much of it trains, and what each adapter does: rows for a program, a table when printed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from minipeft.injection.adapted_layer import AdaptedLayer
from minipeft.injection.module_tree import wrappers
from minipeft.injection.state import AdapterState, state_of
from minipeft.injection.wrapper import Wrapper, innermost
from minipeft.layers.bitsandbytes_4bit import number_of_values
from minipeft.layers.uncalled import UncalledOps


@dataclass(frozen=True)
class LayerStatus:
    """One adapter on one layer.

    Args:
        layer: name of the module.
        layer_type: class of the base layer; for a bare parameter with its name.
        adapter: name of the adapter.
        method: "lora" and so on; "full" for a module that is trained in full.
        rank: of the update, for a method that has one.
        scaling: factor of the update now, for a method that has one.
        scale: what `set_scale` has made of it; 1 if nothing.
        active: whether the adapter is among those that `set_adapter` chose.
        merged: whether it is in the base weight.
        trainable: whether its parameters train when it is active; None: some of them.
        dtype: of its parameters, in one word.
        device: of its parameters.
        parameters: how many numbers it holds. A layer tied to another one holds none of its own.
    """

    layer: str
    layer_type: str
    adapter: str
    method: str
    rank: int | None
    scaling: float | None
    scale: float
    active: bool
    merged: bool
    trainable: bool | None
    dtype: str
    device: str
    parameters: int


@dataclass(frozen=True)
class AdapterStatus:
    """One adapter on all its layers, see `LayerStatus`. Values that differ between layers are shown as "2-8" or "a, b"."""

    adapter: str
    method: str
    rank: str
    scale: str
    active: bool
    merged: bool | None
    trainable: bool | None
    dtype: str
    device: str
    layers: int
    parameters: int


class Status(tuple[Any, ...]):
    """Rows of one kind, `AdapterStatus` or `LayerStatus`; a table when printed.

    Args:
        rows: a sequence of them.
        enabled: whether adapters act at all, see `disable_adapter`.
    """

    enabled: bool

    def __new__(cls, rows: Sequence[AdapterStatus | LayerStatus], enabled: bool) -> Status:
        made = super().__new__(cls, rows)
        made.enabled = enabled
        return made

    def __str__(self) -> str:
        names = [field.name for field in dataclasses.fields(self[0])] if self else []
        table = [names, *([_told(getattr(row, name)) for name in names] for row in self)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in table]
        return "\n".join(lines + ([] if self.enabled else ["(no adapter acts now: they are disabled)"]))


def _told(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "-"
    return f"{value:g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) numbers of parameters; shared ones count once, and quantized ones by the values that they stand for."""
    counts = [(number_of_values(parameter), parameter.requires_grad) for parameter in model.parameters()]
    return sum(count for count, trains in counts if trains), sum(count for count, _ in counts)


def layer_status(model: nn.Module) -> Status:
    """A row for each adapter on each layer, in the model's order."""
    state = state_of(model)
    rows = [_row(state, path, w, name) for path, w in wrappers(model) for name in state.configs if name in w.adapters]
    return Status(rows, state.switch.enabled)


def adapter_status(model: nn.Module) -> Status:
    """A row for each adapter."""
    layers = layer_status(model)
    state = state_of(model)
    rows: dict[str, list[LayerStatus]] = {name: [] for name in state.configs}
    for row in layers:
        rows[row.adapter].append(row)
    return Status([_summary(name, own) for name, own in rows.items()], layers.enabled)


def _row(state: AdapterState, path: str, wrapper: Wrapper, name: str) -> LayerStatus:
    part, owner = wrapper.adapters[name], innermost(wrapper)
    follows = isinstance(wrapper, AdaptedLayer) and name in wrapper.tied_adapters
    tensors = list(wrapper.file_tensors(name).values())
    kind, method, rank, scaling, scale, merged = type(owner).__name__, "full", None, None, 1.0, False
    if isinstance(wrapper, AdaptedLayer):
        adapter = wrapper.adapter(name)
        method = type(adapter).config_class.method if adapter.key_prefix else state.configs[name].adapter_method
        rank, scaling, scale, merged = adapter.rank, adapter.scaling, adapter.strength, name in wrapper.merged
        tensors = [] if follows else list(adapter.parameters())
        if isinstance(wrapper.ops, UncalledOps):
            kind = f"{kind}.{wrapper.ops.parameter}"
    held: list[Tensor] = list(part.parameters()) or tensors
    return LayerStatus(
        layer=path,
        layer_type=kind,
        adapter=name,
        method=method,
        rank=rank,
        scaling=scaling,
        scale=scale,
        active=name in state.switch.active,
        merged=merged,
        trainable=_trains(state, wrapper, name),
        dtype=_together(str(t.dtype).removeprefix("torch.") for t in held),
        device=_together(str(t.device) for t in held),
        parameters=sum(tensor.numel() for tensor in tensors),
    )


def _trains(state: AdapterState, wrapper: Wrapper, name: str) -> bool | None:
    if name in state.switch.active:
        train = [parameter.requires_grad for parameter in wrapper.trainable_parameters(name)]
    else:
        train = [place in state.resting[name] for place in wrapper.places(name)]
    return _all_or_some(train)


def _all_or_some(values: Sequence[bool | None]) -> bool | None:
    return None if len(set(values)) > 1 or None in values else bool(values and values[0])


def _together(values: Iterator[str]) -> str:
    return ", ".join(dict.fromkeys(values))


def _summary(name: str, rows: Sequence[LayerStatus]) -> AdapterStatus:
    own = [row for row in rows if row.parameters]  # tied layers say nothing of their own
    return AdapterStatus(
        adapter=name,
        method=_together(row.method for row in own),
        rank=_span([row.rank for row in own]),
        scale=_span([row.scale for row in own]),
        active=any(row.active for row in rows),
        merged=_all_or_some([row.merged for row in own if row.method != "full"]),
        trainable=_all_or_some([row.trainable for row in own]),
        dtype=_together(part for row in own for part in row.dtype.split(", ")),
        device=_together(part for row in own for part in row.device.split(", ")),
        layers=len(rows),
        parameters=sum(row.parameters for row in rows),
    )


def _span(values: Sequence[float | None]) -> str:
    known = sorted({value for value in values if value is not None})
    ends = [f"{value:g}" for value in dict.fromkeys((known[0], known[-1]))] if known else ["-"]
    return "-".join(ends)
