"""``minipeft plot RUN [RUN ...]``: runs in one picture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def plot(
    runs: Annotated[list[Path], typer.Argument(help="Output directories of examples/train.py or of a Trainer.")],
    out: Annotated[Path, typer.Option(help="The picture to write.")] = Path("runs.png"),
) -> None:
    """Draw the losses of runs over each other, and the size of each one's update by block."""
    from minipeft.planning.runs import draw_runs, read_run  # torch comes with it, and --help must not wait for that

    draw_runs([read_run(run) for run in runs], out)
    typer.echo(out)
