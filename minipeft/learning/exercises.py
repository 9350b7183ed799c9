"""The exercises: which there are, and where their files are."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from minipeft.errors import ExerciseError, shown
from minipeft.files.atomic import write_files


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
