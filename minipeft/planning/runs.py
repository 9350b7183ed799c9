"""Finished and running runs: their losses, and the size of their updates, from the files that they wrote."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minipeft.errors import CheckpointError, MinipeftError
from minipeft.files.file_names import CONFIG_FILE
from minipeft.files.reading import read_limited, reading
from minipeft.readers.layers import Layer
from minipeft.readers.summary import summary

METRICS, STATE = "metrics.jsonl", "trainer_state.json"  # of examples/train.py, and of transformers' Trainer
MAX_BYTES = 2**28
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
