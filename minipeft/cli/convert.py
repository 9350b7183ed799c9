"""``minipeft convert PLACE [OUT]``: an adapter of another tool, or a pickle, as PEFT's kind."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from minipeft.cli.output import print_json


def convert(
    place: Annotated[Path, typer.Argument(help="A directory that another tool wrote, or a file of weights.")],
    out: Annotated[
        Optional[Path],  # noqa: UP045 - typer reads it at run time, on Python 3.10 too
        typer.Argument(help="Where to write to. Left out: next to an adapter_model.bin, which stays."),
    ] = None,
    base: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="The model's directory, where the names of its modules are needed (kohya, LyCORIS)."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Write an adapter of another tool, or a pickle, as PEFT's kind. Pickles are checked and read in a process apart."""
    from minipeft.files.formats import convert as formats  # torch comes with it, and --help must not wait for that

    written = [str(path) for path in formats.convert(place, out, base)]
    if json:
        print_json({"written": written})
        return
    for path in written:
        typer.echo(path)
