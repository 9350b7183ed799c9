"""Writing files completely or not at all: to a temporary name, fsync, then rename."""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
import socket
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from minipeft.errors import CheckpointError, MinipeftError, told_error
from minipeft.files.reading import is_inside


@dataclass(frozen=True)
class Pieces:
    """Contents of a file that are made while it is written."""

    nbytes: int  # length of all of them
    parts: Iterator[bytes | memoryview]  # in order; read once
    header: int  # bytes of a safetensors file's header, without its length


def write_files(directory: Path, files: Mapping[str, bytes | Pieces]) -> None:
    """Write several files into a directory and folders in it, created if need be: all to temporary names, then renamed in order.

    A crash leaves each file old or new, never cut short. Links within the folder are followed, so a linked file stays a
    link; one that leads out of it is replaced by a file. Temporary files of killed processes of this machine are removed.

    Raises:
        CheckpointError: the directory cannot be written or the disk is full; the old files are unchanged.
    """
    temporary: dict[Path, Path] = {}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name in files:
            for orphan in orphans(_target(directory, name), "tmp"):
                orphan.unlink(missing_ok=True)
        needed, free = sum(map(_length, files.values())), shutil.disk_usage(directory).free
        if needed > free:
            raise CheckpointError(f"{directory}: {needed:,} bytes are needed and {free:,} are free.")
        for name, payload in files.items():
            target = _target(directory, name)
            if target.is_dir():  # which renaming would find after it has replaced other files
                raise CheckpointError(f"{target} cannot be written, since it is a folder; all files are unchanged.")
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary[target] = hidden_beside(target, "tmp")
            write_and_sync(temporary[target], payload)
        for target, source in temporary.items():
            os.replace(source, target)
        for folder in {target.parent for target in temporary}:
            sync_folder(folder)
    except MinipeftError:
        raise
    except Exception as error:  # also ValueError, for a path with a NUL
        raise CheckpointError(
            f"{directory} cannot be written ({told_error(error)}); its files are unchanged."
        ) from None
    finally:
        for source in temporary.values():
            with contextlib.suppress(OSError):  # as in a directory that cannot be written
                source.unlink(missing_ok=True)


def _target(directory: Path, name: str) -> Path:
    """The file to replace: where a link within the folder leads to, and otherwise the name in the folder, link or not."""
    target = Path(os.path.realpath(directory / name))
    return target if is_inside(directory, target) else Path(os.path.realpath(directory)) / name


def hidden_beside(target: Path, kind: str) -> Path:
    """A new hidden name ``.<name>.<kind>-<host>-<process id>-<random>`` in the folder of a file or folder."""
    return target.with_name(f".{target.name}.{kind}-{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}")


def _length(payload: bytes | Pieces) -> int:
    return payload.nbytes if isinstance(payload, Pieces) else len(payload)


def write_and_sync(path: Path, payload: bytes | Pieces) -> None:
    """Write a new file and wait until the disk has it."""
    # os.open applies the umask to 0666, as for any file a user writes; safetensors' own files are 0600.
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    with os.fdopen(descriptor, "wb") as file:
        for part in payload.parts if isinstance(payload, Pieces) else (payload,):
            file.write(part)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the disk has the names in a folder."""
    if os.name == "posix":  # other systems cannot open a directory
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def orphans(target: Path, kind: str) -> Iterator[Path]:
    """Files and folders that `hidden_beside` named, left by processes of this machine that have ended."""
    for path in target.parent.glob(glob.escape(f".{target.name}.{kind}-{socket.gethostname()}-") + "*"):
        pid = path.name.rsplit("-", 2)[-2]
        if pid.isdigit() and not alive(int(pid)):
            yield path


def alive(pid: int) -> bool:
    """Whether a process of this machine is running; True if that cannot be determined."""
    if os.name != "posix":
        return True  # signal 0 would end the process there
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
