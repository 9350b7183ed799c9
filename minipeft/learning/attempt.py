"""Checks a learner's file in a process of its own, which is stopped after a while."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import minipeft
from minipeft.errors import ExerciseError, printable, told_error
from minipeft.files.reading import read_text, writing
from minipeft.learning.exercises import Exercise
from minipeft.learning.law import Result

SHOWN_OUTPUT = 2000  # characters


class Attempt(NamedTuple):
    """What came of each law that was looked at, and the end of what the learner's file printed."""

    results: list[Result]
    printed: str

    @property
    def solved(self) -> bool:
        """Whether no law is broken."""
        return not any(result.broken for result in self.results)


def attempt(path: Path, exercise: Exercise, seconds: float) -> Attempt:
    """Run a learner's file, for so many seconds at most, and check the laws of its exercise.

    Raises:
        ExerciseError: the file is not there, does not parse, raises, exits, never returns, or lacks a name.
    """
    if not path.is_file():
        raise ExerciseError(
            f"{path} is not there; `minipeft learn start DIR` copies the exercises, and --file takes another file."
        )
    try:
        compile(read_text(path), str(path), "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = f", line {error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
        raise ExerciseError(f"{path.name}{line} is not Python: {told_error(error)}") from None
    with writing("the temporary folder"), tempfile.TemporaryDirectory() as folder:
        result, output = Path(folder) / "result.json", Path(folder) / "output"
        code = _run([str(path), exercise.number, str(result)], output, path.name, seconds)
        printed = _end_of(output)
        try:
            told = json.loads(result.read_text("utf-8"))
        except (OSError, ValueError):
            raise ExerciseError(
                f"{path.name} ended its process with code {code}, before anything could be checked; it must run to its end."
            ) from None
    if "error" in told:
        raise ExerciseError(told["error"])
    return Attempt([Result(*each) for each in told["results"]], printed)


def _run(arguments: list[str], output: Path, name: str, seconds: float) -> int:
    package = str(Path(minipeft.__file__ or "").parents[1])
    path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    with output.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "minipeft.learning.child", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.DEVNULL,  # where libraries warn
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,
        )
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        raise ExerciseError(
            f"{name} did not return within {seconds:g} s and was stopped; look for a loop without end, or give more --seconds."
        ) from None
    finally:
        _stop(process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a process and those that it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if os.name == "posix":
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    process.wait()


def _end_of(output: Path) -> str:
    with output.open("rb") as file:
        file.seek(max(0, output.stat().st_size - SHOWN_OUTPUT))
        return printable(file.read().decode("utf-8", "replace").strip())
