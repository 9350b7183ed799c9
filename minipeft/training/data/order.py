"""Which examples go into which update: a function of the seed and the update's number, and of nothing else."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from minipeft.config.options import integer
from minipeft.errors import DataError
from minipeft.training.data.collate import Batch, Ints, Store, collated, pieces

BUCKET = 16  # updates
LARGEST_SEED = 2**63


@dataclass(frozen=True, eq=False)
class Update:
    """The examples of one update of the weights."""

    number: int  # of the update, from 0, over the whole run
    epoch: int  # from 0
    indices: Ints  # numbers of its examples, shape (examples,)
    store: Store  # holds the examples

    @property
    def tokens(self) -> int:
        """Predicted tokens over all processes: divide the sum of the losses by this."""
        return int(self.store.targets[self.indices].sum())

    def batches(self, rank: int, world_size: int, micro_batch: int) -> list[Batch]:
        """This process's batches. Every process gets the same number; a filler stands in if no example is left.

        Args:
            rank: of this process, from 0.
            world_size: number of processes.
            micro_batch: largest number of examples per forward pass of one process; may differ between updates.

        Returns:
            Batches as `collate` makes them. Over all processes they hold each example once.
        """
        return [collated(self.store, piece) for piece in pieces(self.indices, rank, world_size, micro_batch)]


class UpdateOrder:
    """The updates of a run: ``order[u]`` is update number u, the same on every process and after every restart.

    Each epoch is shuffled by `shuffled` with the key (seed, epoch). Memory: 8 bytes per example.

    Args:
        store: the examples, see `Examples`.
        update_size: examples per update over all processes and passes; the last update of an epoch may have fewer.
        seed: of the order, at least 0.
        bucket: sort the examples of this many updates by length, to save padding; see `shuffled`.

    Raises:
        DataError: there are no examples.
        ConfigError: a number is out of range.
    """

    def __init__(self, store: Store, update_size: int, seed: int, bucket: int = BUCKET):
        self.store, self.size = store, integer("update_size", update_size, 1)
        self.seed, self.bucket = integer("seed", seed, 0, LARGEST_SEED), integer("bucket", bucket, 0)
        if len(store.lengths) == 0:
            raise DataError("there are no examples to train on; give more data.")
        self.updates_per_epoch = math.ceil(len(store.lengths) / self.size)
        self._epoch: tuple[int, list[Ints]] = (-1, [])

    def __getitem__(self, number: int) -> Update:
        epoch, place = divmod(integer("the number of an update", number, 0), self.updates_per_epoch)
        if self._epoch[0] != epoch:
            self._epoch = (epoch, shuffled(self.store.lengths, self.size, self.bucket, (self.seed, epoch)))
        return Update(number, epoch, self._epoch[1][place], self.store)

    def iterate(self, first: int = 0) -> Iterator[Update]:
        """The updates from number `first` on, without end."""
        while True:
            yield self[first]
            first += 1


def shuffled(lengths: Ints, size: int, bucket: int, key: tuple[int, ...]) -> list[Ints]:
    """All examples once, in random order, in updates of `size`; the remainder makes a shorter one at the end.

    With a `bucket`, the examples of each `bucket` updates are sorted by length and then the updates are shuffled.
    So an update's examples have similar lengths, but which examples meet, and when, is still random.

    Args:
        lengths: tokens of each example, shape (examples,).
        size: examples per update.
        bucket: number of updates to sort together; 0 to not sort at all.
        key: non-negative numbers; the order depends on them alone.
    """
    # Sort raw words: of numpy's generators only these are promised to stay the same between versions.
    words = np.random.PCG64(np.random.SeedSequence(list(key)))
    order = np.argsort(words.random_raw(len(lengths)), kind="stable").astype(np.int64)
    full = len(order) // size * size
    if bucket:
        for start in (*range(0, full, bucket * size), full):
            end = min(start + bucket * size, full) if start < full else len(order)
            part = order[start:end]
            order[start:end] = part[np.argsort(lengths[part], kind="stable")]
    updates = list(order[:full].reshape(-1, size))
    places = np.argsort(words.random_raw(len(updates)), kind="stable") if bucket else np.arange(len(updates))
    return [updates[place] for place in places] + ([order[full:]] if full < len(order) else [])
