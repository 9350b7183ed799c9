"""What a command prints: a table for people, JSON for programs; and sizes of memory as people write them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence

import typer

from minipeft.errors import ConfigError, told

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


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
        typer.echo("  ".join(padded).rstrip())


def bytes_in(text: str) -> int:
    """Bytes of "24GiB", "24 GB", "800M" or "1e9"; all units count in steps of 1024, as the makers of GPUs count.

    Raises:
        ConfigError: it is something else.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?(?:e\d+)?)\s*([kKmMgGtT]?)(?:i?[bB])?\s*", text)
    number = float(match[1]) * UNITS[match[2].upper()] if match else 0
    if match is None or not 1 <= number < 2**60:
        raise ConfigError(f"{told(text)} is not a size of memory; write it as 24GiB or 800MiB.")
    return int(number)


def in_units(count: int) -> str:
    """Bytes with a unit that suits them."""
    for unit in ("GiB", "MiB", "KiB"):
        size = count / UNITS[unit[0]]
        if size >= 1:
            return f"{size:,.1f} {unit}"
    return f"{count} bytes"
