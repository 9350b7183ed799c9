"""The boundary to the file system: whatever reading or writing a place raises becomes one of our errors."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from minipeft.errors import CheckpointError, ConfigError, MinipeftError, told, told_error


def reading(place: object) -> contextlib.AbstractContextManager[None]:
    """Within the context every exception becomes a `CheckpointError` that says that this place cannot be read."""
    return _ours(f"{place} cannot be read")


def writing(place: object) -> contextlib.AbstractContextManager[None]:
    """Within the context every exception becomes a `CheckpointError` that says that this place cannot be written."""
    return _ours(f"{place} cannot be written")


@contextlib.contextmanager
def _ours(said: str) -> Iterator[None]:
    try:
        yield
    except (MinipeftError, Warning):  # a warning is raised only where the user wants that
        raise
    except Exception as error:
        raise CheckpointError(f"{said} ({told_error(error)}).") from error


def as_path(place: object, argument: str) -> Path:
    """A path that a user gave.

    Raises:
        ConfigError: it is neither a string nor a path.
    """
    if not isinstance(place, str | os.PathLike) or not isinstance(os.fspath(place), str):
        raise ConfigError(f"{argument} must be the path of a directory, not {told(place)}.")
    return Path(place)


def read_limited(path: Path, limit: int) -> bytes:
    """Read a file of at most `limit` bytes.

    Raises:
        CheckpointError: it is missing, unreadable, larger, or not a plain file.
    """
    if os.path.exists(path) and not os.path.isfile(path):  # unlike Path's, they never raise
        raise CheckpointError(f"{path} is not a plain file.")  # a FIFO would block for ever
    with reading(path), path.open("rb") as file:
        payload = file.read(limit + 1)
    if len(payload) > limit:
        raise CheckpointError(f"{path} is larger than {limit:,} bytes, too large for an adapter.")
    return payload
