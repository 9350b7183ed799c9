"""What a command prints: a table for people, JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import typer

from minipeft.errors import printable


def say(text: str) -> None:
    """Print a line. What a file says in it cannot steer the terminal: characters that do not show are escaped."""
    typer.echo(printable(text, len(text)).replace("\n", "\\n"))


def print_json(value: object) -> None:
    """Print a value as JSON, indented."""
    typer.echo(json.dumps(value, indent=2))


def print_table(rows: Sequence[Mapping[str, object]]) -> None:
    """Print rows with the same keys as aligned columns under those keys; numbers stand to the right."""
    if not rows:
        return
    columns = list(rows[0])
    cells = [columns, *([str(row[column]) for column in columns] for row in rows)]
    widths = [max(len(line[place]) for line in cells) for place in range(len(columns))]
    right = [isinstance(rows[0][column], int | float) for column in columns]
    for line in cells:
        padded = (
            text.rjust(width) if to_the_right else text.ljust(width)
            for text, width, to_the_right in zip(line, widths, right, strict=True)
        )
        say("  ".join(padded).rstrip())
