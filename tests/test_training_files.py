"""minipeft/training says of each of its files why no library does the same."""

import re
from pathlib import Path

import minipeft.training

FOLDER = Path(minipeft.training.__file__).parent


def test_each_file_of_training_has_a_line_that_says_why_it_stays():
    lines = [line for line in minipeft.training.__doc__.splitlines() if line.startswith("- ")]
    named = [name for line in lines for name in re.findall(r"``(\w+)``", line.partition(":")[0])]
    assert sorted(named) == sorted(path.stem for path in FOLDER.rglob("*.py") if path.stem != "__init__")
