"""Encoded examples on disk: encode a source once, keep it in the cache of datasets, read any example by number."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import datasets  # type: ignore[import-untyped]
import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]
from datasets import Dataset, Features, IterableDataset, Value
from transformers import PreTrainedTokenizerBase

from minipeft.errors import DataError
from minipeft.training.data.collate import Example, Ints
from minipeft.training.data.encoding import IGNORED, Encoder, Encoding, Fate, padding_id
from minipeft.training.data.sources import Source

HELD_OUT = 0.05
ROWS_PER_CALL = 200  # a tokenizer encodes them in parallel


@dataclass(frozen=True, eq=False)
class Examples:
    """Examples of a text or a data set, each a stretch of one long stream of tokens, on disk or in memory.

    So cutting needs no second copy. In memory an example takes 24 bytes.
    """

    ids: pa.ChunkedArray  # all tokens, end to end, int32
    labels: pa.ChunkedArray | None  # likewise; None if every token is predicted
    starts: Ints  # where each example starts, shape (examples,)
    ends: Ints  # where it ends
    targets: Ints  # predicted tokens of each example, shape (examples,)
    pad_id: int  # the token id to pad with
    max_length: int  # the most tokens an example may have
    counts: dict[Fate, int]  # what became of the rows, by `Fate`
    share_rows: bool = False  # whether they are to be packed

    @classmethod
    def in_memory(cls, examples: Sequence[Example], pad_id: int, max_length: int) -> Examples:
        """Examples that were encoded one by one."""
        nothing = np.zeros(0, np.int32)
        ids = pa.chunked_array([np.concatenate([nothing, *(example.input_ids for example in examples)])])
        labels = pa.chunked_array([np.concatenate([nothing, *(example.labels for example in examples)])])
        ends = np.cumsum([len(example.labels) for example in examples], dtype=np.int64)
        targets = np.array([(example.labels[1:] != IGNORED).sum() for example in examples], np.int64)
        return cls(
            ids, labels, np.concatenate([[0], ends])[:-1].astype(np.int64), ends, targets, pad_id, max_length, {}
        )

    def __len__(self) -> int:
        return len(self.starts)

    @functools.cached_property
    def lengths(self) -> Ints:
        """Tokens of each example, shape (examples,)."""
        return self.ends - self.starts

    @property
    def tokens(self) -> int:
        """Predicted tokens of all examples."""
        return int(self.targets.sum())

    @functools.cached_property
    def largest_id(self) -> int:
        """The largest token id, for `check_fit`."""
        return int(pc.max(self.ids).as_py())

    @functools.cached_property
    def fingerprint(self) -> str:
        """Digest of tokens, labels and where each example starts and ends; the same on any machine and path."""
        digest = hashlib.sha256(b"minipeft examples 1")
        for stream in (self.ids, self.labels):
            digest.update(str(None if stream is None else len(stream)).encode())
            for chunk in [] if stream is None else stream.chunks:
                digest.update(np.ascontiguousarray(chunk.to_numpy(), "<i4").data)
        for array in (self.starts, self.ends):
            digest.update(np.ascontiguousarray(array, "<i8").data)
        return digest.hexdigest()

    def rows(self, indices: Sequence[int] | Ints) -> list[Example]:
        """The examples with these numbers."""
        found = []
        for index in indices:
            start, length = int(self.starts[index]), int(self.lengths[index])
            ids = self.ids.slice(start, length).to_numpy()
            found.append(Example(ids, ids if self.labels is None else self.labels.slice(start, length).to_numpy()))
        return found

    def select(self, first: int, last: int) -> Examples:
        """The examples from number `first` up to, but not including, `last`."""
        part = slice(first, last)
        return replace(self, starts=self.starts[part], ends=self.ends[part], targets=self.targets[part])

    def hold_out(self) -> tuple[Examples, Examples]:
        """Examples to train on, and the last ones to evaluate on, at least one each; raises DataError if there is only one."""
        kept = len(self) - math.ceil(HELD_OUT * len(self))
        if not 0 < kept < len(self):
            raise DataError(
                f"{len(self)} examples cannot be divided into some to train on and some to evaluate on; "
                "give more data, lower max_length or give data for the evaluation."
            )
        return self.select(0, kept), self.select(kept, len(self))

    def describe(self) -> str:
        """What became of the rows, on one line."""
        words = {
            Fate.TRUNCATED: "truncated to max_length",
            Fate.OVERLONG: "dropped for their length",
            Fate.EMPTY: "left out as empty",
        }
        parts = [f"{self.counts[fate]:,} rows {what}" for fate, what in words.items() if self.counts.get(fate)]
        return "; ".join([f"{len(self):,} examples, {self.tokens:,} tokens to predict", *parts])


def encode(
    source: Source, tokenizer: PreTrainedTokenizerBase, encoding: Encoding, *, processes: int | None = None
) -> Examples:
    """Encode all rows of a source, or read what an earlier run with the same rows, tokenizer and encoding cached.

    A text is cut into blocks over all its rows, and the last block is kept even if it is short. A document of more than
    `max_length` tokens is cut too. The examples are not packed yet: `minipeft.training.data.packing.pack` does that.

    Args:
        source: rows, not streaming.
        tokenizer: of the model.
        encoding: lengths, packing, and what to do with rows that do not fit.
        processes: how many tokenise at a time; a fast tokenizer uses all cores by itself.

    Raises:
        DataError: a row does not fit, or the rows make no example.
    """
    if isinstance(source.rows, IterableDataset):
        raise DataError(f"{source.name} is streaming; use StreamOrder, or open it with streaming=False.")
    encoder = Encoder(tokenizer, source.kind, encoding)
    table = _encoded(source.rows, source, encoder, processes).data
    column = table.column("input_ids")
    ends = np.cumsum(pc.list_value_length(column).to_numpy(), dtype=np.int64)
    starts = np.concatenate([[0], ends[:-1]]).astype(np.int64)
    if encoder.is_text:
        if encoder.in_blocks:
            starts, ends = np.array([0]), ends[-1:]
        starts, ends = cut(starts, ends, encoding.max_length)
        labels, targets = None, ends - starts - 1
    else:
        kept = ends > starts
        labels = pc.list_flatten(table.column("labels"))
        targets = table.column("targets").to_numpy().astype(np.int64)[kept]
        starts, ends = starts[kept], ends[kept]
    if len(starts) == 0:
        raise DataError(
            f"{source.name}: no example of at least 2 tokens comes of its rows; give more text or other rows."
        )
    counts = dict(zip(Fate, np.bincount(table.column("fate").to_numpy(), minlength=len(Fate)).tolist(), strict=True))
    ids, pad_id = pc.list_flatten(column), padding_id(tokenizer)
    return Examples(ids, labels, starts, ends, targets, pad_id, encoding.max_length, counts, encoder.in_rows)


def cut(starts: Ints, ends: Ints, length: int) -> tuple[Ints, Ints]:
    """Cut each stretch into blocks of `length`. Its last block may be shorter; a block of one token is left out.

    One token predicts nothing, so nothing is lost that could be learned from.

    Returns:
        Starts and ends of the blocks, each of shape (blocks,).
    """
    counts = -(-(ends - starts) // length)
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)  # 0, 1, ... in each stretch
    block_starts = np.repeat(starts, counts) + within * length
    block_ends = np.minimum(block_starts + length, np.repeat(ends, counts))
    enough = block_ends - block_starts > 1
    return block_starts[enough], block_ends[enough]


def _encoded(rows: Dataset, source: Source, encoder: Encoder, processes: int | None) -> Dataset:
    """The rows in tokens, row by row; datasets caches them if it caches the rows."""
    tokens = datasets.Sequence(Value("int32"))
    values = {"input_ids": tokens, "fate": Value("int8")}
    if not encoder.is_text:
        values |= {"labels": tokens, "targets": Value("int32")}
    rows = rows.select_columns(list(source.columns)).with_format(None)
    # datasets would hash the tokenizer's pickle, which contains the path that it was loaded from.
    parts = f"{rows._fingerprint} {encoder.fingerprint()}"
    return rows.map(
        functools.partial(_encode_columns, encoder, source.name),
        batched=True,
        batch_size=max(ROWS_PER_CALL, encoder.rows_at_once),
        with_indices=True,
        writer_batch_size=ROWS_PER_CALL,
        remove_columns=list(source.columns),
        features=Features(values),
        num_proc=processes,
        new_fingerprint=hashlib.sha256(parts.encode()).hexdigest()[:32],
        desc="encoding",
    )


def _encode_columns(
    encoder: Encoder, name: str, columns: dict[str, list[Any]], indices: list[int]
) -> dict[str, list[Any]]:
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    encoded = encoder.encode(rows, [f"{name}, row {index}" for index in indices])
    ids = [np.asarray(row.input_ids, np.int32) for row in encoded]
    found: dict[str, list[Any]] = {"input_ids": ids, "fate": [int(row.fate) for row in encoded]}
    if not encoder.is_text:
        found["labels"] = [np.asarray(row.labels, np.int32) for row in encoded]
        found["targets"] = [int((labels[1:] != IGNORED).sum()) for labels in found["labels"]]
    return found
