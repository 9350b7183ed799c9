"""The boundary to the file system: whatever reading or writing a place raises becomes one of our errors.

JSON is read strictly: no key twice, no NaN, no deep nesting, no endless file.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minipeft.errors import CheckpointError, ConfigError, DataError, MinipeftError, told, told_error
from minipeft.files.not_an_adapter import named

MAX_CONFIG_BYTES, MAX_DEPTH = 2**20, 32


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
    """A path that a user gave; raises ConfigError if it is neither a string nor a path."""
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


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object of at most 1 MiB; raises CheckpointError if the file holds anything else."""
    payload = read_limited(path, MAX_CONFIG_BYTES)
    try:
        values = parse(payload)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({told_error(error, 100)}).{named(path)}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds a {type(values).__name__}, not an object.")
    return values


def parse(payload: bytes) -> Any:
    """The value of a JSON text; raises ValueError or RecursionError if it is not valid or not strict."""
    value = json.loads(payload.decode("utf-8"), object_pairs_hook=_object, parse_constant=_refuse)
    level = [value] if type(value) in (dict, list) else []
    for _ in range(MAX_DEPTH):  # code that reads the value later may recurse into it
        level = [item for inner in level for item in (inner.values() if type(inner) is dict else inner)]
        level = [item for item in level if type(item) in (dict, list)]
    if level:
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels")
    return value


def object_in(text: str) -> dict[str, Any] | None:
    """The JSON object in a text, read as strictly; None if the text is not one."""
    try:
        value = parse(text.encode())
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a key occurs twice")
    return table


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def read_text(path: Path) -> str:
    """A text that a user gave, in UTF-8; raises DataError if it cannot be read."""
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeError) as error:
        raise DataError(f"{path} cannot be read as text ({told_error(error)}).") from None


def check_inside(directory: Path, name: str) -> None:
    """Check that a file of a folder is in it, if it is a link. In the hub's cache it is one to ``blobs``, which is allowed.

    Raises:
        CheckpointError: the link leads out of the folder, as one in an archive from a stranger may.
    """
    if not os.path.islink(directory / name) or is_inside(directory, Path(os.path.realpath(directory / name))):
        return
    raise CheckpointError(
        f"{directory / name} is a link that leads out of its folder, to {os.path.realpath(directory / name)}. Put the file "
        "itself there."
    )


def is_inside(directory: Path, target: Path) -> bool:
    """Whether a path without links is in this folder, or is where the hub's cache keeps the contents of its files."""
    folder = Path(os.path.realpath(directory))
    # .../models--owner--name/snapshots/<commit>/[folder/]file -> .../models--owner--name/blobs/<digest>
    stores = [parent.parent / "blobs" for parent in (folder, *folder.parents) if parent.name == "snapshots"]
    return any(target.is_relative_to(place) for place in (folder, *stores))
