"""Which examples go into which update: a function of the seed and the number of the update, and of nothing else."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from minipeft.errors import DataError
from minipeft.training.data.collate import Batch, Ints, Store, check_type, collated, pieces

BUCKET = 16  # updates


@dataclass(frozen=True, eq=False)
class Update:
    """The examples of one update of the weights.

    Attributes:
        number: of the update, from 0 over the whole run.
        epoch: from 0.
        indices: of its examples, shape (examples,).
        store: where the examples are.
    """

    number: int
    epoch: int
    indices: Ints
    store: Store

    @property
    def tokens(self) -> int:
        """Number of predicted tokens over all processes: what the sum of the losses is to be divided by."""
        return int(self.store.targets[self.indices].sum())

    def batches(self, rank: int, world_size: int, micro_batch: int) -> list[Batch]:
        """This process's micro batches; as many on every process, with a filler where nothing is left.

        Args:
            rank: of this process, from 0.
            world_size: number of processes.
            micro_batch: examples a forward pass of one process takes at most; may differ from update to update.

        Returns:
            Batches as of `collate`. Over all processes they hold each example once.
        """
        return [collated(self.store, piece) for piece in pieces(self.indices, rank, world_size, micro_batch)]


class UpdateOrder:
    """The updates of a run: ``order[u]`` is update number u, on any process and after any restart the same.

    Each epoch is shuffled anew, with `shuffled` and the key (seed, epoch). It takes 8 bytes an example, once.

    Args:
        store: the examples, see `Examples`.
        update_size: examples an update takes over all processes and accumulation steps; the last of an epoch may
            take fewer.
        seed: of the order, at least 0.
        bucket: sort the examples of this many updates by length, so that batches fill little up; see `shuffled`.

    Raises:
        DataError: there is no example. ConfigError: a number is out of range.
    """

    def __init__(self, store: Store, update_size: int, seed: int, bucket: int = BUCKET):
        self.store, self.size = store, check_type(update_size, "update_size", 1)
        self.seed, self.bucket = check_type(seed, "seed", 0), check_type(bucket, "bucket", 0)
        if len(store.lengths) == 0:
            raise DataError("there are no examples to train on; lengthen the data.")
        self.updates_per_epoch = math.ceil(len(store.lengths) / self.size)
        self._epoch: tuple[int, list[Ints]] = (-1, [])

    def __getitem__(self, number: int) -> Update:
        number = check_type(number, "the number of an update", 0)
        epoch, place = divmod(number, self.updates_per_epoch)
        if self._epoch[0] != epoch:
            self._epoch = (epoch, shuffled(self.store.lengths, self.size, self.bucket, (self.seed, epoch)))
        return Update(number, epoch, self._epoch[1][place], self.store)

    def iterate(self, first: int = 0) -> Iterator[Update]:
        """The updates from number `first` on, without end."""
        while True:
            yield self[first]
            first += 1


def shuffled(lengths: Ints, size: int, bucket: int, key: tuple[int, ...]) -> list[Ints]:
    """All examples once, in random order, in updates of `size`; what is left over makes a short one at the end.

    With a `bucket`, each `bucket` updates share examples sorted by length, and then the updates are shuffled: their
    examples are about as long as each other, and which come together and when is random all the same.

    Args:
        lengths: tokens of each example, shape (examples,).
        size: examples an update.
        bucket: number of updates to sort over; 0 to not sort at all.
        key: numbers from 0; the order depends on them alone.
    """
    # Sorting the raw words: they are the part of numpy's generators that is promised to stay from version to version.
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
