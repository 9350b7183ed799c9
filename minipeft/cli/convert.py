"""``minipeft convert PLACE [OUT]``: an adapter of another tool, or a pickle, in PEFT's format; or one for another reader."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from minipeft.cli.output import print_json, say
from minipeft.errors import ConfigError
from minipeft.files.readers.names import Part, Reader

if TYPE_CHECKING:
    from minipeft.files.readers.written import Made


def convert(
    place: Annotated[Path, typer.Argument(help="A directory that another tool wrote, or a file of weights.")],
    out: Annotated[
        Path | None, typer.Argument(help="Where to write to. Left out: next to an adapter_model.bin, which stays.")
    ] = None,
    base: Annotated[
        Path | None,
        typer.Option(
            help="The model's directory, where the names of its modules are needed (kohya, LyCORIS, experts, --old-names)."
        ),
    ] = None,
    reader: Annotated[
        Reader | None, typer.Option("--for", help="Turn an adapter in PEFT's format into one that this program takes.")
    ] = None,
    drop: Annotated[
        str, typer.Option(help="With --for, what may be left out: modules_to_save, tokens, head; with commas.")
    ] = "",
    old_names: Annotated[
        bool, typer.Option("--old-names", help="With --for, give modules the names that transformers 4 had.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Write an adapter of another tool, or a pickle, in PEFT's format. Pickles are checked, and read in a process of their own.

    With --for: write an adapter in PEFT's format as another program takes it, into a new directory.
    """
    if reader is not None:
        if out is None:
            raise ConfigError("--for needs a directory to write to (OUT).")
        from minipeft.files.readers.made_for import made_for  # torch comes with it, and --help must not wait for that

        _print(reader, out, made_for(reader, place, out, _parts(drop), base=base, old_names=old_names), json)
        return
    if drop or old_names:
        raise ConfigError("--drop and --old-names go with --for, which says for which program.")
    from minipeft.files.formats import convert as formats

    written = [str(path) for path in formats.convert(place, out, base)]
    if json:
        print_json({"written": written})
    else:
        typer.echo("\n".join(written))


def _print(reader: Reader, out: Path, made: Made, json: bool) -> None:
    if json:
        print_json({"files": sorted(made.files), "done": made.done, "dropped": made.dropped})
        return
    for sentence in [*made.done, *(f"Left out: {key}" for key in made.dropped)]:
        say(sentence)
    say(f"{reader.value} takes {out}: {', '.join(sorted(made.files))}")


def _parts(text: str) -> list[Part]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    known = [part.value for part in Part]
    for name in names:
        if name not in known:
            raise ConfigError(f"--drop takes {', '.join(known)}, not {name!r}.")
    return [Part(name) for name in names]
