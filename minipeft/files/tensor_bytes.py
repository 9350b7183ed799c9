"""The bytes of a safetensors file, made one tensor at a time, so that writing one takes no memory for a second copy.

The file is the one that the library writes, bit for bit, but for the order of its metadata: the library takes that of a
hash map, which differs from call to call, and equal adapters should be equal bytes.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from minipeft.errors import CheckpointError
from minipeft.files.atomic import Pieces

# By the order in which the library writes them: widest first, so that each tensor is aligned.
DTYPES = {
    torch.uint64: "U64", torch.int64: "I64", torch.float64: "F64", torch.complex64: "C64",
    torch.float32: "F32", torch.uint32: "U32", torch.int32: "I32", torch.bfloat16: "BF16",
    torch.float16: "F16", torch.uint16: "U16", torch.int16: "I16", torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def header_of(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[bytes, list[str]]:
    """The header, with its length in front, and the keys in the order in which their tensors follow.

    Raises:
        CheckpointError: the format has no name for a tensor's dtype.
    """
    strange = next((key for key, tensor in tensors.items() if tensor.dtype not in DTYPES), None)
    if strange is not None:
        raise CheckpointError(f"{strange} is {tensors[strange].dtype}, which safetensors files cannot hold.")
    rank = {dtype: place for place, dtype in enumerate(DTYPES)}
    keys = sorted(tensors, key=lambda key: (rank[tensors[key].dtype], key))
    entries = [(key, DTYPES[t.dtype], t.shape, t.nbytes) for key in keys for t in [tensors[key]]]
    return header_bytes(entries, {"__metadata__": dict(sorted(metadata.items()))}), keys


def header_bytes(entries: Iterable[tuple[str, str, Sequence[int], int]], header: dict[str, Any]) -> bytes:
    """A header, with its length in front: `header`, and the (key, dtype, shape, bytes) of the tensors in their order."""
    end = 0
    for key, dtype, shape, nbytes in entries:
        header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end := end + nbytes]}
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)  # the format aligns the tensors to 8 bytes
    return struct.pack("<Q", len(text)) + text


def file_of(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Pieces:
    """A file with these tensors, on any device and in any layout; each is read when its turn comes.

    Raises:
        CheckpointError: see `header_of`.
    """
    header, keys = header_of(tensors, metadata)

    def parts() -> Iterator[bytes | memoryview]:
        yield header
        for key in keys:
            if tensors[key].numel():
                yield _bytes(tensors[key])

    return Pieces(len(header) + sum(t.nbytes for t in tensors.values()), parts(), len(header) - 8)


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
