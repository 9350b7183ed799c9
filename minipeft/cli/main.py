"""The command line: which commands there are, and how an error looks."""

from __future__ import annotations

import sys

import typer

from minipeft.cli.check import check
from minipeft.cli.convert import convert
from minipeft.cli.diff import diff
from minipeft.cli.doctor import doctor
from minipeft.cli.estimate import estimate
from minipeft.cli.inspect import inspect
from minipeft.cli.learn import learn
from minipeft.cli.merge import merge
from minipeft.cli.plot import plot
from minipeft.cli.suggest import suggest
from minipeft.errors import MinipeftError

app = typer.Typer(
    help="Look at adapters, check who reads them, convert and merge them; plan, compare and check training.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command()(inspect)
app.command()(check)
app.command()(convert)
app.command()(merge)
app.command()(doctor)
app.command()(estimate)
app.command()(suggest)
app.command()(diff)
app.command()(plot)
app.add_typer(learn, name="learn")


@app.callback()
def commands() -> None:
    """Look at adapters, check who reads them, convert and merge them; plan, compare and check training."""


def main() -> None:
    """Run the command that the arguments name; an error is one line, and the exit code is then 2."""
    arguments = sys.argv[1:] or ["--help"]
    try:
        code = app(arguments, prog_name="minipeft", standalone_mode=False)
    except MinipeftError as error:
        _stop(str(error))
    except typer.Abort:
        sys.exit(130)  # as a shell says of Ctrl-C
    except Exception as error:
        if not hasattr(error, "format_message"):  # only click's have it, of which typer may hold a copy of its own
            raise
        _stop(error.format_message())
    sys.exit(code if isinstance(code, int) else 0)


def _stop(message: str) -> None:
    print(f"minipeft: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)
