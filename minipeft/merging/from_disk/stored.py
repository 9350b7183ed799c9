"""One tensor of a safetensors file, read where it lies: mapped into memory when it is used, and unmapped afterwards."""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minipeft.errors import CheckpointError, MergeError, printable
from minipeft.files.format import DTYPES, FLOATS
from minipeft.files.reading import reading
from minipeft.files.tensor_file import damaged, open_tensors

CHUNK = 2**23  # bytes that are copied or compared at a time


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file: its key, dtype by its name in the format, shape, and which bytes it takes."""

    path: Path
    key: str
    dtype: str
    shape: tuple[int, ...]
    start: int  # bytes from the beginning of the file
    nbytes: int

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """The dtype in torch; None for one that no adapter acts on, such as those of 8 bits."""
        return DTYPES.get(self.dtype)

    def read(self) -> Tensor:
        """The tensor, of the file's own pages: they are read when they are used, and a change stays in memory.

        Raises:
            MergeError: it is of a dtype that is never merged into.
        """
        dtype = self.torch_dtype
        if dtype is None:
            raise MergeError(
                f"{self.path}: {printable(self.key, 200)} is {self.dtype}; merge into {', '.join(FLOATS)}."
            )
        if self.nbytes == 0:
            return torch.empty(self.shape, dtype=dtype)
        before = self.start % mmap.ALLOCATIONGRANULARITY
        with reading(self.path), self.path.open("rb") as file:
            memory: Any = mmap.mmap(
                file.fileno(), before + self.nbytes, access=mmap.ACCESS_COPY, offset=self.start - before
            )
        if hasattr(mmap, "MADV_SEQUENTIAL"):
            memory.madvise(mmap.MADV_SEQUENTIAL)
        if before % dtype.itemsize:  # after tensors of single bytes
            memory, before = bytearray(memory[before:]), 0
        flat = torch.frombuffer(memory, dtype=dtype, count=self.nbytes // dtype.itemsize, offset=before)
        return flat.reshape(self.shape)

    def chunks(self) -> Iterator[bytes]:
        """The bytes, a few MiB at a time."""
        with reading(self.path), self.path.open("rb") as file:
            file.seek(self.start)
            left = self.nbytes
            while left:
                chunk = file.read(min(left, CHUNK))
                if not chunk:
                    raise CheckpointError(f"{self.path} became shorter while it was being read.")
                left -= len(chunk)
                yield chunk


def stored_tensors(path: Path) -> tuple[list[StoredTensor], dict[str, str]]:
    """The tensors of a safetensors file, in their order there, and its metadata; raises CheckpointError if it is damaged."""
    checked = open_tensors(path)  # the library checks that offsets, shapes and dtypes agree
    with reading(path), path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    found = []
    for key, entry in header.items():
        if key == "__metadata__":
            continue
        if key not in checked.shapes:
            raise damaged(path, f"{printable(key, 200)} is not what it was")
        start, end = entry["data_offsets"]
        found.append(StoredTensor(path, key, entry["dtype"], tuple(entry["shape"]), 8 + length + start, end - start))
    return sorted(found, key=lambda tensor: (tensor.start, tensor.nbytes)), dict(checked.metadata)


def same_bytes(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two tensors are equal bit for bit."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return all(a == b for a, b in zip(one.chunks(), other.chunks(), strict=True))
