"""``minipeft check DIR``: who reads an adapter, and with what effect."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minipeft.cli.output import print_json, print_table
from minipeft.errors import ConfigError
from minipeft.files.readers.names import Reader

if TYPE_CHECKING:
    from minipeft.files.readers.rules import Answer
    from minipeft.files.readers.tries import Tried


def check(
    directory: Annotated[Path, typer.Argument(help="An adapter's directory.")],
    readers: Annotated[list[Reader] | None, typer.Option("--for", help="Ask about this program only.")] = None,
    base: Annotated[Path | None, typer.Option(help="Directory of the base model, for --try.")] = None,
    really: Annotated[bool, typer.Option("--try", help="Load it with the programs that are installed here.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say which programs take an adapter, and with what effect.

    With --for the exit code is 0 if all of these take it as it is, and 1 if not. Errors have code 2.
    """
    if really != (base is not None):
        raise ConfigError("--try and --base go together: the adapter is tried on that base model.")
    from minipeft.files.readers.contents import read_contents  # torch comes with it, and --help must not wait for that
    from minipeft.files.readers.rules import Takes, answer

    contents = read_contents(directory)
    answers = [answer(contents, reader) for reader in readers or Reader]
    tried = _tried(answers, directory, base) if base is not None else {}
    if json:
        found = [_to_dict(given, tried.get(given.reader)) for given in answers]
        print_json({"directory": str(directory), "readers": found})
    elif readers:
        _print_in_full(answers, tried)
    else:
        print_table([_row(given, tried) for given in answers])
    differs = any(one.difference is not None and not one.is_equal for one in tried.values())
    good = all(given.takes is Takes.YES for given in answers) and not differs
    raise typer.Exit(0 if good or not readers else 1)


def _tried(answers: list[Answer], directory: Path, base: Path) -> dict[Reader, Tried]:
    from minipeft.files.readers.tries import base_model, outputs, tried
    from minipeft.model import load_adapter

    ours = outputs(load_adapter(base_model(base), directory))
    return {given.reader: tried(given.reader, base, directory, ours) for given in answers}


def _why(given: Answer) -> str:
    ranked = sorted(given.findings, key=lambda finding: ("no", "partly", "note").index(finding.rule.takes.value))
    if not ranked:
        return ""
    more = f" (and {len(ranked) - 1} more)" if len(ranked) > 1 else ""
    return ranked[0].reason + more


def _row(given: Answer, tried: dict[Reader, Tried]) -> dict[str, str]:
    row = {"reader": given.reader.value, "takes it": given.takes.value}
    row |= {"tried": tried[given.reader].said} if given.reader in tried else {}
    return row | {"why": _why(given)}


def _print_in_full(answers: list[Answer], tried: dict[Reader, Tried]) -> None:
    for given in answers:
        typer.echo(f"{given.reader.value}: {given.takes.value}")
        for finding in given.findings:
            typer.echo(f"  {finding.rule.takes.value}: {finding.reason}.")
            typer.echo(f"    read in {finding.rule.source}")
            if finding.rule.fix:
                typer.echo(f"    fix: {finding.rule.fix}")
        if given.reader in tried:
            typer.echo(f"  tried: {tried[given.reader].said}")


def _to_dict(given: Answer, tried: Tried | None) -> dict[str, Any]:
    findings = [
        {
            "rule": finding.rule.name,
            "takes": finding.rule.takes.value,
            "reason": finding.reason,
            "source": finding.rule.source,
            "fix": finding.rule.fix,
        }
        for finding in given.findings
    ]
    own = None if tried is None else {"difference": tried.difference, "said": tried.said}
    return {"reader": given.reader.value, "takes": given.takes.value, "findings": findings, "tried": own}
