"""The command line: which commands there are, and how an error looks."""

from __future__ import annotations

import errno
import signal
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
for command in (inspect, check, convert, merge, doctor, estimate, suggest, diff, plot):
    app.command()(command)
app.add_typer(learn, name="learn")


class _CtrlC:
    """Stops the program, and remembers that: a package that is just being imported may raise something else instead."""

    pressed = False

    def __call__(self, number: int, frame: object) -> None:
        self.pressed = True
        raise KeyboardInterrupt


def main() -> None:
    """Run the command that the arguments name; an error is one line, and the exit code is then 2."""
    arguments, ctrl_c, before = sys.argv[1:] or ["--help"], _CtrlC(), signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:
        signal.signal(signal.SIGINT, ctrl_c)
    try:
        code = app(arguments, prog_name="minipeft", standalone_mode=False)
    except (Exception, KeyboardInterrupt) as error:
        if ctrl_c.pressed or isinstance(error, typer.Abort | KeyboardInterrupt):
            sys.exit(130)  # as a shell says of Ctrl-C
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            _stop(f"what it says cannot be written: {error.strerror}.")
        if not isinstance(error, MinipeftError) and not hasattr(error, "format_message"):
            raise  # only click's errors have it, of which typer may hold a copy of its own
        _stop(str(error) if isinstance(error, MinipeftError) else error.format_message())
    finally:
        signal.signal(signal.SIGINT, before)
    sys.exit(130 if ctrl_c.pressed else code if isinstance(code, int) else 0)


def _stop(message: str) -> None:
    print(f"minipeft: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)
