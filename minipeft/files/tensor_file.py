"""Reading safetensors files: first the header, then the tensors that are wanted."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor
from typing_extensions import Self

from minipeft.errors import CheckpointError, shown, told_error
from minipeft.files.not_an_adapter import named
from minipeft.kernels.functional import is_finite

MAX_HEADER_BYTES = 2**24
MAX_DIMENSIONS = 16  # a long shape takes long to multiply and to show


@dataclass(frozen=True)
class Made:
    """A tensor that the file holds in another form, made when it is read."""

    sources: tuple[str, ...]  # the tensors that it is made of, by the keys that stand in the file
    shape: tuple[int, ...]
    dtype: str
    function: Callable[..., Tensor]  # of the sources in their order


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file whose header has been read: shapes, dtypes ("F32", "BF16", ...) and metadata by key.

    `stored_as` says which key stands in the file for one that was renamed, and `made` how to make one that does not.
    """

    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]
    metadata: Mapping[str, str]
    stored_as: Mapping[str, str] = field(default_factory=dict, kw_only=True)
    made: Mapping[str, Made] = field(default_factory=dict, kw_only=True)

    def renamed(self, rename: Callable[[str], str]) -> Self:
        """The same file under other keys; as it is if two keys would become one."""
        keys = {rename(key): key for key in self.shapes}
        if len(keys) < len(self.shapes):
            return self
        shapes, dtypes = ({new: old[key] for new, key in keys.items()} for old in (self.shapes, self.dtypes))
        stored_as = {new: self.stored_as.get(key, key) for new, key in keys.items()}
        made = {new: self.made[key] for new, key in keys.items() if key in self.made}
        return replace(self, shapes=shapes, dtypes=dtypes, stored_as=stored_as, made=made)  # type: ignore[arg-type]

    def read(self, keys: Iterable[str] | None = None, *, finite: bool = True) -> dict[str, Tensor]:
        """Read these tensors (None: all) into memory.

        Raises:
            CheckpointError: the file is damaged or has changed; or `finite` is True and it holds NaN or infinity.
        """
        try:
            before = _state_of(self.path)
            # Not mapped: each tensor has memory of its own, since the file may be removed while its tensors are in use.
            with safe_open(self.path, "pt", backend="pread") as file:
                tensors = {key: self._tensor(file, key) for key in (self.shapes if keys is None else keys)}
            changed = before != _state_of(self.path)
        except Exception as error:  # the library's and the system's
            raise damaged(self.path, error) from None
        if changed or any(tensor.shape != self.shapes[key] for key, tensor in tensors.items()):
            raise CheckpointError(f"{self.path} changed while it was being read.")
        broken = [key for key, t in tensors.items() if finite and t.is_floating_point() and not is_finite(t)]
        if broken:
            raise CheckpointError(f"{self.path} holds NaN or infinity in {shown(broken, 3)}.")
        return tensors

    def _tensor(self, file: Any, key: str) -> Tensor:
        if key not in self.made:
            tensor: Tensor = file.get_tensor(self.stored_as.get(key, key))
            return tensor
        sources = [file.get_tensor(source) for source in self.made[key].sources]
        made = self.made[key].function(*sources).contiguous()
        whole = {source.untyped_storage().data_ptr() for source in sources}
        return made.clone() if made.untyped_storage().data_ptr() in whole else made  # a part does not keep all of it


def _state_of(path: Path) -> tuple[int, ...]:
    """By which a file is known to be still the same."""
    state = path.stat()
    return state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns


def open_tensors(path: Path) -> TensorFile:
    """Read the header of a safetensors file.

    Raises:
        CheckpointError: the file is missing, damaged, or not a plain file.
    """
    if not os.path.isfile(path):  # a FIFO would block for ever
        raise CheckpointError(f"{path} is not a plain file, or cannot be seen.")
    try:
        _check_header_length(path)
        with safe_open(path, "pt") as file:
            slices = {key: file.get_slice(key) for key in sorted(file.keys())}
            shapes = {key: tuple(part.get_shape()) for key, part in slices.items()}
            dtypes = {key: str(part.get_dtype()) for key, part in slices.items()}
            metadata = file.metadata() or {}
    except PermissionError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}).") from None
    except Exception as error:
        raise damaged(path, error) from None
    if any(len(shape) > MAX_DIMENSIONS for shape in shapes.values()):
        raise damaged(path, f"a tensor of more than {MAX_DIMENSIONS} dimensions")
    return TensorFile(path, shapes, dtypes, metadata)


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


def damaged(path: Path, reason: object) -> CheckpointError:
    """The error for a file whose bytes are not what they should be."""
    said = told_error(reason) if isinstance(reason, Exception) else reason
    return CheckpointError(f"{path} is damaged ({said}).{named(path)}")
