"""``minipeft doctor DIR``: what is wrong with an adapter on its base."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from minipeft.cli.output import print_json


def doctor(
    directory: Annotated[str, typer.Argument(help="An adapter's directory, or its name on the hub.")],
    base: Annotated[
        str | None, typer.Option(help="The base model's directory or name on the hub. [the one that the adapter names]")
    ] = None,
    text: Annotated[Path | None, typer.Option(help="A text file to run the model on. [tokens at random]")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Load an adapter on its base, run it once, and say what is wrong with it. Nothing is trained or written.

    The exit code is 0 if nothing is wrong, 1 if something is, and 2 if it cannot be loaded or run.
    """
    from minipeft.cli.adapted_model import adapted_model, batch_of  # torch comes with it, and --help must not wait
    from minipeft.diagnosis.diagnose import CHECKS, diagnose

    found = adapted_model(directory, base)
    batch, tokenizer = batch_of(found, text)
    findings = diagnose(found.model, batch, tokenizer=tokenizer, adapter_dir=found.directory)
    if json:
        listed = [finding.to_dict() for finding in findings]
        print_json({"directory": directory, "base": str(found.base), "findings": listed})
    elif findings:
        typer.echo("\n\n".join(map(str, findings)))
    else:
        typer.echo(f"{directory} on {found.base}: healthy, none of {len(CHECKS)} checks found anything")
    raise typer.Exit(1 if findings else 0)
