"""Exercise 06: curves drawn and read."""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from minipeft.learning.law import Broken, Laws, require

LAWS = Laws()
READINGS = {
    "overfits": ("a", "its training loss goes on falling while the other loss turns and rises"),
    "learning_rate_too_low": ("b", "both of its losses fall, evenly, and hardly at all"),
    "learning_rate_too_high": ("d", "both of its losses rise instead of falling"),
    "healthy": ("c", "both of its losses fall and level off together"),
}


@LAWS.law("the four runs are read")
def _reads_runs(work: SimpleNamespace) -> None:
    for name, (right, sign) in READINGS.items():
        given = getattr(work, name, None)
        require(given is not None, f"{name} has no answer yet.")
        require(given in ("a", "b", "c", "d"), f"{name} is {given!r:.30}, not one of 'a', 'b', 'c' and 'd'.")
        require(given == right, f"{name} is not run {given}: look for the one of which {sign}.")


@LAWS.law("the model to keep is the one that is best on text it has not seen")
def _keeps_the_best(work: SimpleNamespace) -> None:
    wrong = {
        800: "at the last step the training loss is lowest, and the model knows its text by heart",
        3: "that is a place in the list; give the step itself",
        4: "that is a place in the list; give the step itself",
        100: "that is the first one",
        500: "there the evaluation loss has already begun to rise",
        300: "the evaluation loss still falls after it",
    }
    require(work.keep_step is not None, "keep_step has no answer yet.")
    require(
        work.keep_step == 400,
        f"keep_step is not {work.keep_step!r:.20}: {wrong.get(work.keep_step, 'look for the lowest evaluation loss')}.",
    )


@LAWS.law("smoothing takes the mean of the last losses")
def _smooths(work: SimpleNamespace) -> None:
    losses = [8.0, 4.0, 6.0, 2.0, 10.0, 3.0]
    given = list(work.smooth(list(losses), 3))
    right = [sum(losses[max(0, end - 3) : end]) / min(3, end) for end in range(1, 7)]
    if len(given) != len(losses):
        raise Broken(f"of {len(losses)} losses it makes {len(given)}; near the beginning take as many as there are.")
    if all(abs(one - other) < 1e-9 for one, other in zip(given, right, strict=True)):
        return
    if all(abs(one - other) < 1e-9 for one, other in zip(given, losses, strict=True)):
        raise Broken("nothing is smoothed.")
    if abs(given[-1] - right[-1]) < 1e-9:
        raise Broken(
            f"near the beginning fewer losses are there: divide by how many; the first is {given[0]:g}, not {right[0]:g}."
        )
    changed = list(work.smooth([*losses[:-1], 1000.0], 3))
    if any(abs(one - other) > 1e-9 for one, other in zip(given[:-1], changed[:-1], strict=True)):
        raise Broken(
            "a later loss changes an earlier mean: it takes losses from the future, which a running curve does not have."
        )
    if all(abs(one - other) < 1e-9 for one, other in zip(given[1:], right, strict=False)):
        raise Broken("each mean stands one step too late: the loss of the step itself belongs to it.")
    raise Broken(f"at the end the mean is {given[-1]:g}, not {right[-1]:g}; with window 3 it takes three losses.")


@LAWS.law("the picture has both curves, labels and a legend")
def _draws(work: SimpleNamespace) -> None:
    steps, training, evaluation = [10, 20, 30], [3.0, 2.0, 1.0], [3.5, 2.5, 2.75]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "curve.png"
        axes = work.draw(steps, training, evaluation, path)
        require(path.is_file(), "no file is written to the path.")
        require(path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n", "the file is not a PNG.")
    require(hasattr(axes, "get_lines"), f"draw returns {type(axes).__name__}, not the Axes.")
    _check_axes(axes, steps, training, evaluation)


def _check_axes(axes: Any, steps: list[int], training: list[float], evaluation: list[float]) -> None:
    lines = [(list(line.get_xdata()), list(line.get_ydata()), line.get_label()) for line in axes.get_lines()]
    for name, losses in (("training", training), ("evaluation", evaluation)):
        found = [(x, label) for x, y, label in lines if y == losses]
        require(found, f"the {name} loss is not in the picture.")
        require(found[0][0] == steps, f"the {name} loss is drawn over {found[0][0]}, not over the steps.")
        require(not found[0][1].startswith("_"), f"the curve of the {name} loss has no label.")
    labels = {label.lower() for _, y, label in lines if y == training}
    if any("eval" in label for label in labels):
        raise Broken("the labels are swapped: the training loss is called evaluation.")
    require(axes.get_xlabel(), "the x axis has no label.")
    require(axes.get_ylabel(), "the y axis has no label.")
    require(axes.get_legend() is not None, "there is no legend.")
