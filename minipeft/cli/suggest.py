"""``minipeft suggest MODEL``: settings to begin with, each with its reason."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from minipeft.cli.output import print_json
from minipeft.planning.sizes import bytes_in, in_units

if TYPE_CHECKING:
    from minipeft.planning.fit import Proposal


def suggest(
    model: Annotated[str, typer.Argument(help="A directory with a config.json, or a model's name on the Hub.")],
    tokens: Annotated[int | None, typer.Option(help="Tokens to train on, each counted once.")] = None,
    text: Annotated[Path | None, typer.Option(help="A text file whose tokens are counted instead.")] = None,
    length: Annotated[int, typer.Option(help="Tokens in a sequence.")] = 512,
    memory: Annotated[
        str | None, typer.Option(help="Memory of the device, such as 24GiB: also say how training fits in.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Suggest targets, rank, alpha, learning rate, batch and schedule for LoRA, with the reason for each."""
    wanted = None if memory is None else bytes_in(memory)
    import torch  # late, since --help must not wait for it

    from minipeft.model import get_adapter_model
    from minipeft.planning.estimate import Setup
    from minipeft.planning.fit import fit
    from minipeft.planning.suggest import suggest as suggested

    found = suggested(model, get_adapter_model, tokens, length, text)
    proposals = []
    if wanted is not None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        setup = Setup(batch=found["batch_size"], length=length, device=device)
        proposals = fit(model, found.config, setup, wanted, get_adapter_model)
    if json:
        print_json({**found.to_dict(), "fits": [proposal.to_dict() for proposal in proposals]})
        return
    for choice in found.choices:
        typer.echo(f"{choice.name} = {choice.value}\n    {choice.reason}")
    for proposal in proposals[:1]:
        typer.echo(_memory(proposal))
    typer.echo(f"\n{found.code()}")


def _memory(proposal: Proposal) -> str:
    return (
        f"memory = {in_units(proposal.estimate.peak)}\n    {'; '.join(proposal.code())}; "
        f"{proposal.estimate.setup.batch} sequences in a pass, {proposal.accumulation} passes in a step; "
        f"{proposal.recomputed:.0%} of the forward pass is computed again (minipeft estimate --fit)"
    )
