"""Examples to batches: filled up on the right, where nothing is attended to or predicted; the same number a process."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minipeft.errors import ConfigError
from minipeft.training.data.encoding import IGNORED

Ints: TypeAlias = "NDArray[np.int64]"
Batch: TypeAlias = "dict[str, Tensor]"


class Example(NamedTuple):
    """Token ids and labels, each of shape (length,), int32."""

    input_ids: NDArray[np.int32]
    labels: NDArray[np.int32]


class Store(Protocol):
    """Examples that can be had by number."""

    @property
    def lengths(self) -> Ints:
        """Tokens of each example, shape (examples,)."""
        ...

    @property
    def targets(self) -> Ints:
        """Predicted tokens of each example, shape (examples,)."""
        ...

    @property
    def pad_id(self) -> int:
        """What to fill rows up with."""
        ...

    def rows(self, indices: Sequence[int] | Ints) -> list[Example]:
        """The examples of these numbers."""
        ...


def collate(examples: Sequence[Example], pad_id: int) -> Batch:
    """A batch as long as the longest example.

    Positions count from the left, so a model's own position ids are right. Labels are masked by position, never by
    comparing with `pad_id`, so a real eos is predicted also where eos fills the rows up.

    Returns:
        ``input_ids``, ``attention_mask`` and ``labels`` (-100 where nothing is predicted), (examples, longest), int64.
    """
    shape = (len(examples), max(len(example.input_ids) for example in examples))
    ids, mask = np.full(shape, pad_id, np.int64), np.zeros(shape, np.int64)
    labels = np.full(shape, IGNORED, np.int64)
    for row, example in enumerate(examples):
        length = len(example.input_ids)
        ids[row, :length], mask[row, :length], labels[row, :length] = example.input_ids, 1, example.labels
    arrays = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def filler(pad_id: int) -> Batch:
    """A batch for a process with nothing left: it takes part in the forward pass and predicts nothing, shape (1, 2).

    The sum of its losses is 0; their mean would be NaN.
    """
    ids = torch.full((1, 2), pad_id)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.full_like(ids, IGNORED)}


def collated(store: Store, indices: Ints) -> Batch:
    """The batch of these examples, or a filler for none."""
    return collate(store.rows(indices), store.pad_id) if len(indices) else filler(store.pad_id)


def pieces(indices: Ints, rank: int, world_size: int, micro_batch: int) -> list[Ints]:
    """A process's share of the examples in pieces of at most `micro_batch`, as many on each process.

    All pieces, over the processes and forward passes, differ by at most one in length, and those of one forward pass
    lie side by side, so that the processes wait little for each other where the examples are sorted by length.
    """
    if not (0 <= rank < world_size and micro_batch >= 1):
        raise ConfigError(
            f"rank {rank} of {world_size} processes, batches of {micro_batch}: rank must be from 0 to below the number "
            "of processes, and a batch holds at least 1 example."
        )
    passes = math.ceil(len(indices) / (world_size * micro_batch))
    if passes == 0:
        return []
    return np.array_split(indices, passes * world_size)[rank::world_size]


def eval_batches(store: Store, micro_batch: int, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
    """Batches for an evaluation: each example once over the processes, as many batches on each, fillers at the end.

    The examples come sorted by length, the longest first, so that little is filled up and a lack of memory shows
    at once; where all are as long they keep their order.
    """
    order = np.argsort(-store.lengths, kind="stable")
    for piece in pieces(order, rank, world_size, micro_batch):
        yield collated(store, piece)


def check_type(value: Any, name: str, low: int) -> int:
    """`value`, if it is an integer of at least `low`."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < low:
        raise ConfigError(f"{name} must be an integer from {low}, not {value!r}.")
    return int(value)
