"""The process in which a learner's file runs: ``python -m minipeft.learning.child FILE NUMBER RESULT``.

It writes to RESULT what came of the laws, or why the file cannot be checked; the learner's output goes where it likes.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from minipeft.errors import ExerciseError, hint, told_error
from minipeft.learning.exercises import Exercise, find
from minipeft.learning.law import Result

LARGEST_FILE = 64 * 2**20  # bytes; of output without end, too


def judge(path: Path, exercise: Exercise) -> list[Result]:
    """Run a learner's file and look at each law of its exercise; raises ExerciseError if it raises an error or has a gap left."""
    with _explained(path):
        names: dict[str, Any] = {"__name__": "exercise", "__file__": str(path)}
        exec(compile(path.read_text("utf-8"), str(path), "exec"), names)
    for name in exercise.defines:
        if name not in names:
            raise ExerciseError(
                f"{path.name} has no {name}{hint(name, names)}; the exercise's file has it, with a gap."
            )
    with _explained(path):
        laws = importlib.import_module(f"minipeft.learning.laws.{exercise.name}").LAWS
        return list(laws.judge(SimpleNamespace(**names)))


@contextlib.contextmanager
def _explained(path: Path) -> Any:
    try:
        yield
    except ExerciseError:
        raise
    except BaseException as error:
        raise ExerciseError(_why(path, error)) from None


def _why(path: Path, error: BaseException) -> str:
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    where = f"{path.name}, line {lines[-1]}" if lines else path.name
    if isinstance(error, NotImplementedError):
        return f"{where}: this gap is still to be filled."
    if isinstance(error, SystemExit):
        return f"{where}: sys.exit or exit is called; a file that is checked must run to its end."
    if isinstance(error, ModuleNotFoundError) and error.name in ("transformers", "matplotlib"):
        return f"this exercise takes {error.name}: pip install 'minipeft[train]'"
    return f"{where} raises {type(error).__name__}: {told_error(error)}"


def main() -> None:
    """Check the file that the command line names."""
    path, number, result = sys.argv[1:]
    with contextlib.suppress(ImportError):
        import resource  # not on Windows

        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        limit = LARGEST_FILE if hard == resource.RLIM_INFINITY else min(LARGEST_FILE, hard)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    sys.path.append(str(Path(path).parent))
    try:
        told: Any = {"results": judge(Path(path), find(number))}
    except ExerciseError as error:
        told = {"error": str(error)}
    Path(result).write_text(json.dumps(told), "utf-8")


if __name__ == "__main__":
    main()
