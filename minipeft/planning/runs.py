"""Finished and running runs in one picture: their losses, and the size of their updates, from the files that they wrote."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minipeft.errors import CheckpointError, ConfigError, MinipeftError, told_error
from minipeft.files.file_names import CONFIG_FILE
from minipeft.files.readers.layers import Layer
from minipeft.files.readers.summary import summary
from minipeft.files.reading import read_limited, reading

METRICS, STATE = "metrics.jsonl", "trainer_state.json"  # of examples/train.py, and of transformers' Trainer
MAX_BYTES = 2**28
SMOOTHED = 40  # windows along a curve
Curve = list[tuple[float, float]]


@dataclass(frozen=True)
class RunLog:
    """One run.

    Attributes:
        name: of its directory.
        training: (step, loss), as logged.
        evaluation: (step, loss).
        layers: of the adapter that it wrote last; none if it has written none yet.
    """

    name: str
    training: Curve
    evaluation: Curve
    layers: list[Layer] = field(default_factory=list)


def read_run(place: Path) -> RunLog:
    """Read a run's directory, one checkpoint of it, or its log file; raises CheckpointError if it has no log, or a damaged one."""
    with reading(place):
        path = _log(place)
    rows = _rows(path)
    training, evaluation = _curve(rows, "loss"), _curve(rows, "eval_loss")
    if not training and not evaluation:
        raise CheckpointError(f"{path} has no losses in it yet, or none that is finite.")
    directory = next((folder for folder in (place, path.parent) if (folder / CONFIG_FILE).is_file()), None)
    layers = [] if directory is None else _layers(directory)
    return RunLog(place.name if place.is_dir() else path.parent.name, training, evaluation, layers)


def _log(place: Path) -> Path:
    if place.is_file():
        return place
    inside = [place / METRICS, place / STATE]
    checkpoints = [path for path in place.glob(f"checkpoint-*/{STATE}") if path.parent.name.split("-")[-1].isdigit()]
    inside += sorted(checkpoints, key=lambda path: -int(path.parent.name.split("-")[-1]))[:1]
    found = next((path for path in inside if path.is_file()), None)
    if found is None:
        what = "is not a directory" if not place.exists() else f"has neither {METRICS} nor {STATE}"
        raise CheckpointError(f"{place} {what}; give the output directory of a training run.")
    return found


def _rows(path: Path) -> list[dict[str, Any]]:
    with reading(path):
        text = read_limited(path, MAX_BYTES).decode("utf-8")
        if path.suffix == ".jsonl":
            whole = text[: text.rfind("\n") + 1]  # of a run that goes on, the last line may not be whole
            rows = [json.loads(line) for line in whole.splitlines()]
        else:
            state = json.loads(text)
            if not isinstance(state, dict) or "log_history" not in state:
                raise CheckpointError(f"{path} is not the log of a training run: it has no log_history.")
            rows = state["log_history"]
        return [dict(row) for row in rows]


def _curve(rows: list[dict[str, Any]], name: str) -> Curve:
    found = [(row.get("step"), row.get(name)) for row in rows]
    return [
        (float(step), float(loss))
        for step, loss in found
        if isinstance(step, int | float) and isinstance(loss, int | float) and math.isfinite(loss)
    ]


def _layers(directory: Path) -> list[Layer]:
    try:
        return summary(directory).layers
    except MinipeftError:  # written just now, or of a kind that has no layers
        return []


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
        raise ConfigError(f"{path} cannot be written ({told_error(error)}).") from None


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
    blocks = _summed_by_block({layer.module: layer.norm for layer in run.layers})
    axes.plot(list(blocks), list(blocks.values()), "o-", color=colour, ms=4, label=run.name)


def _summed_by_block(layers: Mapping[str, float]) -> dict[str, float]:
    """The norm of all layers that have the same first number in their names, by that number, in the order of the layers."""
    squares: dict[str, float] = {}
    for name, norm in layers.items():
        block = next((word for word in name.split(".") if word.isdigit()), "-")
        squares[block] = squares.get(block, 0.0) + norm * norm
    return {block: math.sqrt(square) for block, square in squares.items()}
