"""The house in order: lint, format, types, and imports that point down only."""

import re
import subprocess
import sys
import types
from pathlib import Path

from architecture import floors, functions, graph, imported, modules, room, room_edges

import minipeft

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "minipeft"
# The rooms of the package, one line a floor, the lowest first: a room imports from floors below it and from itself.
FLOORS = (
    ("errors", "python"),
    ("ecosystem", "kernels", "registry"),
    ("layers", "config"),
    ("methods",),
    ("injection",),
    ("files", "memory"),
    ("merging", "integrations", "diagnosis", "learning"),
    ("model", "planning"),
    ("api", "hf", "training", "testing", "cli", "serving"),
)
FLOOR = {name: height for height, names in enumerate(FLOORS) for name in names}


def run(*command):
    result = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_ruff_finds_nothing():
    run("ruff", "check", "--output-format", "concise", ".")


def test_the_code_is_formatted():
    run("ruff", "format", "--check", ".")


def test_mypy_is_strict_and_content():
    run("mypy")


def test_every_room_stands_on_a_floor():
    assert set(room_edges()) == set(FLOOR)


def test_imports_point_down():
    def points_down(name, other):
        return room(name) == room(other) or FLOOR[room(other)] < FLOOR[room(name)]

    edges = [(name, other) for name, others in graph().items() for other in others]
    assert [f"{name} imports {other}" for name, other in edges if not points_down(name, other)] == []


def test_there_is_no_import_cycle_and_the_rooms_stand_on_ten_floors_at_most():
    floors(graph())
    assert max(floors(room_edges()).values()) <= 10


def test_the_core_names_no_concrete_method_or_layer():
    concrete = {"minipeft.methods.lora", "minipeft.layers.linear", "minipeft.layers.embedding"}
    for path, name in modules():
        # The front door shows LoRA, and a method may build on another.
        if name != "minipeft.api" and not name.startswith("minipeft.methods."):
            assert not concrete & set(imported(path)), name


def test_nothing_is_unpickled():
    for path, name in modules():
        text = path.read_text("utf-8")
        if name != "minipeft.testing.runtime":  # which reads back what it has just written
            # pickletools reads the steps of a pickle and takes none.
            assert not re.search(r"\bimport pickle\b", text), name
        if (
            name != "minipeft.files.formats.pickled"
        ):  # which `minipeft convert` runs in a process of its own, after a check
            assert "torch.load" not in text.replace("safetensors.torch.load", ""), name


def test_all_names_what_there_is():
    assert len(set(minipeft.__all__)) == len(minipeft.__all__)
    for name in minipeft.__all__:
        assert not isinstance(getattr(minipeft, name), types.ModuleType), f"{name} would be bound by an import *"


def test_files_stay_small():
    lengths = {name: len(path.read_text("utf-8").splitlines()) for path, name in modules()}
    assert {name: length for name, length in lengths.items() if length > 350} == {}


def test_functions_stay_short():
    lengths = {(name, function): lines for path, name in modules() for function, lines in functions(path)}
    assert {where: lines for where, lines in lengths.items() if lines > 40} == {}


def test_no_path_of_a_machine_is_in_the_repository():
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, files.split("\0")):
        path = ROOT / name
        if path.suffix in {".py", ".md", ".toml", ".json", ".txt", ".yaml", ""} and path.is_file():
            text = path.read_text("utf-8", errors="ignore")
            for prefix in ("home", "root", "work", "Users"):
                assert f"/{prefix}/" not in text, f"{name} names a folder of one machine"
