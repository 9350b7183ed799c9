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
from datasets import Dataset, Features, IterableDataset, Value
from transformers import PreTrainedTokenizerBase

from minipeft.errors import DataError
from minipeft.training.data.collate import Example, Ints
from minipeft.training.data.encoding import IGNORED, Encoder, Encoding, Fate, padding_id
from minipeft.training.data.packing import TokenStream, cut, row_ends
from minipeft.training.data.sources import Source

HELD_OUT = 0.05
ROWS_A_CALL = 200  # a tokenizer encodes them in parallel


@dataclass(frozen=True, eq=False)
class Examples:
    """Examples of a text or a data set, each a stretch of a token stream on disk.

    In memory an example takes 24 bytes.

    Attributes:
        ids: all tokens, end to end.
        labels: likewise; None where every token is predicted.
        starts: where each example starts, shape (examples,).
        ends: where it ends.
        targets: predicted tokens of each example, shape (examples,).
        pad_id: what to fill rows up with.
        max_length: tokens an example has at most.
        counts: what became of the rows, by `Fate`.
    """

    ids: TokenStream
    labels: TokenStream | None
    starts: Ints
    ends: Ints
    targets: Ints
    pad_id: int
    max_length: int
    counts: dict[Fate, int]

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
        return max(int(chunk.max()) for chunk in self.ids.chunks())

    @functools.cached_property
    def fingerprint(self) -> str:
        """Digest of tokens, labels and their division into examples: of the content, on any machine and path."""
        digest = hashlib.sha256(b"minipeft examples 1")
        for stream in (self.ids, self.labels):
            digest.update(str(len(stream) if stream else None).encode())
            for chunk in stream.chunks() if stream else ():
                digest.update(np.ascontiguousarray(chunk, "<i4").data)
        for array in (self.starts, self.ends):
            digest.update(np.ascontiguousarray(array, "<i8").data)
        return digest.hexdigest()

    def rows(self, indices: Sequence[int] | Ints) -> list[Example]:
        """The examples of these numbers."""
        stretches = [slice(int(self.starts[index]), int(self.ends[index])) for index in indices]
        if self.labels is None:
            return [Example(self.ids[stretch], self.ids[stretch]) for stretch in stretches]
        return [Example(self.ids[stretch], self.labels[stretch]) for stretch in stretches]

    def select(self, first: int, last: int) -> Examples:
        """The examples from number `first` to below `last`."""
        part = slice(first, last)
        return replace(self, starts=self.starts[part], ends=self.ends[part], targets=self.targets[part])

    def hold_out(self, share: float = HELD_OUT) -> tuple[Examples, Examples]:
        """All but the last `share` of the examples, to train on, and these, to evaluate on; each has at least one.

        Raises:
            DataError: there is but one example.
        """
        kept = len(self) - math.ceil(share * len(self))
        if not 0 < kept < len(self):
            raise DataError(
                f"{len(self)} examples cannot be divided into some to train on and some to evaluate on; "
                "lengthen the data, lower max_length or give data for the evaluation."
            )
        return self.select(0, kept), self.select(kept, len(self))

    def describe(self) -> str:
        """What came of the rows, on one line."""
        told = {
            Fate.TRUNCATED: "truncated to max_length",
            Fate.OVERLONG: "dropped for their length",
            Fate.EMPTY: "left out as empty",
        }
        parts = [f"{self.counts[fate]:,} rows {words}" for fate, words in told.items() if self.counts.get(fate)]
        return "; ".join([f"{len(self):,} examples, {self.tokens:,} tokens to predict", *parts])


def encode(
    source: Source, tokenizer: PreTrainedTokenizerBase, encoding: Encoding, *, processes: int | None = None
) -> Examples:
    """Encode all rows of a source, or take what an earlier run with the same rows, tokenizer and encoding has cached.

    Packing loses nothing: texts are joined over all rows, and the last block is kept, though short.

    Args:
        source: rows, not streaming.
        tokenizer: of the model.
        encoding: lengths, packing, and what to do with rows that do not fit.
        processes: how many tokenise at a time; a fast tokenizer uses all cores by itself.

    Raises:
        DataError: a row does not fit, or no example comes of the rows.
    """
    if isinstance(source.rows, IterableDataset):
        raise DataError(f"{source.name} is streaming; use StreamOrder, or open it with streaming=False.")
    encoder = Encoder(tokenizer, source.kind, encoding)
    dataset = _encoded(source.rows, source, encoder, processes)
    column = dataset.data.column("input_ids")
    fates = np.concatenate([np.empty(0, np.int8), *(chunk.to_numpy() for chunk in dataset.data.column("fate").chunks)])
    counts = {fate: int((fates == fate).sum()) for fate in Fate}
    ends = row_ends(column)
    starts = np.concatenate([[0], ends[:-1]]).astype(np.int64)
    if encoder.is_text:
        if encoder.packing:
            starts, ends = np.array([0]), ends[-1:]
        starts, ends = cut(starts, ends, encoding.max_length)
        labels, targets = None, ends - starts - 1
    else:
        kept = ends > starts
        labels, targets = TokenStream(dataset.data.column("labels")), _targets(dataset)[kept]
        starts, ends = starts[kept], ends[kept]
    if len(starts) == 0:
        raise DataError(f"{source.name}: no example of at least 2 tokens comes of it; give more text or other rows.")
    ids = TokenStream(column)
    return Examples(ids, labels, starts, ends, targets, padding_id(tokenizer), encoding.max_length, counts)


def _encoded(rows: Dataset, source: Source, encoder: Encoder, processes: int | None) -> Dataset:
    """The rows in tokens, row by row, in the cache where the rows have one."""
    tokens = datasets.Sequence(Value("int32"))
    values = {"input_ids": tokens, "fate": Value("int8")}
    if not encoder.is_text:
        values |= {"labels": tokens, "targets": Value("int32")}
    rows = rows.select_columns(list(source.columns)).with_format(None)
    # datasets would hash the tokenizer's pickle, which its first call changes.
    parts = f"{rows._fingerprint} {encoder.fingerprint()}"
    return rows.map(
        _Call(encoder, source),
        batched=True,
        batch_size=max(ROWS_A_CALL, encoder.rows_at_once),
        with_indices=True,
        writer_batch_size=ROWS_A_CALL,
        remove_columns=list(source.columns),
        features=Features(values),
        num_proc=processes,
        new_fingerprint=hashlib.sha256(parts.encode()).hexdigest()[:32],
        desc="encoding",
    )


@dataclass(frozen=True)
class _Call:
    """What datasets calls with some columns."""

    encoder: Encoder
    source: Source

    def __call__(self, columns: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        encoded = self.encoder.encode(rows, [f"{self.source.name}, row {index}" for index in indices])
        ids = [np.asarray(row.input_ids, np.int32) for row in encoded]
        found: dict[str, list[Any]] = {"input_ids": ids, "fate": [int(row.fate) for row in encoded]}
        if not self.encoder.is_text:
            found["labels"] = [np.asarray(row.labels, np.int32) for row in encoded]
            found["targets"] = [int((labels[1:] != IGNORED).sum()) for labels in found["labels"]]
        return found


def _targets(dataset: Dataset) -> Ints:
    chunks = dataset.data.column("targets").chunks
    return np.concatenate([np.empty(0, np.int64), *(chunk.to_numpy() for chunk in chunks)])
