"""``minipeft merge --base B --adapter DIR --out OUT``: an adapter folded into a checkpoint, from disk to disk."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minipeft.cli.output import print_json, print_table

if TYPE_CHECKING:
    from minipeft.merging.from_disk.merge import DiskMerge

WORST = 5  # layers that the table shows


def merge(
    base: Annotated[str, typer.Option(help="The model's directory, or its name on the hub.")],
    adapter: Annotated[str, typer.Option(help="The adapter's directory, or its name on the hub.")],
    out: Annotated[Path, typer.Option(help="A new directory for the merged model.")],
    untie: Annotated[
        bool, typer.Option("--untie", help="Give a weight that is tied elsewhere a copy of its own.")
    ] = False,
    allow_base_mismatch: Annotated[
        bool, typer.Option("--allow-base-mismatch", help="Do not compare the base with the adapter's samples of it.")
    ] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the base on the hub.")] = None,
    local_files_only: Annotated[
        bool, typer.Option("--local-files-only", help="Take what is in the cache, and download nothing.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Merge an adapter into a model on disk, one tensor in memory at a time, so a model larger than memory merges too."""
    from minipeft.merging.from_disk.merge import merge_from_disk  # torch comes with it, and --help must not wait

    done = merge_from_disk(
        base,
        adapter,
        out,
        untie=untie,
        allow_base_mismatch=allow_base_mismatch,
        revision=revision,
        local_files_only=local_files_only,
        progressbar=True,
    )
    if json:
        print_json(described(done))
    else:
        _print(done)


def described(done: DiskMerge) -> dict[str, Any]:
    """What a merge did, for programs."""
    return {
        "out": str(done.out),
        "files": dict(done.files),
        "tensors_changed": done.changed,
        "tensors_copied": done.copied,
        "rows_checked": done.checked.rows,
        "copies_checked": done.checked.tensors,
        "config_changed": sorted(done.config),
        "other_files": {name: str(path) for name, path in done.small_files.items()},
        "worst_relative_error": done.report.worst,
        "relative_error": dict(done.report.relative_error),
    }


def _print(done: DiskMerge) -> None:
    errors = sorted(done.report.relative_error.items(), key=lambda item: -item[1])
    rows: list[dict[str, object]] = [
        {"": "merged model", " ": f"{done.out} ({sum(done.files.values()):,} bytes in {len(done.files)} files)"},
        {"": "tensors", " ": f"{done.changed} changed, {done.copied} copied bit for bit"},
        {"": "checked", " ": f"{done.checked.rows} rows in float64, {done.checked.tensors} copies"},
        {"": "config.json", " ": ", ".join(f"{key} changed" for key in done.config) or "unchanged"},
        {"": "other files", " ": ", ".join(done.small_files) or "none"},
        {"": "layers merged", " ": str(len(errors))},
    ]
    print_table(rows)
    if errors:
        typer.echo(f"\nrounding, as a share of the update; the {min(WORST, len(errors))} worst of {len(errors)} layers")
        print_table([{"layer": path, "relative error": f"{error:.2g}"} for path, error in errors[:WORST]])
