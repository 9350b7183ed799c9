"""``minipeft diff A B``: how two adapters differ, layer by layer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minipeft.cli.output import print_json, print_table
from minipeft.errors import shown

if TYPE_CHECKING:
    from minipeft.planning.adapter_diff import LayerDiff

MOST = 10  # layers that the table shows


def diff(
    first: Annotated[Path, typer.Argument(help="An adapter's directory.")],
    second: Annotated[Path, typer.Argument(help="Another adapter's directory, for the same base.")],
    layers: Annotated[bool, typer.Option("--layers", help=f"Show all layers, not only {MOST}.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON, with all angles.")] = False,
) -> None:
    """Compare two adapters' updates: sizes, difference, and the angles between the spaces that they act on."""
    from minipeft.planning.adapter_diff import adapter_diff  # torch comes with it, and --help must not wait for that

    found = adapter_diff(first, second)
    if json:
        print_json(found.to_dict())
        return
    rows = found.layers if layers else found.layers[:MOST]
    one, two = found.norms
    typer.echo(f"norm {one:.4g} and {two:.4g}, difference {found.difference:.4g} ({len(found.layers)} layers)\n")
    print_table([_row(layer) for layer in rows])
    if len(rows) < len(found.layers):
        typer.echo(f"and {len(found.layers) - len(rows)} layers that moved less apart (--layers)")
    if found.not_compared:
        typer.echo(f"\nnot compared, since it trains in full: {shown(found.not_compared, 5)}")


def _row(layer: LayerDiff) -> dict[str, Any]:
    return {
        "layer": layer.module,
        "ranks": f"{layer.ranks[0]}, {layer.ranks[1]}",
        "norms": f"{layer.norms[0]:.3g}, {layer.norms[1]:.3g}",
        "difference": f"{layer.difference:.3g}",
        "relative": "-" if layer.relative is None else f"{layer.relative:.1%}",
        "cosine": "-" if layer.cosine is None else f"{layer.cosine:.3f}",
        "angles of columns": _span(layer.column_angles),
        "of rows": _span(layer.row_angles),
    }


def _span(angles: tuple[float, ...]) -> str:
    return f"{angles[0]:.1f} to {angles[-1]:.1f} degrees" if angles else "-"
