"""``minipeft inspect DIR``: what an adapter's files hold."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minipeft.cli.output import print_json, print_table, say

if TYPE_CHECKING:
    from minipeft.files.readers.layers import Layer
    from minipeft.files.readers.summary import Summary


def inspect(
    directory: Annotated[Path, typer.Argument(help="An adapter's directory.")],
    layers: Annotated[bool, typer.Option("--layers", help="One line for each layer.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON, with every layer and key.")] = False,
) -> None:
    """Show an adapter's configuration, the sizes of its updates, and what is unusual. It needs no base model."""
    from minipeft.files.readers.summary import summary  # torch comes with it, and --help must not wait for that

    found = summary(directory)
    if json:
        print_json(found.to_dict())
        return
    _print_head(found)
    rows = [_row(layer) for layer in found.layers] if layers else _grouped(found.layers)
    for title, table in (("layers", rows), ("trained in full", found.saved), ("rows of tokens", found.tokens)):
        if table:
            typer.echo(f"\n{title}:")
            print_table(table)
            if title == "layers" and any(layer.norm_of == "tensors" for layer in found.layers):
                typer.echo("Norms are those of the tensors, not of the updates.")
    if found.unusual:
        typer.echo("\nunusual:")
        for sentence in found.unusual:
            say(f"  {sentence}")


def _print_head(found: Summary) -> None:
    config, weights = found.contents.config, found.contents.weights
    dtypes = sorted(set(weights.dtypes.values()))
    base = config.get("base_model_name_or_path") or "a base that is not named"
    say(f"{config.get('peft_type') or weights.path.name} adapter for {base}")
    typer.echo(f"{len(weights.shapes)} tensors, {len(found.layers)} layers, {', '.join(dtypes)}, {found.bytes:,} bytes")
    if found.options:
        typer.echo("\nconfiguration, where it differs from the defaults:")
        print_table([{"option": name, "value": _short(value)} for name, value in found.options.items()])


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def _row(layer: Layer) -> dict[str, Any]:
    return {
        "layer": layer.module,
        "rank": layer.rank if layer.rank is not None else "-",
        "scaling": "-" if layer.scaling is None else f"{layer.scaling:.4g}",
        "norm": f"{layer.norm:.3g}",
        "of weight": "-" if layer.relative is None else f"{layer.relative:.2%}",
        "dtype": layer.dtype,
        "bytes": layer.bytes,
    }


def _grouped(layers: Sequence[Layer]) -> list[dict[str, Any]]:
    """One line for each kind of layer, with the least, the median and the largest norm."""
    kinds: dict[str, list[Layer]] = {}
    for layer in layers:
        kinds.setdefault(layer.kind, []).append(layer)
    return [_group(kind, found) for kind, found in kinds.items()]


def _group(kind: str, found: Sequence[Layer]) -> dict[str, Any]:
    norms = [layer.norm for layer in found]
    relative = [layer.relative for layer in found if layer.relative is not None]
    return {
        "kind": kind,
        "layers": len(found),
        "rank": _span([layer.rank for layer in found]),
        "scaling": _span([layer.scaling for layer in found]),
        "norm min": f"{min(norms):.3g}",
        "median": f"{statistics.median(norms):.3g}",
        "max": f"{max(norms):.3g}",
        "of weight": f"{statistics.median(relative):.2%}" if relative else "-",
        "dtype": "+".join(sorted({layer.dtype for layer in found})),
        "bytes": sum(layer.bytes for layer in found),
    }


def _span(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    least, most = f"{min(known):.4g}", f"{max(known):.4g}"
    return least if least == most else f"{least} to {most}"
