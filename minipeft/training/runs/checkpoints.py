"""Checkpoints of a run: folders that are there whole or not at all, and that know whether they are.

``<run>/checkpoints/step-00000120/`` holds what a run saved after update 120, and a `COMPLETE` file that describes it. A
save writes into a hidden folder, waits for the disk, writes ``COMPLETE``, waits again, renames the folder, and only then
removes what is older than the newest `keep`. So a run that dies at any moment leaves the old checkpoints, or these and
the new one. Only one process may write a run directory at a time: see `RunLock`.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError

from minipeft.errors import CheckpointError, ConfigError, all_or_nothing, shown, told_error, warn
from minipeft.files.atomic import alive, hidden_beside, sync_folder
from minipeft.training.runs.complete import described, fault, seal

FOREIGN_LEFTOVER_SECONDS = 24 * 3600  # nobody can tell whether a process of another machine lives, but a save ends
STEP_NAME = re.compile(r"step-(\d{8,})")
HIDDEN_NAME = re.compile(r"\.(step-\d{8,})\.(tmp|old|trash)-(.*)-(\d+)-[0-9a-f]{8}")


class Checkpoints:
    """The checkpoints of one run directory, the newest `keep` of them; raises ConfigError if that is not such a number."""

    def __init__(self, directory: str | os.PathLike[str], keep: int = 2) -> None:
        if type(keep) is not int or keep < 1:
            raise ConfigError(f"keep={keep!r} is not allowed: give the number of checkpoints to keep, 1 or more.")
        self.folder = Path(directory) / "checkpoints"
        self.keep = keep

    def latest(self) -> Path | None:
        """The newest complete checkpoint, or None; warns of a newer folder without a valid ``COMPLETE``.

        `verify` compares its sums when it is opened. If it is damaged, that is an error which names the one before;
        this never silently returns an older one.
        """
        complete = complete_folders(self.folder)
        newest = max(complete, default=-1)
        broken = [path.name for step, path in step_folders(self.folder).items() if step > newest]
        if broken:
            warn(f"{self.folder}: {shown(sorted(broken))} is not complete and was passed over.")
        return complete.get(newest)

    @all_or_nothing
    def save(self, step: int, write: Callable[[Path], object], *, needed: int = 0) -> Path:
        """Save a checkpoint durably, then remove all but the newest `keep`, and what killed processes left behind.

        A checkpoint of the same step is replaced.

        Args:
            step: number of updates done.
            write: is given a new, empty folder and writes plain files into it.
            needed: bytes that this will take, if known; without as much free space the save does not begin.

        Returns:
            The folder of the checkpoint.

        Raises:
            CheckpointError: the disk is full or not writable, or there are newer checkpoints, which `discard_newer`
                removes. The other checkpoints are as they were, nothing else is left, and the run can go on.
        """
        if type(step) is not int or step < 0:
            raise ConfigError(f"step {step!r} is not allowed: give the number of updates done.")
        final = self.folder / f"step-{step:08d}"
        newer = newer_folders(self.folder, step)
        if newer:
            raise CheckpointError(
                f"{final}: there are newer checkpoints ({shown(path.name for path in newer)}), so it would not be the "
                f"latest. If the run was taken back to an older one on purpose, call discard_newer({step})."
            )
        temporary = hidden_beside(final, "tmp")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            sync_folder(self.folder.parent)
            self._tidy()
            if needed > shutil.disk_usage(self.folder).free:
                raise CheckpointError("it was not begun")
            temporary.mkdir()
            write(temporary)
            seal(temporary, step)
            _put_in_place(temporary, final)
        except (OSError, SafetensorError, CheckpointError) as error:
            raise CheckpointError(self._failure(final, needed, error)) from None
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        self._remove([path for _, path in sorted(complete_folders(self.folder).items())[: -self.keep]])
        return final

    def discard_newer(self, step: int) -> list[Path]:
        """Remove every checkpoint after `step`, for a run that is taken back to it; returns what was removed."""
        newer = newer_folders(self.folder, step)
        self._remove(newer[::-1])  # the newest first, so that an interrupted removal leaves no gap
        return newer

    def _failure(self, final: Path, needed: int, error: Exception) -> str:
        with_need = f"{needed:,} bytes are needed, " if needed else ""
        try:
            with_need += f"{shutil.disk_usage(self.folder).free:,} are free"
        except OSError:
            with_need += "how many are free is not known"
        return f"{final} could not be saved ({told_error(error, 500)}; {with_need})."

    def _tidy(self) -> None:
        """Remove, or put back, what interrupted saves left behind."""
        for hidden, name, kind in leftovers(self.folder):
            if kind == "old" and not (self.folder / name).exists():
                os.rename(hidden, self.folder / name)  # its replacement never came
                sync_folder(self.folder)
            else:
                shutil.rmtree(hidden, ignore_errors=True)

    def _remove(self, paths: list[Path]) -> None:
        """Remove checkpoints. Each loses its name first, so none is ever there in part."""
        for path in paths:
            trash = hidden_beside(path, "trash")
            try:
                os.rename(path, trash)
                shutil.rmtree(trash)
            except OSError as error:
                warn(f"{path} could not be removed ({told_error(error)}).")


def _put_in_place(temporary: Path, final: Path) -> None:
    """Give a sealed folder its name. A folder of that name first moves aside, to where `latest` and `save` find it."""
    aside = hidden_beside(final, "old") if final.exists() else None
    if aside is not None:
        os.rename(final, aside)
    try:
        os.rename(temporary, final)
    except OSError:
        if aside is not None:
            os.rename(aside, final)
        raise
    sync_folder(final.parent)
    if aside is not None:
        shutil.rmtree(aside, ignore_errors=True)


def verify(folder: str | os.PathLike[str]) -> Mapping[str, Path]:
    """Compare a checkpoint with its ``COMPLETE``, byte for byte by sums, and return its files by name.

    Raises:
        CheckpointError: it is not complete, or a file is missing, unexpected, or not what was saved; the message names
            the file, and the newest sound checkpoint before this one.
    """
    path = Path(folder)
    found = fault(path)
    if found:
        raise CheckpointError(f"{found}.{_way_out(path)}")
    return {name: path / name for name in described(path) or ()}


def _way_out(folder: Path) -> str:
    match = STEP_NAME.fullmatch(folder.name)
    others = [path for step, path in sorted(complete_folders(folder.parent).items()) if match and step < int(match[1])]
    sound = next((path for path in reversed(others) if fault(path) is None), None)
    return (
        ""
        if sound is None
        else f" The newest sound one before it is {sound}: to go on from there, resume from that path."
    )


def step_folders(folder: Path) -> dict[int, Path]:
    """Every folder with the name of a checkpoint, by step, complete or not."""
    matches = [(STEP_NAME.fullmatch(path.name), path) for path in _entries(folder)]
    found = {int(match[1]): path for match, path in matches if match and path.is_dir()}
    return {step: path for step, path in found.items() if path.name == f"step-{step:08d}"}


def complete_folders(folder: Path) -> dict[int, Path]:
    """The complete checkpoints by step, with those that an interrupted save was about to replace."""
    found = step_folders(folder)
    for hidden, name, kind in leftovers(folder, dead=False):
        if kind == "old":
            found.setdefault(int(name.removeprefix("step-")), hidden)
    return {step: path for step, path in found.items() if described(path, step) is not None}


def newer_folders(folder: Path, step: int) -> list[Path]:
    """All folders that have, or had, the name of a later step, complete or not."""
    found = {**complete_folders(folder), **step_folders(folder)}
    return [path for other, path in sorted(found.items()) if other > step]


def leftovers(folder: Path, *, dead: bool = True) -> Iterator[tuple[Path, str, str]]:
    """(path, name to be, kind) of the hidden folders of saves; `dead`: only those of saves that cannot be going on."""
    for path in _entries(folder):
        match = HIDDEN_NAME.fullmatch(path.name)
        if match and path.is_dir() and not (dead and _may_go_on(path, match[3], int(match[4]))):
            yield path, match[1], match[2]


def _may_go_on(path: Path, host: str, pid: int) -> bool:
    if host == socket.gethostname():
        return pid != os.getpid() and alive(pid)  # a restarted container gets the same process ids
    return time.time() - path.stat().st_mtime < FOREIGN_LEFTOVER_SECONDS


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
