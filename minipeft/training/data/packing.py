"""Token streams: what has been encoded end to end, and examples as stretches of it, so packing needs no second copy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
from numpy.typing import NDArray

from minipeft.training.data.collate import Ints


class TokenStream:
    """A column of lists of integers, read end to end; it stays where Arrow has it, on disk as a rule.

    Args:
        column: lists of int32, in any number of chunks.
    """

    def __init__(self, column: pa.ChunkedArray):
        chunks: list[Any] = [chunk.flatten() for chunk in column.chunks]
        self._chunks = [chunk.to_numpy(zero_copy_only=True) for chunk in chunks if len(chunk)]
        self._ends = np.cumsum([len(chunk) for chunk in self._chunks], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, stretch: slice) -> NDArray[np.int32]:
        """Tokens `start` to `stop`; a view where they lie in one chunk."""
        start, stop = stretch.start, stretch.stop
        first = int(np.searchsorted(self._ends, start, side="right"))
        found = []
        while start < stop:
            begin = int(self._ends[first]) - len(self._chunks[first])
            end = min(stop, int(self._ends[first]))
            found.append(self._chunks[first][start - begin : end - begin])
            start, first = end, first + 1
        return found[0] if len(found) == 1 else np.concatenate([np.empty(0, np.int32), *found])

    def chunks(self) -> Iterator[NDArray[np.int32]]:
        """All tokens, in pieces of no particular length."""
        yield from self._chunks


def row_ends(column: pa.ChunkedArray) -> Ints:
    """Where each list of the column ends in its stream, shape (rows,)."""
    lengths = [np.diff(chunk.offsets.to_numpy()) for chunk in column.chunks]
    return np.cumsum(np.concatenate([np.empty(0, np.int64), *lengths]), dtype=np.int64)


def cut(starts: Ints, ends: Ints, length: int) -> tuple[Ints, Ints]:
    """Cut each stretch into blocks of `length`; its last block is shorter, and left out where it is a single token.

    A block of one token predicts nothing, so nothing is lost that could be learned from.

    Returns:
        Starts and ends of the blocks, each of shape (blocks,).
    """
    counts = -(-(ends - starts) // length)
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)  # 0, 1, ... in each stretch
    block_starts = np.repeat(starts, counts) + within * length
    block_ends = np.minimum(block_starts + length, np.repeat(ends, counts))
    enough = block_ends - block_starts > 1
    return block_starts[enough], block_ends[enough]
