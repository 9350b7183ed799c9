"""``minipeft learn``: the exercises of the tutorial, which check themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from minipeft.learning.attempt import attempt
from minipeft.learning.exercises import EXERCISES, Exercise, Progress, copy_to, find, read_progress

learn = typer.Typer(help="Learn LoRA by exercises that check themselves.", invoke_without_command=True)


@learn.callback()
def checklist(context: typer.Context) -> None:
    """Learn LoRA by exercises that check themselves; without a command, list them with a tick for each that is solved."""
    if context.invoked_subcommand is not None:
        return
    progress = read_progress()
    for exercise in EXERCISES:
        tick = "x" if exercise.number in progress.done else " "
        typer.echo(f"[{tick}] {exercise.number}  {exercise.title:35}  {exercise.file}")
    typer.echo(f"\n{_next(progress)}")


@learn.command()
def start(
    directory: Annotated[Path, typer.Argument(help="Your folder for the exercises; it is made if need be.")],
) -> None:
    """Copy the exercises into a folder of yours. Files that are there already stay as they are."""
    progress = read_progress()
    copied = copy_to(directory)
    progress.folder = directory.resolve()
    progress.save()
    kept = len(EXERCISES) - len(copied)
    typer.echo(f"{len(copied)} exercises copied to {directory}" + (f"; {kept} were there and stay" if kept else ""))
    typer.echo(_next(progress))


@learn.command()
def check(
    number: Annotated[str, typer.Argument(help="Number of the exercise, such as 03.")],
    file: Annotated[Path | None, typer.Option(help="Your file. [the one in the folder of `start`]")] = None,
    seconds: Annotated[float, typer.Option(help="Seconds after which your file is stopped.", min=0.1)] = 120,
) -> None:
    """Run your file and say which law it breaks. If it breaks none, the exercise is ticked.

    The exit code is 0 if it is solved, 1 if it breaks a law, and 2 if it cannot be run.
    """
    exercise, progress = find(number), read_progress()
    tried = attempt(file or (progress.folder or Path()) / exercise.file, exercise, seconds)
    if tried.printed:
        typer.echo(f"your file printed:\n{tried.printed}\n")
    for promise, broken in tried.results:
        typer.echo(f"no    {promise}\n      {broken}" if broken else f"yes   {promise}")
    if not tried.solved:
        raise typer.Exit(1)
    _tick(exercise, progress)


def _tick(exercise: Exercise, progress: Progress) -> None:
    progress.done.add(exercise.number)
    progress.save()
    typer.echo(f"\n[x] {exercise.number}  {exercise.title}\n{_next(progress)}")


def _next(progress: Progress) -> str:
    left = [exercise for exercise in EXERCISES if exercise.number not in progress.done]
    if not left:
        return "All exercises are solved."
    if progress.folder is None:
        return "Begin with: minipeft learn start DIR"
    file = progress.folder / left[0].file
    return f"{len(EXERCISES) - len(left)} of {len(EXERCISES)} solved. Next: {file}, then minipeft learn check {left[0].number}"
