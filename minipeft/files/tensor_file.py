"""Reading safetensors files: first the header, then the tensors that are wanted."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open
from torch import Tensor
from typing_extensions import Self

from minipeft.errors import CheckpointError, shown, told_error
from minipeft.files.not_an_adapter import named
from minipeft.kernels.functional import is_finite

MAX_HEADER_BYTES = 2**24
MAX_DIMENSIONS = 16  # a long shape takes long to multiply and to show


class Entry(NamedTuple):
    """A tensor of a file, unread."""

    shape: tuple[int, ...]
    dtype: str  # "F32", "BF16", ...
    sources: tuple[str, ...]  # what it is read from, by the keys that stand in the file
    function: Callable[..., Tensor] | None = None  # makes it of these, in their order; None: it is the only one


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file whose header has been read; the keys need not be those that stand in it."""

    path: Path
    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]
    _: KW_ONLY
    state: tuple[int, ...] | None = None  # of the file when its header was read, see `_state_of`; None: not known

    @functools.cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of each tensor."""
        return {key: entry.shape for key, entry in self.entries.items()}

    @functools.cached_property
    def dtypes(self) -> Mapping[str, str]:
        """The dtype of each tensor."""
        return {key: entry.dtype for key, entry in self.entries.items()}

    def renamed(self, rename: Callable[[str], str]) -> Self:
        """The same file under other keys; as it is if two keys would become one."""
        entries = {rename(key): entry for key, entry in self.entries.items()}
        return replace(self, entries=entries) if len(entries) == len(self.entries) else self

    def making(
        self, function: Callable[..., Tensor], keys: Sequence[str], shape: Sequence[int], dtype: str | None = None
    ) -> Entry:
        """A tensor that a function makes of these, when it is read; by default it has the dtype of the first."""
        parts = [self.entries[key] for key in keys]

        def of_stored(*tensors: Tensor) -> Tensor:
            left = iter(tensors)
            return function(*(_made(part, [next(left) for _ in part.sources]) for part in parts))

        sources = tuple(source for part in parts for source in part.sources)
        return Entry(tuple(shape), dtype or parts[0].dtype, sources, of_stored)

    def read(self, keys: Iterable[str] | None = None, *, finite: bool = True) -> dict[str, Tensor]:
        """Read these tensors (None: all) into memory.

        Raises:
            CheckpointError: the file is damaged or has changed; or `finite` is True and it holds NaN or infinity.
        """
        try:
            before = self.state or _state_of(self.path)
            # Not mapped: each tensor has memory of its own, since the file may be removed while its tensors are in use.
            with safe_open(self.path, "pt", backend="pread") as file:
                tensors = {key: _read(file, self.entries[key]) for key in (self.entries if keys is None else keys)}
            changed = before != _state_of(self.path)
        except Exception as error:  # the library's and the system's
            if not _was_replaced(self.path, self.state):
                raise unreadable(self.path, error) from None
            tensors, changed = {}, True
        if changed or any(tensor.shape != self.shapes[key] for key, tensor in tensors.items()):
            raise CheckpointError(f"{self.path} changed while it was being read.")
        broken = [key for key, t in tensors.items() if finite and t.is_floating_point() and not is_finite(t)]
        if broken:
            raise CheckpointError(f"{self.path} holds NaN or infinity in {shown(broken, 3)}.")
        return tensors


def _read(file: Any, entry: Entry) -> Tensor:
    if entry.function is None:
        tensor: Tensor = file.get_tensor(entry.sources[0])
        return tensor
    stored = {source: file.get_tensor(source) for source in dict.fromkeys(entry.sources)}
    made = _made(entry, [stored[source] for source in entry.sources]).contiguous()
    whole = {tensor.untyped_storage().data_ptr() for tensor in stored.values()}
    return made.clone() if made.untyped_storage().data_ptr() in whole else made  # a part does not keep all of it


def _made(entry: Entry, sources: list[Tensor]) -> Tensor:
    return sources[0] if entry.function is None else entry.function(*sources)


def _state_of(path: Path) -> tuple[int, ...]:
    """By which a file is known to be still the same."""
    state = path.stat()
    return state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns


def _was_replaced(path: Path, before: tuple[int, ...] | None) -> bool:
    """Whether another file is there by now."""
    try:
        return before is not None and before != _state_of(path)
    except OSError:
        return False


def open_tensors(path: Path) -> TensorFile:
    """Read the header of a safetensors file.

    Raises:
        CheckpointError: the file is missing, damaged, or not a plain file.
    """
    if not os.path.isfile(path):  # a FIFO would block for ever
        raise CheckpointError(f"{path} is not a plain file, or cannot be seen.")
    try:
        state = _state_of(path)
        _check_header_length(path)
        with safe_open(path, "pt") as file:
            slices = {key: file.get_slice(key) for key in sorted(file.keys())}
            entries = {
                key: Entry(tuple(part.get_shape()), str(part.get_dtype()), (key,)) for key, part in slices.items()
            }
            metadata = file.metadata() or {}
    except Exception as error:
        raise unreadable(path, error) from None
    if any(len(entry.shape) > MAX_DIMENSIONS for entry in entries.values()):
        raise damaged(path, f"a tensor of more than {MAX_DIMENSIONS} dimensions")
    return TensorFile(path, entries, metadata, state=state)


def _check_header_length(path: Path) -> None:
    # The library checks offsets, sizes, dtypes and nesting, and that no byte is left over. But it allows a header of
    # 100 MB, and takes 5 s and 3 GiB to refuse one of 64 MiB of '{"":0},'. A real header is shorter than its tensors.
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if header_is_too_long(length, path.stat().st_size):
        raise OSError(f"its header claims {length:,} bytes")


def header_is_too_long(length: int, size: int) -> bool:
    """Whether the header of a file of this size is not one that is read; both in bytes."""
    return length > max(MAX_HEADER_BYTES, size - length)


def unreadable(path: Path, error: Exception) -> CheckpointError:
    """The error for a file that was not read: what the system says, if it does not open it, and else that it is damaged."""
    try:
        with path.open("rb"):  # the library says "no such file" of whatever keeps it from opening one
            pass
    except OSError as reason:
        error = reason
    if isinstance(error, OSError) and error.errno is not None:
        return CheckpointError(f"{path} cannot be read ({told_error(error)}).")
    return damaged(path, error)


def damaged(path: Path, reason: object) -> CheckpointError:
    """The error for a file whose bytes are not what they should be."""
    said = told_error(reason) if isinstance(reason, Exception) else reason
    return CheckpointError(f"{path} is damaged ({said}).{named(path)}")
