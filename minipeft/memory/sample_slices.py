"""Recomputing a block on a slice of the batch at a time, so the backward pass needs memory for that slice only."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from minipeft.injection.rows import CURRENT
from minipeft.kernels.transformed import is_transformed

ROWS = "_minipeft_slice_rows"  # in a layer's __dict__: tokens per slice; 0 if its last run showed that it cannot be cut
AS_ON_DEVICE = -1  # instead of a number: as `DEFAULT_ROWS` says for the device, to which the model may be moved later
DEFAULT_ROWS = {"cpu": 1024, "cuda": 8192}  # enough for matrix products to run at full speed
# Arguments of transformers' layers with one row per sample, if their first dimension is the batch size.
BY_SAMPLE = {
    "hidden_states", "attention_mask", "causal_mask", "position_ids", "position_embeddings",
    "encoder_hidden_states", "encoder_attention_mask",
}  # fmt: skip
Call = Callable[..., Any]


class NotBySample(Exception):
    """An argument that is divided by sample in a way that is not known."""


def run(layer: nn.Module, forward: Call, args: Sequence[Any], checkpointed: Call) -> Any:
    """``checkpointed(forward, *args)``, a slice of the batch at a time if that is known to give the same result.

    It is known if the layer's last run drew no random numbers (slices would draw others) and returned only arrays of
    shape (batch, length, ...). The first run is always on the whole batch.

    Args:
        layer: its ``__dict__`` remembers what was found.
        forward: its forward method, keyword arguments bound by `functools.partial`.
        args: positional arguments; the first is the hidden states, shape (batch, length, width).
        checkpointed: calls a function on arguments and recomputes it in the backward pass.
    """
    x = args[0] if args else None
    if not isinstance(x, Tensor) or x.dim() != 3 or is_transformed() or CURRENT.rows is not None:
        return checkpointed(forward, *args)
    noted = layer.__dict__.get(ROWS, 0)
    rows = rows_on(x.device, noted)
    states = random_states(x.device)
    calls = _calls(forward, args, max(1, rows // x.shape[1])) if rows else []
    if calls:
        output = _joined([checkpointed(function, *values) for function, values in calls])
    else:
        output = checkpointed(forward, *args)
    same = _by_sample(output, x) and drew_nothing(states, x.device)
    layer.__dict__[ROWS] = (noted or AS_ON_DEVICE) if same and x.device.type in DEFAULT_ROWS else 0
    return output


def rows_on(device: torch.device, noted: int) -> int:
    """What was noted, as a number of tokens."""
    return DEFAULT_ROWS.get(device.type, 0) if noted == AS_ON_DEVICE else noted


def runs_in_slices(layer: nn.Module) -> bool:
    """Whether the layer's last run showed that it can run in slices."""
    return bool(layer.__dict__.get(ROWS))


@contextlib.contextmanager
def cut_small(modules: Iterable[nn.Module], key: str, size: int) -> Iterator[bool]:
    """Run the modules that can be cut in pieces of this size, to prove that they may; yields whether there are any.

    `key` is where each of them says its own size in its ``__dict__``.
    """
    found = {module: module.__dict__[key] for module in modules if module.__dict__.get(key)}
    for module in found:
        module.__dict__[key] = size
    try:
        yield bool(found)
    finally:
        for module, own in found.items():
            if module.__dict__.get(key):
                module.__dict__[key] = own


@functools.cache  # the function is a class's, and asking again would cost each call of each block
def positional_names(function: Call) -> list[str]:
    """The names of a function's parameters, in order."""
    return list(inspect.signature(function).parameters)


def _calls(forward: Call, args: Sequence[Any], samples: int) -> list[tuple[Call, list[Any]]]:
    """One call per slice of the batch; none if the batch fits in one slice or cannot be cut."""
    x: Tensor = args[0]
    batch, length = x.shape[:2]
    if batch <= samples or batch == length or not isinstance(forward, partial):
        return []
    names = positional_names(forward.func)[len(forward.args) :]
    if len(names) < len(args):
        return []
    count = -(-batch // samples)
    try:
        columns = [_split(name, value, batch, count) for name, value in zip(names, args, strict=False)]
        options = {name: _split(name, value, batch, count) for name, value in forward.keywords.items()}
    except NotBySample:
        return []
    return [
        (
            partial(forward.func, *forward.args, **{name: values[i] for name, values in options.items()}),
            [values[i] for values in columns],
        )
        for i in range(count)
    ]


def _split(name: str, value: Any, batch: int, count: int) -> Sequence[Any]:
    """The value for each slice of the batch."""
    if isinstance(value, Tensor):
        if value.dim() == 0 or value.shape[0] == 1:
            return [value] * count
        if value.shape[0] != batch or name not in BY_SAMPLE:
            raise NotBySample
        return value.tensor_split(count)
    if isinstance(value, tuple) and value:
        return list(zip(*(_split(name, item, batch, count) for item in value), strict=True))
    if value is None or isinstance(value, (bool, int, float, str)):
        return [value] * count
    raise NotBySample


def _joined(outputs: list[Any]) -> Any:
    if isinstance(outputs[0], Tensor):
        return torch.cat(outputs)
    return tuple(None if items[0] is None else torch.cat(items) for items in zip(*outputs, strict=True))


def _by_sample(output: Any, x: Tensor) -> bool:
    items = output if type(output) is tuple else (output,)
    return all(item is None or (isinstance(item, Tensor) and item.shape[:2] == x.shape[:2]) for item in items)


def random_states(device: torch.device) -> list[Tensor]:
    """The states of the random generators that a call on this device draws from."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def drew_nothing(states: list[Tensor], device: torch.device) -> bool:
    """Whether the generators are still in these states."""
    return all(torch.equal(old, new) for old, new in zip(states, random_states(device), strict=True))
