"""``minipeft estimate MODEL``: what a training step takes, and which settings fit, without loading a weight."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from minipeft.cli.output import print_json, print_table
from minipeft.errors import ConfigError
from minipeft.planning.sizes import bytes_in, in_units

if TYPE_CHECKING:
    from minipeft.planning.estimate import Estimate, Setup
    from minipeft.planning.fit import Proposal


def estimate(
    model: Annotated[str, typer.Argument(help="A directory with a config.json, or a model's name on the Hub.")],
    training: Annotated[str, typer.Option(help="full, lora, or lean (LoRA with minipeft.lean).")] = "lean",
    checkpointing: Annotated[
        str | None, typer.Option(help="What lean recomputes: none, last, mlp, block, sqrt or a number of blocks.")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="Dtype of the base: float32, bfloat16 or float16. Left out: the one in its config.json."),
    ] = None,
    quantize: Annotated[str | None, typer.Option(help="Quantize the base: nf4, fp4 or int8.")] = None,
    batch: Annotated[int, typer.Option(help="Sequences in a step; with --fit, in an optimizer step.")] = 8,
    length: Annotated[int, typer.Option(help="Tokens in a sequence.")] = 512,
    r: Annotated[int, typer.Option("--r", help="Rank of the adapter.")] = 8,
    targets: Annotated[str, typer.Option(help="all-linear, or names of modules with commas.")] = "all-linear",
    device: Annotated[str | None, typer.Option(help="cpu or cuda. Left out: cuda if there is one.")] = None,
    memory: Annotated[
        str | None,
        typer.Option("--fit", help="Propose settings that fit into this memory, such as 24GiB, the fastest first."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say how much memory training takes, itemised. The model is built without weights, and a step of it is followed."""
    wanted = None if memory is None else bytes_in(memory)
    if wanted is not None and (training != "lean" or checkpointing is not None):
        raise ConfigError("--fit chooses how to train; leave out --training and --checkpointing.")
    import torch  # late, since --help must not wait for it

    from minipeft.config.adapter_config import config_from_dict
    from minipeft.model import get_adapter_model
    from minipeft.planning.estimate import Planner, Setup
    from minipeft.planning.fit import fit

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    way = int(checkpointing) if checkpointing is not None and checkpointing.isdigit() else checkpointing
    setup = Setup(training, way, dtype, quantize, batch, length, device)
    config = config_from_dict(_options(r, targets), "--r and --targets", live=True)
    if wanted is None:
        _print(Planner(model, config, setup, get_adapter_model).estimate(), json)
    else:
        _print_proposals(fit(model, config, setup, wanted, get_adapter_model), wanted, json)


def _options(r: int, targets: str) -> dict[str, Any]:
    modules = targets if targets.startswith("all-linear") else [name.strip() for name in targets.split(",")]
    return {"peft_type": "LORA", "r": r, "target_modules": modules}


def _print(found: Estimate, json: bool) -> None:
    if json:
        print_json(found.to_dict())
        return
    typer.echo(f"{found.model}, {described(found.setup)}\n")
    rows: list[dict[str, Any]] = [
        {"": "parameters", " ": f"{found.parameters:,}"},
        {"": "of which train", " ": f"{found.trainable:,} ({found.trainable / found.parameters:.2%})"},
    ]
    if found.adapter_file:
        rows.append({"": "adapter file", " ": f"{found.adapter_file:,} bytes"})
    print_table(rows)
    typer.echo("\nat the peak of a step:")
    items = [{"": item, " ": in_units(size)} for item, size in found.memory.items() if size]
    print_table([*items, {"": "all", " ": in_units(found.peak)}])
    _print_remarks(found)


def _print_remarks(found: Estimate) -> None:
    if found.remarks:
        typer.echo("\n" + "\n".join(found.remarks))


def described(setup: Setup) -> str:
    """A setup in words."""
    how = {"full": "full fine-tuning", "lora": "LoRA", "lean": f"LoRA, lean ({setup.checkpointing or 'default'})"}
    base = setup.quantize or setup.dtype or "the model's own dtype"
    return f"{how[setup.training]} on a base in {base}, {setup.batch} x {setup.length} tokens, {setup.device}"


def _print_proposals(proposals: list[Proposal], memory: int, json: bool) -> None:
    if json:
        print_json([proposal.to_dict() for proposal in proposals])
        return
    rows = [
        {
            "checkpointing": proposal.estimate.setup.checkpointing or "not lean",
            "base": proposal.estimate.setup.quantize or proposal.estimate.setup.dtype or "own dtype",
            "batch": proposal.estimate.setup.batch,
            "accumulation": proposal.accumulation,
            "computed again": f"{proposal.recomputed:.0%}",
            "peak": in_units(proposal.estimate.peak),
        }
        for proposal in proposals
    ]
    typer.echo(f"fits into {in_units(memory)}, the fastest first:\n")
    print_table(rows)
    typer.echo("\n" + "\n".join(proposals[0].code()))
    _print_remarks(proposals[0].estimate)
