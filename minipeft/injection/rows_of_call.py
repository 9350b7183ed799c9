"""From ``adapter_names`` to the rows of a call: what is checked, and what runs meanwhile."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from minipeft.ecosystem.transformers_model import main_input_name, same_media_in_rows
from minipeft.errors import ConfigError, StateError, hint, shown, told
from minipeft.injection.rows import BASE, Rows, acting
from minipeft.injection.state import AdapterState, state_of
from minipeft.kernels.functional import tensors_in


@contextlib.contextmanager
def rows_acting(model: nn.Module, rows: Rows) -> Iterator[None]:
    """Within the context these rows act in this thread, and no adapter of theirs can change."""
    state = state_of(model)
    switch = state.switch
    with switch.changing:
        check_usable(state, rows.uses)  # again, if it had to wait
        switch.running.append(rows.adapters)
    try:
        with acting(rows):
            yield
    finally:
        switch.running.remove(rows.adapters)


def names_of_rows(adapter_names: object) -> Sequence[str]:
    """A list of names; raises ConfigError if it is anything else."""
    if not isinstance(adapter_names, list | tuple) or not all(isinstance(name, str) for name in adapter_names):
        raise ConfigError(
            f"adapter_names must be a list with a name for each row of the batch, such as ['a', 'b', '{BASE}'], "
            f"not {told(adapter_names)}."
        )
    return adapter_names


def check_usable(state: AdapterState, names: Iterable[str]) -> None:
    """Raise StateError if one of these adapters of rows is unknown, or one of the model is merged."""
    known = (*state.configs, BASE)
    for name in names:
        if name not in known:
            raise StateError(f"adapter_names: no adapter {name!r:.100}{hint(name, known)}; there are: {shown(known)}.")
    if state.merged:
        raise StateError(
            f"adapter_names: {shown(state.merged)} is merged into the base, for all rows alike; call unmerge_adapter() first."
        )


@torch.compiler.disable  # type: ignore[untyped-decorator]
def rows_of_call(
    model: nn.Module,
    adapter_names: object,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    times: int = 1,
    keeps: bool = False,
) -> Rows:
    """What each row of a call's batch uses: an adapter, or ``"__base__"`` for none. For `times` and `keeps` see `Rows`.

    Raises:
        ConfigError: it is not a list of names, or not one for each row.
        StateError: a name is unknown, an adapter is merged, or would not train though it is to.
    """
    state = state_of(model)
    names = names_of_rows(adapter_names)
    check_usable(state, dict.fromkeys(names))
    given = main_input(model, args, kwargs)
    count = 1 if given is None else len(given)
    if len(names) != count:
        raise ConfigError(f"adapter_names has {len(names)} names, and the batch {count} rows; give one for each row.")
    switch, learning = state.switch, state.switch.learning
    asleep = [name for name in dict.fromkeys(names) if name in switch.trainable and name not in learning]
    if asleep and model.training and torch.is_grad_enabled():
        raise StateError(
            f"adapter_names: {shown(asleep)} would not learn, since only active adapters do. Call "
            "train_adapters([...]) with all that are to learn, before the optimizer is made; or use torch.no_grad()."
        )
    device = next((p.device for p in model.parameters()), torch.device("cpu")) if given is None else given.device
    rows = Rows(model, switch, names, tuple(state.configs), device, times, keeps)
    rows.same_media = functools.cache(functools.partial(same_media_in_rows, model, given, kwargs))
    return rows


def note_length(model: nn.Module, rows: Rows, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Remember how many tokens each row of this pass has, if its input says so: an image does not."""
    given = main_input(model, args, kwargs)
    rows.length = given.shape[1] if given is not None and given.ndim in (2, 3) else None


def main_input(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The tensor whose first dimension is the rows of the batch; None if there is none."""
    for name in (main_input_name(model), "inputs_embeds", "input_ids"):
        if isinstance(found := kwargs.get(name), Tensor) and found.ndim:
            return found
    return next((tensor for tensor in tensors_in((args, kwargs)) if tensor.ndim), None)
