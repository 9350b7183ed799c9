"""Checkpoints of a run: folders that are there whole or not at all, and say so themselves.

``<run>/checkpoints/step-00000120/`` holds what a run saved after update 120, and beside it ``COMPLETE``: the size and
the sha256 of each file, as JSON. A save writes into a hidden folder, waits for the disk, writes ``COMPLETE``, waits
again, renames the folder, and only then removes what is older than the newest `keep`. So a run that dies at any moment
leaves the old checkpoints, or these and the new one. One process writes a run directory at a time: see `RunLock`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import socket
import stat
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from minipeft.errors import CheckpointError, ConfigError, shown
from minipeft.files.atomic import alive, hidden_beside, read_limited, sync_folder, write_and_sync
from minipeft.training.runs.faults import fault_point

COMPLETE, FORMAT = "COMPLETE", 1
MAX_COMPLETE_BYTES, CHUNK_BYTES = 2**20, 2**22
FOREIGN_LEFTOVER_SECONDS = 24 * 3600  # whether a process of another machine lives cannot be told, but a save ends
STEP_NAME = re.compile(r"step-(\d{8,})")
HIDDEN_NAME = re.compile(r"\.(step-\d{8,})\.(tmp|old|trash)-(.*)-(\d+)-[0-9a-f]{8}")
FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")


class Checkpoints:
    """The checkpoints of one run directory.

    Args:
        directory: of the run; the checkpoints are in ``checkpoints`` under it, made with the first save.
        keep: how many to keep, at least 1; the newest.

    Raises:
        ConfigError: `keep` is no such number.
    """

    def __init__(self, directory: str | os.PathLike[str], keep: int = 2) -> None:
        if type(keep) is not int or keep < 1:
            raise ConfigError(f"keep={keep!r} is not allowed: give the number of checkpoints to keep, 1 or more.")
        self.folder = Path(directory) / "checkpoints"
        self.keep = keep

    def latest(self) -> Path | None:
        """The newest complete checkpoint, or None; a newer folder without a valid ``COMPLETE`` is warned about.

        Its sums are compared when it is opened, by `verify`; there a damaged one is an error that names the one
        before. This never answers with an older one instead.
        """
        complete = _complete(self.folder)
        newest = max(complete, default=-1)
        broken = [path.name for step, path in _folders(self.folder).items() if step > newest]
        if broken:
            warnings.warn(f"{self.folder}: {shown(sorted(broken))} is not complete and was passed over.", stacklevel=2)
        return complete.get(newest)

    def save(self, step: int, write: Callable[[Path], object], *, needed: int = 0) -> Path:
        """Save a checkpoint, durably, then remove all but the newest `keep`; also what killed processes left behind.

        A checkpoint of the same step is replaced.

        Args:
            step: number of updates done.
            write: is given a new, empty folder and puts its files there; plain files, no folders.
            needed: bytes that this will take, if known: it is not begun where they are not free.

        Returns:
            The folder of the checkpoint.

        Raises:
            CheckpointError: the disk is full or not writable, or there are newer checkpoints, which `discard_newer`
                removes. The other checkpoints are as they were, nothing else is left, and the run can go on.
        """
        if type(step) is not int or step < 0:
            raise ConfigError(f"step {step!r} is not allowed: give the number of updates done.")
        final = self.folder / f"step-{step:08d}"
        newer = _newer(self.folder, step)
        if newer:
            raise CheckpointError(
                f"{final}: there are newer checkpoints ({shown(path.name for path in newer)}), so it would not be the latest; nothing was "
                f"saved. Where the run was taken back to an older one on purpose, call discard_newer({step})."
            )
        temporary = hidden_beside(final, "tmp")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            sync_folder(self.folder.parent)
            self._tidy()
            if needed > shutil.disk_usage(self.folder).free:
                raise CheckpointError("it was not begun")
            temporary.mkdir()
            fault_point("temporary_made")
            write(temporary)
            fault_point("files_written")
            _seal(temporary, step)
            _put_in_place(temporary, final)
        except (OSError, SafetensorError, CheckpointError) as error:
            raise CheckpointError(self._failure(final, needed, error)) from None
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        fault_point("before_prune")
        self._remove([path for _, path in sorted(_complete(self.folder).items())[: -self.keep]])
        fault_point("after_prune")
        return final

    def discard_newer(self, step: int) -> list[Path]:
        """Remove every checkpoint after `step`, for a run that is taken back to it; returns what was removed."""
        newer = _newer(self.folder, step)
        self._remove(newer[::-1])  # the newest first, so that an interrupted removal leaves no gap
        return newer

    def _failure(self, final: Path, needed: int, error: Exception) -> str:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
        with_need = f"{needed:,} bytes are needed, " if needed else ""
        try:
            with_need += f"{shutil.disk_usage(self.folder).free:,} are free"
        except OSError:
            with_need += "how many are free is not known"
        return f"{final} could not be saved ({reason}; {with_need}); the checkpoints before it are as they were."

    def _tidy(self) -> None:
        """Remove, or put back, what saves left behind that were cut off."""
        for hidden, name, kind in _leftovers(self.folder):
            if kind == "old" and not (self.folder / name).exists():
                os.rename(hidden, self.folder / name)  # the save that was to replace it did not come that far
                sync_folder(self.folder)
            else:
                shutil.rmtree(hidden, ignore_errors=True)

    def _remove(self, paths: list[Path]) -> None:
        """Remove checkpoints; each loses its name first, so that none is ever there in part."""
        for path in paths:
            trash = hidden_beside(path, "trash")
            try:
                os.rename(path, trash)
                fault_point("pruned_one_renamed")
                shutil.rmtree(trash)
            except OSError as error:
                warnings.warn(f"{path} could not be removed ({error.strerror or error}).", stacklevel=3)


# ------------------------------------------------------------------------------------------------------------- writing
def _seal(folder: Path, step: int) -> None:
    """Bring the files to the disk, and then a ``COMPLETE`` that describes them."""
    mode = folder.stat().st_mode & 0o666  # as the umask has it for any file; safetensors' own files are 0600
    files = {}
    for path in sorted(folder.iterdir()):
        _check_file(path)
        os.chmod(path, mode)
        files[path.name] = {"size": path.stat().st_size, "sha256": _digest(path, sync=True)}
    if not files:
        raise CheckpointError("no file was written")
    fault_point("files_synced")
    text = json.dumps({"format": FORMAT, "step": step, "files": files}, indent=2) + "\n"
    write_and_sync(folder / COMPLETE, text.encode("utf-8"))
    fault_point("complete_written")
    sync_folder(folder)


def _put_in_place(temporary: Path, final: Path) -> None:
    """Give a sealed folder its name. One of that name makes way, under a name by which `latest` and `save` find it."""
    fault_point("before_rename")
    aside = hidden_beside(final, "old") if final.exists() else None
    if aside is not None:
        os.rename(final, aside)
        fault_point("old_set_aside")
    try:
        os.rename(temporary, final)
    except OSError:
        if aside is not None:
            os.rename(aside, final)
        raise
    fault_point("after_rename")
    sync_folder(final.parent)
    if aside is not None:
        shutil.rmtree(aside, ignore_errors=True)


def _check_file(path: Path) -> None:
    if path.name == COMPLETE or not FILE_NAME.fullmatch(path.name) or not stat.S_ISREG(path.lstat().st_mode):
        raise CheckpointError(
            f"{path.name!r:.150} is no plain file with a name of letters, digits, '_', '-' and '.', other than {COMPLETE}"
        )


def _digest(path: Path, *, sync: bool = False) -> str:
    digest = hashlib.sha256()
    with path.open("rb+" if sync else "rb") as file:
        if sync:
            os.fsync(file.fileno())
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------------------- finding
def _folders(folder: Path) -> dict[int, Path]:
    """Every folder that is named as a checkpoint, by step, complete or not."""
    matches = [(STEP_NAME.fullmatch(path.name), path) for path in _entries(folder)]
    found = {int(match[1]): path for match, path in matches if match and path.is_dir()}
    return {step: path for step, path in found.items() if path.name == f"step-{step:08d}"}


def _complete(folder: Path) -> dict[int, Path]:
    """The complete checkpoints by step, with those that a save cut off was about to replace."""
    found = _folders(folder)
    for hidden, name, kind in _leftovers(folder, dead=False):
        if kind == "old":
            found.setdefault(int(name.removeprefix("step-")), hidden)
    return {step: path for step, path in found.items() if _described(path, step) is not None}


def _newer(folder: Path, step: int) -> list[Path]:
    """All that stands, or stood, under the name of a later step, complete or not."""
    found = {**_complete(folder), **_folders(folder)}
    return [path for other, path in sorted(found.items()) if other > step]


def _leftovers(folder: Path, *, dead: bool = True) -> Iterator[tuple[Path, str, str]]:
    """(path, name to be, kind) of the hidden folders of saves; `dead`: only of such as cannot be going on."""
    for path in _entries(folder):
        match = HIDDEN_NAME.fullmatch(path.name)
        if match and path.is_dir() and not (dead and _may_go_on(path, match[3], int(match[4]))):
            yield path, match[1], match[2]


def _may_go_on(path: Path, host: str, pid: int) -> bool:
    if host == socket.gethostname():
        return pid != os.getpid() and alive(pid)  # a new life of a container has the old one's process ids
    return time.time() - path.stat().st_mtime < FOREIGN_LEFTOVER_SECONDS


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def _described(path: Path, step: int | None = None) -> dict[str, tuple[int, str]] | None:
    """Size and sha256 by file name as ``COMPLETE`` has them; None where there is none that makes sense."""
    try:
        values: Any = json.loads(read_limited(path / COMPLETE, MAX_COMPLETE_BYTES))
        files = {str(name): (entry["size"], entry["sha256"]) for name, entry in values["files"].items()}
        told, version = values["step"], values["format"]
    except (CheckpointError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    sound = all(
        FILE_NAME.fullmatch(name) and name != COMPLETE and type(size) is int and type(sha256) is str
        for name, (size, sha256) in files.items()
    )
    return files if files and sound and version == FORMAT and step in (None, told) else None


# ------------------------------------------------------------------------------------------------------------- opening
def verify(folder: str | os.PathLike[str]) -> Mapping[str, Path]:
    """Compare a checkpoint with its ``COMPLETE``, byte for byte by sums, and return its files by name.

    Raises:
        CheckpointError: it is no complete checkpoint, or a file is missing, too many, or not what was saved; the
            message names the file, and the newest sound checkpoint before it.
    """
    path = Path(folder)
    fault = _fault(path)
    if fault:
        raise CheckpointError(f"{fault}; nothing was loaded.{_way_out(path)}")
    return {name: path / name for name in _described(path) or ()}


def _fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint, if anything is."""
    described = _described(folder)
    if described is None:
        return f"{folder} is no complete checkpoint: it has no valid {COMPLETE}"
    there = {path.name for path in _entries(folder)} - {COMPLETE}
    if there != described.keys():
        missing, unexpected = described.keys() - there, there - described.keys()
        return (
            f"{folder} is not what was saved: missing {shown(sorted(missing))}; unexpected {shown(sorted(unexpected))}"
        )
    for name, (size, sha256) in described.items():
        path = folder / name
        try:
            if not stat.S_ISREG(path.lstat().st_mode):
                return f"{path} is no plain file"
            if path.stat().st_size != size:
                return f"{path} is damaged: it has {path.stat().st_size:,} bytes, and {size:,} were saved"
            if _digest(path) != sha256:
                return f"{path} is damaged: its sha256 is not the one in {COMPLETE}"
        except OSError as error:
            return f"{path} cannot be read ({error.strerror or error})"
    return None


def _way_out(folder: Path) -> str:
    match = STEP_NAME.fullmatch(folder.name)
    others = [path for step, path in sorted(_complete(folder.parent).items()) if match and step < int(match[1])]
    sound = next((path for path in reversed(others) if _fault(path) is None), None)
    if sound is None:
        return ""
    return f" The newest sound one before it is {sound}: to go on from there, resume from that path."
