"""``minipeft inspect DIR``: what an adapter's files hold."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from minipeft.cli.output import print_json, print_table


def inspect(
    directory: Annotated[Path, typer.Argument(help="An adapter's directory.")],
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show an adapter's configuration and tensors."""
    found = described(directory)
    if json:
        print_json(found)
        return
    print_table([{"option": name, "value": value} for name, value in found["config"].items()])
    typer.echo()
    print_table(found["tensors"])


def described(directory: Path) -> dict[str, Any]:
    """The configuration and, for each tensor, its key, shape and dtype.

    Raises:
        MinipeftError: see `minipeft.files.format.open_adapter`.
    """
    from minipeft.files.format import open_adapter  # torch comes with it, and --help must not wait for that

    file = open_adapter(directory)
    tensors = [
        {"key": key, "shape": list(shape), "dtype": file.dtypes[key]} for key, shape in sorted(file.shapes.items())
    ]
    return {"config": file.config.to_dict(), "tensors": tensors}
