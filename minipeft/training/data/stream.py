"""The updates of a run on streaming rows, for data larger than memory and disk; resumed exactly.

The rows are read in order, and shuffled one window of examples at a time. Every process reads and tokenises all rows
and takes its share of each update. So the processes need not communicate, but each of them does this work.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np
from datasets import IterableDataset  # type: ignore[import-untyped]
from transformers import PreTrainedTokenizerBase

from minipeft.config.options import integer
from minipeft.errors import DataError, StateError, all_or_nothing
from minipeft.training.data.collate import Example, Ints, Store
from minipeft.training.data.encoding import Encoded, Encoder, Encoding, Fate, padding_id
from minipeft.training.data.examples import Examples
from minipeft.training.data.order import BUCKET, LARGEST_SEED, Update, shuffled
from minipeft.training.data.packing import pack
from minipeft.training.data.sources import Source

WINDOW = 64  # updates


class StreamOrder:
    """An iterator over the updates of a run, without end: when the rows end, a new epoch starts.

    The examples of `window` updates are held in memory and shuffled by `shuffled` with the key (seed, epoch, window).
    Examples that share rows are packed window by window, so the last update of a window may have fewer rows.
    `state` describes the place in the run in a few numbers. `restore` encodes at most one window of rows again.

    Args:
        source: rows, streaming or not.
        tokenizer: of the model.
        encoding: as for `encode`.
        update_size: examples per update over all processes and passes.
        seed: of the order, at least 0.
        window: updates to shuffle together.
        bucket: as for `UpdateOrder`.

    Raises:
        ConfigError: a number is out of range, or the tokenizer lacks what these rows need.
        DataError: the rows are chats and the tokenizer cannot encode them.
    """

    def __init__(
        self,
        source: Source,
        tokenizer: PreTrainedTokenizerBase,
        encoding: Encoding,
        update_size: int,
        seed: int,
        window: int = WINDOW,
        bucket: int = BUCKET,
    ):
        self.source, self.encoder = source, Encoder(tokenizer, source.kind, encoding)
        self.pad_id = padding_id(tokenizer)
        self.size, self.update_window = integer("update_size", update_size, 1), integer("window", window, 1)
        self.seed, self.bucket = integer("seed", seed, 0, LARGEST_SEED), integer("bucket", bucket, 0)
        self._key: dict[str, object] = {"size": self.size, "window": self.update_window, "seed": self.seed}
        self._key |= {"bucket": self.bucket, "encoding": self.encoder.fingerprint()}
        self._number, self._epoch = 0, 0  # of the next update
        self._window, self._place = -1, 0  # number of the window in memory; of the next update in it
        self._start = Position()  # of the window in memory; before the first window of an epoch, of that one
        self._reader = _Reader(source, self.encoder, self._start)
        self._held: Store | None = None
        self._updates: list[Ints] = []

    def __iter__(self) -> StreamOrder:
        return self

    def __next__(self) -> Update:
        """The next update; raises DataError if a row does not fit, or the rows make no example."""
        while self._held is None or self._place == len(self._updates):
            self._next_window()
        update = Update(self._number, self._epoch, self._updates[self._place], self._held)
        self._number, self._place = self._number + 1, self._place + 1
        return update

    @property
    def counts(self) -> dict[Fate, int]:
        """What became of this epoch's rows so far."""
        return {fate: self._reader.counts[fate] for fate in Fate}

    def state(self) -> dict[str, Any]:
        """The place in the run after the last update, as JSON can hold it."""
        numbers = {"number": self._number, "epoch": self._epoch, "window": self._window, "place": self._place}
        return {"order": dict(self._key), **numbers, "position": copy.deepcopy(asdict(self._start))}

    @all_or_nothing
    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from the place that `state` gave; raises StateError if it is of a run with another order, encoding or data."""
        if changed := [name for name, value in self._key.items() if state["order"].get(name) != value]:
            raise StateError(
                f"the state of the data is of a run with another {' and '.join(changed)}, whose order cannot be "
                "resumed; give the same values, or start anew."
            )
        epoch, window, place = state["epoch"], state["window"], state["place"]
        start = Position(**copy.deepcopy(state["position"]))
        reader, held, updates = _Reader(self.source, self.encoder, start), None, list[Ints]()
        if window >= 0:
            held = self._read_window(reader)
            updates = self._shuffled(held, epoch, window)
            if not 0 < place <= len(updates):
                raise StateError(f"{self.source.name} has fewer rows than when the run was saved; give the same data.")
        self._number, self._epoch, self._window, self._place = state["number"], epoch, window, place
        self._start, self._reader, self._held, self._updates = start, reader, held, updates

    def _next_window(self) -> None:
        """Read the next window of this epoch, or move to the next epoch."""
        start = self._reader.before
        held = self._read_window(self._reader)
        if len(held.lengths):
            self._start, self._window = start, self._window + 1
        elif self._window < 0:
            raise DataError(f"{self.source.name}: no example of at least 2 tokens comes of its rows; give more rows.")
        else:
            self._epoch, self._window, self._start = self._epoch + 1, -1, Position()
            self._reader = _Reader(self.source, self.encoder, self._start)
        self._place, self._held, self._updates = 0, held, self._shuffled(held, self._epoch, self._window)

    def _read_window(self, reader: _Reader) -> Store:
        rows, length = self.size * self.update_window, self.encoder.encoding.max_length
        if not self.encoder.in_rows:
            return Examples.in_memory(list(islice(reader, rows)), self.pad_id, length)
        return pack(Examples.in_memory(list(_up_to(rows * length, reader)), self.pad_id, length))

    def _shuffled(self, held: Store, epoch: int, window: int) -> list[Ints]:
        return shuffled(held.lengths, self.size, self.bucket, (self.seed, epoch, max(window, 0)))


@dataclass(frozen=True)
class Position:
    """A place in the examples of one epoch: before a group of rows, plus some of that group's examples."""

    rows: int = 0  # number of rows before it
    # The state of datasets at this place, if JSON can hold it; else the rows are read and skipped
    stream: dict[str, Any] | None = None
    carry: list[int] = field(default_factory=list)  # tokens before it that do not fill a block yet, for packing
    given: int = 0  # examples of the group that come before the place
    counts: list[int] = field(default_factory=lambda: [0] * len(Fate))  # what became of the rows before it, by `Fate`


