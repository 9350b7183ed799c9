"""The exercises: which there are, where their files are, and how far the learner is."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from minipeft.errors import ExerciseError, shown
from minipeft.files.atomic import write_files
from minipeft.files.reading import read_text


class Exercise(NamedTuple):
    """One exercise: its number, the name of its file without the number, what it is about, and what the file defines."""

    number: str
    name: str
    title: str
    defines: tuple[str, ...]

    @property
    def file(self) -> str:
        """Name of the learner's file."""
        return f"{self.number}_{self.name}.py"


EXERCISES = (
    Exercise("01", "mathematics", "explain the mathematics", ("full_numbers", "lora_numbers", "scaling", "merged")),
    Exercise(
        "02",
        "reduction",
        "compute the reduction",
        ("lora_parameters", "times_fewer", "model_parameters", "training_bytes"),
    ),
    Exercise("03", "layer", "write the layer", ("LoraLinear",)),
    Exercise("04", "apply", "apply it to any Linear and Conv1D", ("LoraLayer", "apply_lora")),
    Exercise("05", "train", "train a whole model", ("prepare", "make_optimizer", "train")),
    Exercise("06", "curve", "draw and read the loss curve", ("overfits", "keep_step", "smooth", "draw")),
    Exercise("07", "tune", "tune r and alpha", ("keep_scaling", "tune")),
    Exercise("08", "merge", "merge", ("merge", "unmerge")),
)
# In a checkout a link to examples/tutorial/exercises, in an installed package a folder.
ORIGINALS = Path(__file__).with_name("exercises")


def find(number: str) -> Exercise:
    """The exercise of this number, as "3" or "03"; raises ExerciseError if there is none."""
    for exercise in EXERCISES:
        if exercise.number == number.zfill(2):
            return exercise
    raise ExerciseError(
        f"there is no exercise {number!r:.40}; they are {EXERCISES[0].number} to {EXERCISES[-1].number}."
    )


def copy_to(folder: Path) -> list[str]:
    """Copy the exercises into a folder of the learner's, which is made; files that are there stay. Returns what was copied.

    Raises:
        ExerciseError: the package was installed without them.
        CheckpointError: the folder cannot be written.
    """
    missing = [exercise.file for exercise in EXERCISES if not (ORIGINALS / exercise.file).is_file()]
    if missing:
        raise ExerciseError(f"{ORIGINALS} lacks {shown(missing)}; install minipeft again.")
    wanted = [exercise.file for exercise in EXERCISES if not (folder / exercise.file).exists()]
    write_files(folder, {name: (ORIGINALS / name).read_bytes() for name in wanted})
    return wanted


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
