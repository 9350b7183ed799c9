"""How far the learner is: a small file in the folder for a user's state."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

from minipeft.errors import ExerciseError
from minipeft.files.atomic import write_files
from minipeft.files.reading import read_text
from minipeft.learning.exercises import EXERCISES


def progress_file() -> Path:
    """``$XDG_STATE_HOME/minipeft/learn.json``, by default below ``~/.local/state``."""
    state = os.environ.get("XDG_STATE_HOME")
    return (Path(state) if state else Path.home() / ".local" / "state") / "minipeft" / "learn.json"


@dataclass
class Progress:
    """The folder of the learner's files, if known, and the numbers of the exercises that were solved once."""

    folder: Path | None = None
    done: set[str] = field(default_factory=set)

    def save(self) -> None:
        """Write it, completely or not at all; raises CheckpointError if it cannot be written."""
        told = {"folder": None if self.folder is None else str(self.folder), "done": sorted(self.done)}
        write_files(progress_file().parent, {progress_file().name: json.dumps(told, indent=2).encode()})


def read_progress() -> Progress:
    """The progress so far; none if nothing was written yet.

    Raises:
        ExerciseError: the file is damaged.
        DataError: it cannot be read.
    """
    path = progress_file()
    if not path.exists():
        return Progress()
    try:
        told = json.loads(read_text(path))
        folder, done = told["folder"], set(told["done"])
        if done - {exercise.number for exercise in EXERCISES} or not isinstance(folder, str | None):
            raise ValueError
    except (ValueError, TypeError, KeyError, RecursionError):
        raise ExerciseError(f"{path}, which holds your progress, is damaged; delete it to begin anew.") from None
    return Progress(None if folder is None else Path(folder), done)
