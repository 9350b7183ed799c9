"""The command line: which commands there are, and how an error looks."""

from __future__ import annotations

import sys

import typer

from minipeft.cli.convert import convert
from minipeft.cli.inspect import inspect
from minipeft.cli.merge import merge
from minipeft.errors import MinipeftError

app = typer.Typer(
    help="Look at adapters, check who reads them, convert and merge them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(inspect)
app.command()(convert)
app.command()(merge)


@app.callback()
def commands() -> None:
    """Look at adapters, check who reads them, convert and merge them."""


def main() -> None:
    """Run the command that the arguments name; an error of ours is one line, and the exit code is 2."""
    try:
        app()
    except MinipeftError as error:
        print(f"minipeft: {error}", file=sys.stderr)
        sys.exit(2)
