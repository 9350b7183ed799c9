"""``minipeft convert PLACE [OUT]``: an adapter of another tool, or a pickle, as PEFT's kind; or one for another reader."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from minipeft.cli.output import print_json
from minipeft.errors import ConfigError
from minipeft.readers.names import Part, Reader


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
    reader: Annotated[
        Optional[Reader],  # noqa: UP045
        typer.Option("--for", help="Make of an adapter in PEFT's format one that this program takes."),
    ] = None,
    drop: Annotated[
        str, typer.Option(help="With --for, what may be left out: modules_to_save, tokens, head; with commas.")
    ] = "",
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Write an adapter of another tool, or a pickle, as PEFT's kind. Pickles are checked and read in a process apart.

    With --for: write an adapter of PEFT's kind as another program takes it, into a new directory.
    """
    if reader is not None:
        if out is None or base is not None:
            raise ConfigError("--for needs a directory to write to (OUT), and no --base.")
        _convert_for(reader, place, out, _parts(drop), json)
        return
    if drop:
        raise ConfigError("--drop goes with --for: it says what that program may be left without.")
    from minipeft.files.formats import convert as formats  # torch comes with it, and --help must not wait for that

    written = [str(path) for path in formats.convert(place, out, base)]
    if json:
        print_json({"written": written})
        return
    for path in written:
        typer.echo(path)


def _convert_for(reader: Reader, place: Path, out: Path, drop: list[Part], json: bool) -> None:
    from minipeft.readers.made_for import made_for

    made = made_for(reader, place, out, drop)
    if json:
        print_json({"files": sorted(made.files), "done": made.done, "dropped": made.dropped})
        return
    for sentence in [*made.done, *(f"Left out: {key}" for key in made.dropped)]:
        typer.echo(sentence)
    typer.echo(f"{reader.value} takes {out}: {', '.join(sorted(made.files))}")


def _parts(text: str) -> list[Part]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    known = [part.value for part in Part]
    for name in names:
        if name not in known:
            raise ConfigError(f"--drop takes {', '.join(known)}, not {name!r}.")
    return [Part(name) for name in names]
