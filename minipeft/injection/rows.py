"""Which adapter each row of a batch uses, while one call of a model runs."""

from __future__ import annotations

import contextlib
import functools
import math
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from minipeft.ecosystem.wrapper_names import named_modules
from minipeft.errors import StateError
from minipeft.kernels.functional import concatenated

BASE = "__base__"  # PEFT's word for a row without an adapter
Selector = slice | Tensor  # which entries of a first dimension
# What some layers are called with in place of the rows, see `Wrapper.called_with`.
MEDIA_OF_BATCH = "the images or sound of the whole batch"  # in a model of text
POSITIONS_FIRST = "positions before rows"  # or tokens of all rows in one dimension


class _Current(threading.local):
    rows: Rows | None = None


CURRENT = _Current()  # of each thread: a server may run several batches on one model


class Rows:
    """The adapter of each row of one call, and what all layers share of it.

    Args:
        model: the adapted model, to name a layer in an error.
        switch: what the layers of that model have in common, see `minipeft.injection.wrapper.Switch`.
        names: an adapter or `BASE` for each row.
        known: every adapter of the model, in an order that does not depend on the rows.
        device: of the inputs.
        times: how often `generate` repeats each row, as for beams; an encoder still sees each row once.
        keeps: whether layers may keep what they compute from their adapters from one pass to the next.
    """

    def __init__(
        self,
        model: nn.Module,
        switch: object,
        names: Sequence[str],
        known: Sequence[str],
        device: torch.device,
        times: int,
        keeps: bool,
    ) -> None:
        self.model, self.switch, self.names = model, switch, tuple(names)
        self.uses = tuple(dict.fromkeys(names))
        self.adapters = tuple(name for name in self.uses if name != BASE)
        self.known = tuple(known)
        # The one thing that a compiled model looks at, so other rows need no other graph.
        self.index = tensor_of([(*known, BASE).index(name) for name in names], device)
        self.times = times
        # Of the model's input now, if that is (rows, length) or (rows, length, features)
        self.length: int | None = None
        self.kept: dict[Any, Any] | None = {} if keeps else None
        # Whether each row has as many images as the others: `rows_of_call` finds out; what is not known is not so.
        self.same_media: Callable[[], bool] = lambda: False
        self._parts: dict[Any, Parts] = {}

    def present(self, here: Collection[str]) -> tuple[str, ...]:
        """The adapters of the rows that are among these."""
        return tuple([name for name in self.adapters if name in here])

    def common(self, here: Collection[str]) -> str | None:
        """The adapter that all rows use of these, or `BASE`; None if the rows differ."""
        used = {name if name in here else BASE for name in self.uses} or {BASE}
        return used.pop() if len(used) == 1 else None

    def repeats(self, layer: Any, x: Tensor) -> int:
        """How many entries of a layer's first input dimension belong to each row, side by side; raises StateError if that is unclear."""
        size, count, is_float = x.shape[0] if x.ndim else 0, len(self.names), x.is_floating_point()
        is_rows = size in (count, count * self.times)
        is_flat = x.ndim == (2 if is_float else 1)  # features, or indices
        called_with = layer.called_with
        if (
            called_with == MEDIA_OF_BATCH and is_float and size and size % count == 0
        ):  # indices may be those of positions
            if not torch.compiler.is_compiling() and self.same_media():
                return size // count
        if called_with == POSITIONS_FIRST and (not is_rows or (is_flat and self.length == 1)):
            called_with = None  # its shape says whether these are tokens of all rows
        if called_with is not None:
            self.refuse(layer, f"is called with {called_with}, not with rows of the batch")
        if is_rows:
            return size // count
        if is_flat and self.length and size in (count * self.length, count * self.times * self.length):
            return size // count  # tokens of all rows in one dimension
        self.refuse(layer, f"got an input of shape {tuple(x.shape)}, whose first dimension is not the {count} rows")

    def refuse(self, layer: nn.Module, why: str) -> NoReturn:
        """Raise StateError, since different rows cannot use different adapters in a layer."""
        path = _path_in(self.model, layer)
        raise StateError(
            f"adapter_names: {path} {why}, so it cannot use another adapter for each row. Give all rows the same name, or "
            "adapters that leave out this module."
        )

    def parts(self, present: tuple[str, ...], repeats: int, device: torch.device) -> Parts:
        """How a layer with these adapters divides its input; computed once for all layers alike."""
        key = present, repeats, device
        if key not in self._parts:
            names = [name if name in present else None for name in self.names for _ in range(repeats)]
            self._parts[key] = Parts.of(names, device)
        return self._parts[key]


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _path_in(model: nn.Module, layer: nn.Module) -> str:
    return next((name for name, module in named_modules(model) if module is layer), type(layer).__name__)


@dataclass(frozen=True)
class Parts:
    """A first dimension divided by adapter."""

    groups: tuple[tuple[str | None, Selector], ...]  # (name, or None for the base; its entries)
    back: Tensor | None  # where each entry is after the groups are joined; None: in its place already
    blocks: tuple[str | None, ...]  # the name of each run of `size` entries; all runs are of one size
    size: int

    @classmethod
    def of(cls, names: Sequence[str | None], device: torch.device) -> Parts:
        """The parts of entries with these names."""
        places: dict[str | None, list[int]] = {}
        for place, name in enumerate(names):
            places.setdefault(name, []).append(place)
        size = functools.reduce(math.gcd, [len(list(run)) for _, run in groupby(names)])
        order = tensor_of([place for group in places.values() for place in group], device)
        sorted_already = len(list(groupby(names))) == len(places)
        groups = tuple((name, _selector(group, device)) for name, group in places.items())
        return cls(groups, None if sorted_already else order.argsort(), tuple(names[::size]), size)

    def joined(self, pieces: Sequence[Tensor]) -> Tensor:
        """One tensor from a piece for each group."""
        together = concatenated(pieces)
        return together if self.back is None else together.index_select(0, self.back)


def select(x: Tensor, selector: Selector) -> Tensor:
    """These entries of the first dimension of x."""
    return x[selector] if isinstance(selector, slice) else x.index_select(0, selector)


def choose(which: Tensor, x: Tensor, others: Tensor | float = 0) -> Tensor:
    """Entries of x where `which` is True, one value each, else those of `others`.

    With 0 a NaN in another entry gives neither that nor an adapter a gradient.
    """
    return torch.where(which.view(-1, *(1 for _ in x.shape[1:])), x, others)


def _selector(places: list[int], device: torch.device) -> Selector:
    first, last = places[0], places[-1]
    return slice(first, last + 1) if last - first + 1 == len(places) else tensor_of(places, device)


def tensor_of(values: Sequence[Any], device: torch.device) -> Tensor:
    """A tensor of these numbers. A GPU is not waited for: what it copies is set aside before the call returns."""
    return torch.tensor(values, device="cpu").to(device, non_blocking=True)


def rows_now(switch: object) -> Rows | None:
    """The rows of the call that runs in this thread, if it is one of the model with this switch."""
    rows = CURRENT.rows
    return rows if rows is not None and rows.switch is switch else None


@contextlib.contextmanager
def acting(rows: Rows | None) -> Iterator[None]:
    """Within the context the adapters act by these rows, in this thread; None: for all rows alike."""
    before, CURRENT.rows = CURRENT.rows, rows
    try:
        yield
    finally:
        CURRENT.rows = before


def in_backward() -> bool:
    """Whether autograd runs in this thread."""
    return torch._C._current_graph_task_id() != -1
