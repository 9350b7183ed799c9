"""The structure of the package in figures: ``python -m tests.architecture [ROOT]``, for this or another checkout.

Rooms are the packages and modules directly below ``minipeft/``. A floor is one more than the highest floor that a
module imports from, so the number of floors is the longest chain of imports. The core is what is neither ``training``
nor the contract suite.
"""

from __future__ import annotations

import ast
import functools
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SUITE = ("training", "testing", "contract", "testing.py", "table.py")


def modules(root: Path = ROOT) -> Iterator[tuple[Path, str]]:
    """(file, dotted name) of every module, ``minipeft.__init__`` included."""
    for path in sorted((root / "minipeft").rglob("*.py")):
        yield path, ".".join(path.relative_to(root).with_suffix("").parts)


@functools.cache
def imported(path: Path) -> tuple[str, ...]:
    """The minipeft modules that a file imports, as dotted names; of ``from minipeft.a import b`` also ``minipeft.a.b``."""
    return tuple(_imported(path))


@functools.cache
def nodes(path: Path) -> list[ast.AST]:
    """All of a file's syntax tree, which is parsed once."""
    return list(ast.walk(ast.parse(path.read_text("utf-8"))))


def _imported(path: Path) -> Iterator[str]:
    for node in nodes(path):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "minipeft":
            if node.module != "minipeft":
                yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "minipeft")


@functools.cache
def graph(root: Path = ROOT) -> dict[str, set[str]]:
    """Module -> modules that it imports, without the two front doors."""
    files = {name: path for path, name in modules(root)}
    known = {name.removesuffix(".__init__"): name for name in files}
    found = {known[n]: {known[other] for other in imported(p) if other in known} for n, p in _plain(files)}
    # A package that imports its own modules, to let them register, stands on no higher floor than they do.
    for package in ("minipeft.layers.__init__", "minipeft.methods.__init__"):
        found[package] = set()
    doors = {"minipeft.__init__", "minipeft.__main__"}
    return {name: others - {name} - doors for name, others in found.items() if name not in doors}


def _plain(files: dict[str, Path]) -> Iterator[tuple[str, Path]]:
    yield from ((name.removesuffix(".__init__"), path) for name, path in files.items())


def floors(edges: dict[str, set[str]]) -> dict[str, int]:
    """Module -> its floor, the lowest is 1.

    Raises:
        ValueError: modules import each other.
    """
    heights: dict[str, int] = {}
    while len(heights) < len(edges):
        free = [name for name in edges if name not in heights and edges[name] <= heights.keys()]
        if not free:
            raise ValueError(f"these import each other: {sorted(edges.keys() - heights.keys())}")
        for name in free:
            heights[name] = 1 + max((heights[other] for other in edges[name]), default=0)
    return heights


def room(name: str) -> str:
    """The package or module directly below ``minipeft`` that a module is in."""
    return name.split(".")[1]


def room_edges(root: Path = ROOT) -> dict[str, set[str]]:
    """Room -> rooms that it imports from."""
    edges: dict[str, set[str]] = {}
    for name, others in graph(root).items():
        edges.setdefault(room(name), set()).update({room(other) for other in others} - {room(name)})
    return edges


def functions(path: Path) -> Iterator[tuple[str, int]]:
    """(name, lines without the docstring) of every function in a file."""
    for node in nodes(path):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body
            has_docstring = ast.get_docstring(node) is not None
            docstring = body[0].end_lineno - body[0].lineno + 1 if has_docstring else 0  # type: ignore[operator]
            yield node.name, (node.end_lineno or 0) - node.lineno + 1 - docstring


def contract(path: Path, cls: str) -> str:
    """How many methods a contract's class asks for, and how many methods and attributes it has for others to see."""
    tree = ast.parse(path.read_text("utf-8"))
    node = next(n for n in ast.walk(tree) if isinstance(n, ast.ClassDef) and n.name == cls)
    methods = [n for n in node.body if isinstance(n, ast.FunctionDef) and (n.name[0] != "_" or n.name == "__init__")]
    abstract = [n for n in methods if any(ast.unparse(d) == "abstractmethod" for d in n.decorator_list)]
    attributes = [n for n in node.body if isinstance(n, ast.AnnAssign)]
    return f"{len(abstract)} of {len(methods) + len(attributes)}"


def table(root: Path = ROOT) -> dict[str, str]:
    """The figures, by what they measure."""
    files = list(modules(root))
    code = [path for path, _ in files]
    core = [path for path in code if not set(path.relative_to(root / "minipeft").parts) & set(SUITE)]
    heights, rooms = floors(graph(root)), room_edges(root)
    lengths = sorted(
        (
            (lines, f"{path.stem}.{name}")
            for path in [*code, *root.glob("examples/*.py")]
            for name, lines in functions(path)
        ),
        reverse=True,
    )
    banners = sum(
        line.lstrip().startswith("# -----") for path in root.rglob("*.py") for line in path.open("r", encoding="utf-8")
    )
    return {
        "files and lines of the core": f"{len(core)}, {sum(map(_lines, core)):,}",
        "lines of code of the core": f"{sum(map(code_lines, core)):,}",
        "files and lines of the package": f"{len(code)}, {sum(map(_lines, code)):,}",
        "longest file of the package": f"{max(map(_lines, code))}",
        "lines of examples/train.py": f"{_lines(root / 'examples/train.py')}",
        "lines of README.md": f"{_lines(root / 'README.md')}",
        "rooms": f"{len(rooms)}",
        "floors, by rooms": f"{max(floors(rooms).values())}",
        "floors, by modules": f"{max(heights.values())}",
        "arrows between rooms": f"{sum(map(len, rooms.values()))}",
        "longest function without docstring": f"{lengths[0][0]} ({lengths[0][1]})",
        "median function": f"{lengths[len(lengths) // 2][0]} lines",
        "must of the LayerOps contract": contract(root / "minipeft/layers/base.py", "LayerOps"),
        "must of the Adapter contract": contract(root / "minipeft/methods/base.py", "Adapter"),
        "banner comments": f"{banners}",
    }


def code_lines(path: Path) -> int:
    """Lines of a file without docstrings, comments, imports and blank lines."""
    text = path.read_text("utf-8")
    tree, skipped = ast.parse(text), set[int]()
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        documented = (
            isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None
        )
        for part in [node] if isinstance(node, ast.Import | ast.ImportFrom) else body[:1] if documented else []:
            skipped |= set(range(part.lineno, (part.end_lineno or 0) + 1))
    lines = enumerate(text.splitlines(), 1)
    return sum(
        number not in skipped and bool(line.strip()) and not line.lstrip().startswith("#") for number, line in lines
    )


def _lines(path: Path) -> int:
    return len(path.read_text("utf-8").splitlines())


if __name__ == "__main__":
    for what, figure in table(Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else ROOT).items():
        print(f"{what:40} {figure}")
