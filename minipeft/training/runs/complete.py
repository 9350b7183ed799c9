"""``COMPLETE``: the size and the sha256 of each file of a checkpoint, as JSON, written when all else is on the disk."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from pathlib import Path
from typing import Any

from minipeft.errors import CheckpointError, shown, told_error
from minipeft.files.atomic import sync_folder, write_and_sync
from minipeft.files.reading import read_limited

COMPLETE, FORMAT = "COMPLETE", 1
MAX_COMPLETE_BYTES, CHUNK_BYTES = 2**20, 2**22
FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")


def seal(folder: Path, step: int) -> None:
    """Bring plain files of a folder to the disk, then a ``COMPLETE`` that describes them; raises CheckpointError if there are none."""
    mode = folder.stat().st_mode & 0o666  # what the umask gives any file; safetensors' own files are 0600
    files = {}
    for path in sorted(folder.iterdir()):
        _check_file(path)
        os.chmod(path, mode)
        files[path.name] = {"size": path.stat().st_size, "sha256": _digest(path, sync=True)}
    if not files:
        raise CheckpointError("no file was written")
    text = json.dumps({"format": FORMAT, "step": step, "files": files}, indent=2) + "\n"
    write_and_sync(folder / COMPLETE, text.encode("utf-8"))
    sync_folder(folder)


def described(path: Path, step: int | None = None) -> dict[str, tuple[int, str]] | None:
    """Size and sha256 by file name as ``COMPLETE`` has them; None if it is missing, malformed or of another step."""
    try:
        values: Any = json.loads(read_limited(path / COMPLETE, MAX_COMPLETE_BYTES))
        files = {str(name): (entry["size"], entry["sha256"]) for name, entry in values["files"].items()}
        saved_step, version = values["step"], values["format"]
    except (CheckpointError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    sound = all(
        FILE_NAME.fullmatch(name) and name != COMPLETE and type(size) is int and type(sha256) is str
        for name, (size, sha256) in files.items()
    )
    return files if files and sound and version == FORMAT and step in (None, saved_step) else None


def fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint, compared byte for byte with its ``COMPLETE`` by sums; None if it is sound."""
    files = described(folder)
    if files is None:
        return f"{folder} is not a complete checkpoint: it has no valid {COMPLETE}"
    there = {path.name for path in folder.iterdir()} - {COMPLETE}
    if there != files.keys():
        missing, unexpected = shown(sorted(files.keys() - there)), shown(sorted(there - files.keys()))
        return f"{folder} is not what was saved: missing {missing}; unexpected {unexpected}"
    for name, (size, sha256) in files.items():
        path = folder / name
        try:
            if not stat.S_ISREG(path.lstat().st_mode):
                return f"{path} is not a plain file"
            if path.stat().st_size != size:
                return f"{path} is damaged: it has {path.stat().st_size:,} bytes, and {size:,} were saved"
            if _digest(path) != sha256:
                return f"{path} is damaged: its sha256 is not the one in {COMPLETE}"
        except OSError as error:
            return f"{path} cannot be read ({told_error(error)})"
    return None


def _check_file(path: Path) -> None:
    if path.name == COMPLETE or not FILE_NAME.fullmatch(path.name) or not stat.S_ISREG(path.lstat().st_mode):
        raise CheckpointError(
            f"{path.name!r:.150} is not a plain file with a name of letters, digits, '_', '-' and '.', other than {COMPLETE}"
        )


def _digest(path: Path, *, sync: bool = False) -> str:
    digest = hashlib.sha256()
    with path.open("rb+" if sync else "rb") as file:
        if sync:
            os.fsync(file.fileno())
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
