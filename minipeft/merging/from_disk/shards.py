"""The files of the merged checkpoint: sharded and ordered as the base's, written one tensor at a time.

A safetensors file is 8 bytes with the length of its header, the header in JSON, and the tensors. Shapes and dtypes are
known before the values are, so the header comes first and each tensor goes to its place whenever it is ready.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from minipeft.files.format import NAMES
from minipeft.files.tensor_bytes import header_bytes
from minipeft.merging.from_disk.stored import CHUNK, StoredTensor


@dataclass(frozen=True)
class Entry:
    """One tensor of a file to write: copied from `source`, or written later if that is None."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    source: StoredTensor | None = None


def copied(source: StoredTensor, key: str | None = None) -> Entry:
    """The entry of a tensor that stays as it is, under its own key or another."""
    return Entry(source.key if key is None else key, source.dtype, source.shape, source.nbytes, source)


def to_write(key: str, like: Tensor) -> Entry:
    """The entry of a tensor of this shape and dtype whose values come later."""
    return Entry(key, NAMES[like.dtype], tuple(like.shape), like.numel() * like.element_size())


class ShardWriter:
    """An open file with its header written; tensors are copied or written to their places."""

    def __init__(self, path: Path, entries: Sequence[Entry], metadata: Mapping[str, str]) -> None:
        self.entries = list(entries)
        sizes = [(entry.key, entry.dtype, entry.shape, entry.nbytes) for entry in self.entries]
        header = header_bytes(sizes, {"__metadata__": dict(metadata)} if metadata else {})
        self.starts: dict[str, int] = {}
        end = len(header)
        for entry in self.entries:
            self.starts[entry.key], end = end, end + entry.nbytes
        self.left = {entry.key: entry for entry in self.entries if entry.source is None}
        self.file: BinaryIO = path.open("xb")
        self.file.write(header)
        self.file.truncate(end)

    def copy(self) -> Iterator[Entry]:
        """Copy what stays as it is, and give each entry when that is done."""
        for entry in self.entries:
            if entry.source is not None:
                self.file.seek(self.starts[entry.key])
                for chunk in entry.source.chunks():
                    self.file.write(chunk)
                yield entry

    def write(self, key: str, value: Tensor) -> None:
        """Write a tensor to its place."""
        entry = self.left.pop(key)
        assert (tuple(value.shape), NAMES[value.dtype]) == (entry.shape, entry.dtype), (key, value.shape, value.dtype)
        if value.numel():
            payload = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
            self.file.seek(self.starts[key])
            for start in range(0, len(payload), CHUNK):
                self.file.write(payload[start : start + CHUNK].data)

    def finish(self) -> None:
        """Wait until the disk has it all."""
        assert not self.left, f"not written: {sorted(self.left)[:3]}"
        self.file.flush()
        os.fsync(self.file.fileno())


@contextlib.contextmanager
def open_shards(
    folder: Path, shards: Mapping[str, Sequence[Entry]], metadata: Mapping[str, Mapping[str, str]]
) -> Iterator[dict[str, ShardWriter]]:
    """Files to write in a folder, by name; closed at the end."""
    with contextlib.ExitStack() as stack:
        writers = {}
        for name, entries in shards.items():
            writers[name] = ShardWriter(folder / name, entries, metadata.get(name, {}))
            stack.callback(writers[name].file.close)
        yield writers
