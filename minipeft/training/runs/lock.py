"""One run at a time in a run directory."""

from __future__ import annotations

import datetime
import json
import os
import socket
import sys
import warnings
from pathlib import Path
from types import TracebackType

import filelock

from minipeft.errors import CheckpointError
from minipeft.files.atomic import write_files
from minipeft.files.reading import read_limited

LOCK_FILE, OWNER_FILE = "run.lock", "run.owner.json"
MAX_OWNER_BYTES = 2**16


class RunLock:
    """The right to write a run directory, held within a ``with`` block; of several processes, rank 0 takes it.

    The lock is ``flock`` on ``run.lock``: the kernel releases it when the process ends, even if killed. Both files stay
    and mean nothing by themselves. On a network file system the lock reaches as far as flock does there: all machines on
    NFS 4, one machine if it is mounted with ``local_lock=flock``. A file system without flock is an error, since a lock
    that only its owner can release outlives a killed run.

    Raises:
        CheckpointError: on entering: another run holds it (the message says which), or the directory cannot be locked.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        self._lock: filelock.BaseFileLock | None = None

    def __enter__(self) -> RunLock:
        if self._lock is not None:
            raise CheckpointError(f"{self.directory} is already locked by this object.")
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            lock = filelock.FileLock(self.directory / LOCK_FILE, timeout=0, thread_local=False)
            with warnings.catch_warnings():
                # Without flock, filelock warns and falls back to a lock that outlives a killed run.
                warnings.simplefilter("error", UserWarning)
                lock.acquire()
        except filelock.Timeout:
            raise CheckpointError(
                f"another run writes into {self.directory}: {self._owner()}. Wait for it, stop it, or choose another directory."
            ) from None
        except (OSError, NotImplementedError, UserWarning) as error:
            raise CheckpointError(
                f"{self.directory} cannot be locked ({error}); a run directory must be on a file system with flock."
            ) from None
        self._lock = lock
        try:
            write_files(self.directory, {OWNER_FILE: _myself()})
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._release()

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _owner(self) -> str:
        """Who holds the lock, according to its note; for a moment it may still be the previous owner's."""
        try:
            note = json.loads(read_limited(self.directory / OWNER_FILE, MAX_OWNER_BYTES))
            return f"process {note['pid']} on {note['host']}, since {note['since']}, command {note['command']!r:.300}"
        except (CheckpointError, ValueError, KeyError, TypeError):
            return "which one is not known"


def _myself() -> bytes:
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    note = {"host": socket.gethostname(), "pid": os.getpid(), "since": now, "command": " ".join(sys.argv)}
    return (json.dumps(note, indent=2) + "\n").encode("utf-8")
