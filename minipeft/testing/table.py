"""``python -m minipeft.testing.table``: which method adapts which layer type, in Markdown, made from the registry.

Every cell is tried: the method adapts a tiny example of the layer, and the cell is empty if it refuses. The last column
and the last row count the lines of code of the file that defines the method or the layer type.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minipeft.errors import MinipeftError, StateError
from minipeft.registry import registry
from minipeft.testing.report import refusal

BEGIN, END = "<!-- python -m minipeft.testing.table -->", "<!-- end of the table -->"


def table() -> str:
    """The Markdown table of the built-in methods (rows) and layer types (columns); plugins are left out.

    Raises:
        TargetError: a layer type cannot be tried, since its package is not installed.
    """
    methods, layers = _built_in()
    refused = refusals()
    rows = [["", *map(_short, layers), "lines"], ["---", *[":-:"] * len(layers), "---:"]]
    for method, cls in methods.items():
        cells = ["" if (method, layer) in refused else "✓" for layer in layers]
        rows.append([f"`{method}`", *cells, str(code_lines(inspect.getfile(cls)))])
    rows.append(["lines", *(str(code_lines(inspect.getfile(type(ops)))) for ops in layers.values()), ""])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def refusals() -> dict[tuple[str, str], str]:
    """(method, layer type) -> the message with which the method refuses the layer, for each empty cell of the table."""
    methods, layers = _built_in()
    tried = {(method, layer): refusal(method, layer) for method in methods for layer in layers}
    return {pair: words for pair, words in tried.items() if words is not None}


def with_table(text: str, new: str, begin: str = BEGIN, end: str = END) -> str:
    """The text with `new` between two marker lines.

    Raises:
        StateError: the text does not have each marker once, in this order.
    """
    before, found, rest = text.partition(begin)
    inside, closed, after = rest.partition(end)
    if not found or not closed or begin in rest or end in before + inside + after:
        raise StateError(f"the table goes between the lines {begin!r} and {end!r}, once each; nothing was written.")
    return f"{before}{begin}\n{new}{end}{after}"


def code_lines(path: str) -> int:
    """The lines of code of a Python file, without blank lines, comments and docstrings."""
    source = Path(path).read_text("utf-8")
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    docs: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
            docs.update(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    lines = enumerate(source.splitlines(), start=1)
    return sum(bool(line.strip()) and not line.strip().startswith("#") and n not in docs for n, line in lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m minipeft.testing.table", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--write", metavar="FILE", type=Path, help="put it between the marker lines of this file")
    parser.add_argument("--why", action="store_true", help="print what each empty cell says instead")
    options = parser.parse_args(arguments)
    try:
        if options.why:
            for (method, layer), words in refusals().items():
                print(f"{method} on {_short(layer)}: {words}")
        elif options.write:
            text = options.write.read_text("utf-8")
            options.write.write_text(with_table(text, table()), "utf-8")
        else:
            print(table(), end="")
    except (MinipeftError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    return 0


def _built_in() -> tuple[dict[str, type[Any]], dict[str, type[Any]]]:
    methods = {name: registry.method_class(name) for name in registry.method_names()}
    layers = dict(sorted(registry.layers().items(), key=lambda item: _short(item[0])))
    own = "minipeft."
    return (
        {name: cls for name, cls in methods.items() if cls.__module__.startswith(own)},
        {name: ops for name, ops in layers.items() if type(ops).__module__.startswith(own)},
    )


def _short(layer: str) -> str:
    return layer.rpartition(".")[2]


if __name__ == "__main__":
    sys.exit(main())
