"""`minipeft learn`: solutions pass, mistakes are named, and files that cannot be checked are one line."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from learners_mistakes import MISTAKES
from test_cli import run
from tiny_models import foreign_code

from minipeft import MinipeftError
from minipeft.errors import ExerciseError
from minipeft.learning.child import judge
from minipeft.learning.exercises import EXERCISES, ORIGINALS, find

ROOT = Path(__file__).resolve().parents[1]
SOLUTIONS = ROOT / "examples" / "tutorial" / "solutions"
NUMBERS = [exercise.number for exercise in EXERCISES]


@pytest.fixture(autouse=True)
def state(tmp_path, monkeypatch):
    """A place of its own for the progress of a test."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state" / "minipeft" / "learn.json"


def said(number, text, folder):
    """What the first broken law of a file with this text says, or why it cannot be checked."""
    file = folder / find(number).file
    file.write_text(text, "utf-8")
    try:
        with foreign_code():
            return next((broken for _, broken in judge(file, find(number)) if broken), "")
    except ExerciseError as error:
        return str(error)


@pytest.mark.parametrize("number", NUMBERS)
def test_a_solution_keeps_all_laws_and_each_mistake_is_named(number, tmp_path):
    solution = (SOLUTIONS / find(number).file).read_text("utf-8")
    assert said(number, solution, tmp_path) == ""
    found = {}
    for right, wrong, words in MISTAKES[number]:
        assert right in solution, right
        told = said(number, solution.replace(right, wrong, 1), tmp_path)
        if words not in told:
            found[wrong] = (words, told)
    assert found == {}


def test_most_mistakes_are_told_apart(tmp_path):
    assert sum(map(len, MISTAKES.values())) > 100


@pytest.mark.parametrize("number", NUMBERS[1:])
def test_an_exercise_as_it_comes_has_a_gap(number, tmp_path):
    told = said(number, (ORIGINALS / find(number).file).read_text("utf-8"), tmp_path)
    assert "gap is still to be filled" in told or "no answer yet" in told


def test_the_answers_are_not_in_the_hints(tmp_path):
    for name, value in (
        ("times_fewer", "64"),
        ("scaling", "4"),
        ("largest_rank", "2"),
        ("merged", "5"),
        ("gradient_of_B", "6"),
    ):
        told = said(
            "01",
            (ORIGINALS / "01_mathematics.py").read_text("utf-8").replace(f"{name} = None", f"{name} = 7.5"),
            tmp_path,
        )
        assert f" {value}" not in told.replace("no answer yet", "")


def test_a_learner_s_way_through_the_exercises(tmp_path, state):
    assert "Begin with: minipeft learn start" in run("learn").output
    folder = tmp_path / "mine"
    assert f"8 exercises copied to {folder}" in run("learn", "start", folder).output
    (folder / "02_reduction.py").write_text("# mine")
    (folder / "07_tune.py").unlink()
    assert "1 exercises copied" in run("learn", "start", folder).output
    assert (folder / "02_reduction.py").read_text() == "# mine"

    wrong = (SOLUTIONS / "02_reduction.py").read_text().replace(
        "12 * trainable", "8 * trainable"
    ) + "\nprint('\\x1b[2Jfound')"
    (folder / "02_reduction.py").write_text(wrong)
    broken = run("learn", "check", "2")
    assert broken.exit_code == 1
    assert "your file printed:\n\\x1b[2Jfound" in broken.output
    assert "no    memory" in broken.output
    assert not json.loads(state.read_text())["done"]

    solved = run("learn", "check", "02", "--file", SOLUTIONS / "02_reduction.py")
    assert solved.exit_code == 0
    assert json.loads(state.read_text()) == {"folder": str(folder), "done": ["02"]}
    listed = run("learn").output
    assert "[x] 02  compute the reduction" in listed
    assert "[ ] 03  write the layer" in listed
    assert f"1 of 8 solved. Next: {folder / '01_mathematics.py'}" in listed


CANNOT_BE_CHECKED = {
    "def lora(:": "line 1 is not Python: invalid syntax",
    "a = 1\0": "is not Python",
    "x = 1\nimport sys\nsys.exit(0)": "line 3: sys.exit or exit is called",
    "import os\nos._exit(3)": "ended its process with code 3",
    "while True: pass": "did not return within 0.5 s and was stopped",
    "while True: print('x' * 100_000)": "File too large",
    "input()": "raises EOFError",
    "raise KeyboardInterrupt": "raises KeyboardInterrupt",
}
SAID_BY_THE_CHILD = {
    "1 / 0": "line 1 raises ZeroDivisionError: division by zero",
    "def lora_parameter(): pass": "has no lora_parameters (closest: 'lora_parameter')",
    "import nonsense_that_is_not_there": "raises ModuleNotFoundError",
}


@pytest.mark.parametrize("text", SAID_BY_THE_CHILD)
def test_what_a_file_raises_or_lacks_is_one_line(text, tmp_path):
    told = said("02", text, tmp_path)
    assert SAID_BY_THE_CHILD[text] in told
    assert "\n" not in told


def test_a_file_that_cannot_be_checked_is_one_line(tmp_path):
    file, found = tmp_path / "mine.py", {}
    for text, words in CANNOT_BE_CHECKED.items():
        file.write_text(text)
        with pytest.raises(ExerciseError) as caught:
            run("learn", "check", "02", "--file", file, "--seconds", "0.5" if "did not" in words else "30")
        if words not in str(caught.value) or "\n" in str(caught.value):
            found[text] = str(caught.value)
    assert found == {}


def test_what_else_goes_wrong_is_one_line(tmp_path, state):
    for arguments, words in (
        (["09"], "there is no exercise '09'; they are 01 to 08"),
        (["two"], "there is no exercise 'two'"),
        (["02", "--file", tmp_path / "absent.py"], "absent.py is not there; `minipeft learn start DIR`"),
        (["02", "--file", tmp_path], "is not there"),
    ):
        with pytest.raises(MinipeftError, match=words.replace("(", r"\(")):
            run("learn", "check", *arguments)
    (tmp_path / "latin.py").write_bytes(b"# \xe9")
    with pytest.raises(MinipeftError, match="cannot be read as text"):
        run("learn", "check", "02", "--file", tmp_path / "latin.py")
    state.parent.mkdir(parents=True)
    for damaged in ("{", "[]", '{"done": ["99"], "folder": null}', '{"done": [], "folder": 3}'):
        state.write_text(damaged)
        with pytest.raises(ExerciseError, match="is damaged; delete it to begin anew"):
            run("learn")


@pytest.mark.slow
def test_an_installed_wheel_has_the_exercises(tmp_path):
    shutil.copytree(
        ROOT, tmp_path / "source", symlinks=True, ignore=shutil.ignore_patterns(".git", "build", "benchmarks", "tests")
    )
    pip = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
        str(tmp_path / "source"),
    ]
    subprocess.run(pip, check=True, capture_output=True)
    shutil.unpack_archive(next(tmp_path.glob("*.whl")), tmp_path / "installed", "zip")
    names = {path.name for path in (tmp_path / "installed" / "minipeft" / "learning" / "exercises").iterdir()}
    assert names == {exercise.file for exercise in EXERCISES}
