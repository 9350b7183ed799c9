"""Exact packing: examples share a row, and each of them is computed as if it were alone.

A row says how long its documents are (`Example.documents`). `collate` makes position ids of that which restart at each
document, and passes no attention mask. transformers then keeps attention within a document; `apart` checks that it does.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from minipeft.training.data.collate import Example, Ints
from minipeft.training.data.encoding import IGNORED
from minipeft.training.data.examples import Examples


@dataclass(frozen=True, eq=False)
class Packed:
    """Rows of several examples each: a `Store`."""

    store: Examples  # holds the examples
    order: Ints  # numbers of the examples, row after row, shape (examples,)
    edges: Ints  # where each row starts in `order`, and the end, shape (rows + 1,)

    def __len__(self) -> int:
        return len(self.edges) - 1

    @cached_property
    def lengths(self) -> Ints:
        """Tokens of each row, shape (rows,)."""
        return self._sums(self.store.lengths)

    @cached_property
    def targets(self) -> Ints:
        """Predicted tokens of each row, shape (rows,)."""
        return self._sums(self.store.targets)

    @property
    def pad_id(self) -> int:
        """The token id to pad with."""
        return self.store.pad_id

    @property
    def fingerprint(self) -> str:
        """Digest of the examples and of the rows that they are in."""
        digest = hashlib.sha256(f"minipeft packed 1 {self.store.fingerprint}".encode())
        for array in (self.order, self.edges):
            digest.update(np.ascontiguousarray(array, "<i8").data)
        return digest.hexdigest()

    def rows(self, indices: Sequence[int] | Ints) -> list[Example]:
        """The rows with these numbers."""
        return [joined(self.store.rows(self.order[self.edges[row] : self.edges[row + 1]])) for row in indices]

    def describe(self) -> str:
        """What became of the rows of the data, on one line."""
        return f"{self.store.describe()}; packed in {len(self):,} rows, each example as if alone"

    def _sums(self, numbers: Ints) -> Ints:
        return np.add.reduceat(numbers[self.order], self.edges[:-1])


def pack(examples: Examples) -> Packed:
    """Put examples into few rows of at most `max_length` tokens; which share a row depends on their lengths alone."""
    by_length = np.argsort(-examples.lengths, kind="stable")
    rows = best_fit(examples.lengths[by_length].tolist(), examples.max_length)
    edges = np.concatenate([[0], np.cumsum(np.bincount(rows))]).astype(np.int64)
    return Packed(examples, by_length[np.argsort(rows, kind="stable")], edges)


def best_fit(lengths: Sequence[int], capacity: int) -> Ints:
    """The number of a bin for each length: the bin that has least room to spare, or else a new one.

    The lengths come from the longest to the shortest, each at most `capacity`.

    Returns:
        Numbers from 0, shape (lengths,).
    """
    spaces: list[int] = []  # that some bin has left, ascending
    bins: dict[int, list[int]] = {}  # by the space that they have left
    found, count = np.empty(len(lengths), np.int64), 0
    for index, length in enumerate(lengths):
        place = bisect_left(spaces, length)
        if place < len(spaces):
            space = spaces[place]
            number = bins[space].pop()
            if not bins[space]:
                del spaces[place]
        else:
            space, number, count = capacity, count, count + 1
        found[index], left = number, space - length
        if not bins.setdefault(left, []):
            insort(spaces, left)
        bins[left].append(number)
    return found


def joined(examples: Sequence[Example]) -> Example:
    """One row of several examples. The first token of each is not predicted, since nothing comes before it."""
    labels = [example.labels.copy() for example in examples]
    for each in labels:
        each[:1] = IGNORED
    documents = tuple(len(example.input_ids) for example in examples)
    return Example(np.concatenate([example.input_ids for example in examples]), np.concatenate(labels), documents)