class _Reader:
    """An iterator over the examples of one epoch, from a position on."""

    def __init__(self, source: Source, encoder: Encoder, position: Position):
        self.source, self.encoder = source, encoder
        self.rows = source.rows.select_columns(list(source.columns))  # a copy with its own state
        self.before = position  # of the next example
        self.carry, self.counts = list(position.carry), list(position.counts)
        self._examples = self._read(position)

    def __iter__(self) -> _Reader:
        return self

    def __next__(self) -> Example:
        example = next(self._examples)
        self.before = replace(self.before, given=self.before.given + 1)
        return example

    def _read(self, position: Position) -> Iterator[Example]:
        rows, number, skip = self._rows_from(position), position.rows, position.given
        while group := list(islice(rows, self.encoder.rows_at_once)):
            names = [f"{self.source.name}, row {number + place}" for place in range(len(group))]
            for encoded in self.encoder.encode(group, names):
                self.counts[encoded.fate] += 1
                examples = self._examples_of(encoded)
                yield from examples[skip:]
            number, skip = number + len(group), 0
            self.before = Position(number, self._stream_state(), list(self.carry), 0, list(self.counts))
        if len(self.carry) > 1:
            yield _example(self.carry, None)

    def _rows_from(self, position: Position) -> Iterator[dict[str, Any]]:
        if position.stream is None or not isinstance(self.rows, IterableDataset):
            return islice(iter(self.rows), position.rows, None)
        self.rows.load_state_dict(copy.deepcopy(position.stream))
        return iter(self.rows)

    def _stream_state(self) -> dict[str, Any] | None:
        if not isinstance(self.rows, IterableDataset):
            return None
        state: dict[str, Any] = self.rows.state_dict()
        try:
            json.dumps(state)
        except TypeError:
            return None
        return state

    def _examples_of(self, encoded: Encoded) -> list[Example]:
        ids, length = encoded.input_ids, self.encoder.encoding.max_length
        if encoded.labels is not None:
            return [_example(ids, encoded.labels)] if ids else []
        if self.encoder.in_blocks:
            ids = self.carry + ids
            self.carry = ids[len(ids) // length * length :]
            ids = ids[: len(ids) // length * length]
        blocks = [ids[start : start + length] for start in range(0, len(ids), length)]
        return [_example(block, None) for block in blocks if len(block) > 1]


def _up_to(tokens: int, examples: Iterator[Example]) -> Iterator[Example]:
    """Examples until they have this many tokens; none is taken and not given."""
    while tokens > 0 and (example := next(examples, None)) is not None:
        tokens -= len(example.input_ids)
        yield example


def _example(ids: list[int], labels: list[int] | None) -> Example:
    tokens = np.array(ids, np.int32)
    return Example(tokens, tokens if labels is None else np.array(labels, np.int32))
