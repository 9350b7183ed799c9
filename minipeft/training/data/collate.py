"""Examples to batches: padded on the right or packed, and the same number of batches on every process."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from minipeft.errors import ConfigError
from minipeft.training.data.encoding import IGNORED

Ints: TypeAlias = "NDArray[np.int64]"
Batch: TypeAlias = "dict[str, Tensor]"


class Example(NamedTuple):
    """Token ids and labels, each of shape (length,), int32; and the lengths of its documents if it is packed."""

    input_ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    documents: tuple[int, ...] = ()


class Store(Protocol):
    """Examples that can be read by number."""

    @property
    def lengths(self) -> Ints:
        """Tokens of each example, shape (examples,)."""

    @property
    def targets(self) -> Ints:
        """Predicted tokens of each example, shape (examples,)."""

    @property
    def pad_id(self) -> int:
        """The token id to pad with."""

    def rows(self, indices: Sequence[int] | Ints) -> list[Example]:
        """The examples with these numbers."""


def collate(examples: Sequence[Example], pad_id: int) -> Batch:
    """A batch as long as its longest example.

    Padding is on the right, so a model's own position ids are right. Labels are masked by position, never by
    comparing with `pad_id`: a real eos is predicted even if eos is also the padding.

    Returns:
        ``input_ids``, ``attention_mask`` and ``labels`` (-100 where nothing is predicted), (examples, longest), int64.
        Packed examples have ``position_ids`` that restart at each document, and no ``attention_mask``: transformers
        looks for documents only if there is none. Padding is then a document of its own.
    """
    ids = [torch.from_numpy(example.input_ids.astype(np.int64)) for example in examples]
    labels = [torch.from_numpy(example.labels.astype(np.int64)) for example in examples]
    batch = {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad_id),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
    }
    if any(example.documents for example in examples):
        batch["position_ids"] = torch.stack([_positions(example, batch["labels"].shape[1]) for example in examples])
    else:
        batch["attention_mask"] = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
    return batch


def _positions(example: Example, length: int) -> Tensor:
    documents = example.documents or (len(example.input_ids),)
    return torch.cat([torch.arange(tokens, device="cpu") for tokens in (*documents, length - sum(documents))])


def model_inputs(batch: Batch) -> dict[str, Any]:
    """What a model's forward method takes of a batch. With a cache, transformers would not look for documents."""
    inputs: dict[str, Any] = {name: tensor for name, tensor in batch.items() if name != "labels"}
    return inputs | {"use_cache": False} if "position_ids" in batch else inputs


def filler(pad_id: int) -> Batch:
    """A batch for a process that has no examples left: it runs the forward pass and predicts nothing, shape (1, 2).

    The sum of its losses is 0; their mean would be NaN.
    """
    ids = torch.full((1, 2), pad_id, device="cpu")
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.full_like(ids, IGNORED)}


def collated(store: Store, indices: Ints) -> Batch:
    """The batch of these examples, or a filler if there are none."""
    return collate(store.rows(indices), store.pad_id) if len(indices) else filler(store.pad_id)


def pieces(indices: Ints, rank: int, world_size: int, micro_batch: int) -> list[Ints]:
    """A process's share of the examples, in pieces of at most `micro_batch`; every process gets as many pieces.

    Piece sizes differ by at most one over all processes and passes. The pieces of one pass are neighbours in
    `indices`, so if that is sorted by length the processes hardly wait for each other.
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
    """Batches for an evaluation: each example once over all processes, the same number of batches on each.

    Examples are sorted by length, longest first, so there is little padding and a lack of memory shows at once.
    Examples of equal length keep their order.
    """
    order = np.argsort(-store.lengths, kind="stable")
    for piece in pieces(order, rank, world_size, micro_batch):
        yield collated(store, piece)
