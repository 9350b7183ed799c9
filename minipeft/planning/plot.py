"""Runs in one picture: their losses, and the size of their updates by block."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minipeft.errors import ConfigError
from minipeft.planning.adapter_diff import summed_by_block
from minipeft.planning.runs import Curve, RunLog

SMOOTHED = 40  # windows along a curve


def draw_runs(runs: Sequence[RunLog], path: Path) -> None:
    """Draw runs over each other into a PNG or another file that matplotlib writes.

    Raises ConfigError if matplotlib is not installed, or does not write such files.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("plots take matplotlib: pip install 'minipeft[train]'") from None
    if path.is_dir() or not path.suffix:
        raise ConfigError(f"{path} is not the name of a picture; give one such as runs.png.")
    with_updates = [run for run in runs if run.layers]
    figure = Figure(figsize=(8 if not with_updates else 13, 4.8), layout="constrained")
    panels = figure.subplots(1, 2 if with_updates else 1, squeeze=False)[0]
    colours = [f"C{place % 10}" for place in range(len(runs))]
    for run, colour in zip(runs, colours, strict=True):
        _draw_losses(panels[0], run, colour)
        if run.layers:
            _draw_updates(panels[1], run, colour)
    panels[0].set(xlabel="step", ylabel="loss (nats per token)", title="loss (dots: evaluation)")
    if with_updates:
        panels[1].set(xlabel="block", ylabel=r"Frobenius norm of $\Delta W$", title="size of the update, by block")
        panels[1].set_ylim(bottom=0)
    for axes in panels:
        axes.grid(alpha=0.25)
        axes.legend(fontsize="small")
    try:
        figure.savefig(path, dpi=130)
    except (ValueError, OSError) as error:
        raise ConfigError(f"{path} cannot be written ({' '.join(str(error).split())}).") from None


def _draw_losses(axes: Any, run: RunLog, colour: str) -> None:
    if run.training:
        steps, losses = zip(*run.training, strict=True)
        axes.plot(steps, losses, color=colour, lw=0.7, alpha=0.25)
        axes.plot(*zip(*_smoothed(run.training), strict=True), color=colour, lw=1.6, label=run.name)
    if run.evaluation:
        axes.plot(*zip(*run.evaluation, strict=True), "o", color=colour, ms=5, label=None if run.training else run.name)


def _smoothed(curve: Curve) -> Curve:
    """The mean of the values up to each one, over a fortieth of the curve."""
    window = max(1, math.ceil(len(curve) / SMOOTHED))
    ends = range(window, len(curve) + 1)
    return [(curve[end - 1][0], sum(loss for _, loss in curve[end - window : end]) / window) for end in ends]


def _draw_updates(axes: Any, run: RunLog, colour: str) -> None:
    blocks = summed_by_block({layer.module: layer.norm for layer in run.layers})
    axes.plot(list(blocks), list(blocks.values()), "o-", color=colour, ms=4, label=run.name)
