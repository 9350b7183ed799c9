"""The directory of a run: one that can be written, holds nothing else, and is written by one run at a time."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from minipeft.errors import CheckpointError, StateError
from minipeft.training.distributed.launch import restarts
from minipeft.training.distributed.ranks import agreeing, rank_and_world_size
from minipeft.training.runs.checkpoints import Checkpoints, complete_folders
from minipeft.training.runs.lock import RunLock

RESULTS = ("adapter_config.json", "metrics.jsonl", "checkpoints")


def check_writable(directory: Path) -> None:
    """Raise StateError if a directory, or its nearest parent that exists, cannot be written, or it holds a whole model."""
    place = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    try:
        tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        raise StateError(
            f"--output_dir {directory}: {place} cannot be written ({error.strerror}); choose another directory."
        ) from None
    if (directory / "config.json").exists():
        raise StateError(
            f"--output_dir {directory} holds the config.json of a whole model; give the adapter its own directory."
        )


@contextlib.contextmanager
def the_only_run(directory: Path, *, resume: bool, overwrite: bool) -> Iterator[None]:
    """Hold a directory for this run alone. Every process enters; the first one locks.

    Raises:
        CheckpointError: another run holds the directory.
        StateError: it holds a run, and neither `resume` nor `overwrite` is set.
    """
    with contextlib.ExitStack() as stack:
        with agreeing():
            if rank_and_world_size()[0] == 0:
                stack.enter_context(RunLock(directory))
                if not restarts():  # a restarted launch goes on with its own run
                    _check_unused(directory, resume, overwrite)
        yield


def _check_unused(directory: Path, resume: bool, overwrite: bool) -> None:
    found = results_in(directory)
    if found and not (resume or overwrite):
        goes_on = "--resume goes on with it, " if complete_folders(Checkpoints(directory).folder) else ""
        raise StateError(
            f"--output_dir {directory} holds a run already ({', '.join(found)}): {goes_on}--overwrite begins anew, or "
            "choose another directory."
        )


def results_in(directory: Path) -> list[str]:
    """What a run has left in its directory, perhaps before its first checkpoint."""
    return [name for name in RESULTS if (directory / name).exists()]


def checkpoint_to_resume(checkpoints: Checkpoints, resume: str | None) -> Path | None:
    """The checkpoint that a run goes on from, or None to begin.

    Args:
        checkpoints: of the run.
        resume: path of a checkpoint, or "latest". None begins, except in a launch that was restarted after one of its
            processes died: it goes on from the latest checkpoint.

    Raises:
        CheckpointError: the latest checkpoint was asked for, and there is none; or the path is not one of the run's.
    """
    if resume and resume != "latest":
        if Path(resume).resolve().parent != checkpoints.folder.resolve():
            raise CheckpointError(
                f"--resume {resume} is not in {checkpoints.folder}: a run goes on in its own --output_dir. Give that one, or a copy "
                "of the whole directory."
            )
        return Path(resume)
    folder = checkpoints.latest() if resume or restarts() else None
    if folder is None and resume and not restarts():
        begin = "take --overwrite instead" if results_in(checkpoints.folder.parent) else "leave the flag out"
        raise CheckpointError(f"--resume: there is no complete checkpoint in {checkpoints.folder}; {begin} to begin.")
    return folder
