"""Pictures of the rows in a results folder, drawn next to them.

python benchmarks/plots.py [folder]
"""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from rows import RESULTS
from subjects import CORE, PEFT

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # after the choice of a backend that needs no screen
from matplotlib.axes import Axes

Records = list[dict[str, str]]
LAYER_CASE = re.compile(r"(?P<shape>.+), m=(?P<m>\d+), r=(?P<r>\d+), dropout (?P<dropout>.+)")
OURS, THEIRS, OTHERS = "#0072b2", "#d55e00", "#8c8c8c"
RANK_COLOURS = {8: "#0072b2", 16: "#009e73", 32: "#e69f00", 64: "#d55e00"}


def colour(subject: str) -> str:
    return OURS if subject.startswith(CORE) else THEIRS if subject.startswith(PEFT) else OTHERS


def save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=130)
    plt.close(figure)
    print(path)


def draw_layers(records: Records, path: Path) -> None:
    """Overhead of our layer over the frozen one as a share of PEFT's, by rows, one panel a shape."""
    for record in records:
        match = LAYER_CASE.fullmatch(record["case"])
        assert match is not None, record["case"]
        record.update(match.groupdict())
    shapes = list(dict.fromkeys(record["shape"] for record in records))
    figure, panels = plt.subplots(
        1, len(shapes), figsize=(4.6 * len(shapes), 4.6), sharey=True, squeeze=False, layout="constrained"
    )
    for axes, shape in zip(panels[0], shapes, strict=True):
        draw_shape(axes, shape, [r for r in records if r["shape"] == shape and float(r["dropout"]) == 0])
    panels[0][0].set_ylabel("overhead, ours / PEFT's")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize="small", frameon=False)
    figure.suptitle("Time that the adapter adds to a frozen layer, forward and backward, next to PEFT")
    save(figure, path)


def draw_shape(axes: Axes, shape: str, records: Records) -> None:
    styles = {"overhead over the frozen layer": "-", "overhead, same products": "--"}
    for measure, style in styles.items():
        for r, ink in RANK_COLOURS.items():
            some = [x for x in records if x["measure"] == measure and int(x["r"]) == r]
            rows = [int(x["m"]) for x in some]
            ratio, low, high = ([float(x[name]) for x in some] for name in ("ratio", "ratio_low", "ratio_high"))
            if some:
                label = f"r={r}" + (", base by the same matrix library" if style == "--" else "")
                axes.plot(rows, ratio, style, color=ink, marker="o", markersize=3, label=label)
                axes.fill_between(rows, low, high, color=ink, alpha=0.12, linewidth=0)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.axhline(0, color="black", linewidth=0.8, linestyle=":")
    axes.annotate("PEFT", (0.01, 1), xycoords=("axes fraction", "data"), va="bottom", fontsize="small")
    axes.annotate("frozen layer", (0.01, 0), xycoords=("axes fraction", "data"), va="bottom", fontsize="small")
    axes.set_xscale("log", base=2)
    axes.set_xticks(
        ticks := sorted({int(record["m"]) for record in records}), map(str, ticks), rotation=45, fontsize="small"
    )
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, -1.5), min(high, 2.5))  # a spread beyond would flatten all the rest
    axes.set_title(shape)
    axes.set_xlabel("rows (batch x tokens)")
    axes.grid(alpha=0.25)


def bars(axes: Axes, records: Records, unit: str) -> None:
    """One horizontal bar a subject, labelled with its value and its share of the peer's."""
    subjects = [record["subject"] for record in records]
    values = [float(record["ours"]) for record in records]
    axes.barh(subjects, values, color=[colour(subject) for subject in subjects], height=0.7)
    for index, (record, value) in enumerate(zip(records, values, strict=True)):
        axes.annotate(
            f"{value:,.0f} {unit}, {float(record['ratio']):.2f}x",
            (value, index),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize="small",
        )
    axes.set_xlim(0, 1.35 * max(values))
    axes.set_ylim(len(subjects) - 0.4, -0.6)
    axes.grid(axis="x", alpha=0.25)
    axes.set_axisbelow(True)


def _case_and_processor(record: dict[str, str]) -> tuple[str, str]:
    return record["case"], f"instructions: {record['instructions']}"


def draw_steps(records: Records, path: Path) -> None:
    """Milliseconds of a training step by subject, with the time of its matrix products alone as a line; by processor."""
    cases = list(dict.fromkeys(map(_case_and_processor, (r for r in records if r["measure"] == "training step"))))
    rows = (len(cases) + 1) // 2
    figure, panels = plt.subplots(rows, 2, figsize=(17, 0.4 + 4 * rows), squeeze=False, layout="constrained")
    for axes in panels.flat[len(cases) :]:
        axes.set_axis_off()
    for axes, case in zip(panels.flat, cases, strict=False):
        here = [r for r in records if _case_and_processor(r) == case]
        steps = [r for r in here if r["measure"] == "training step"]
        bars(axes, [r for r in steps if r["peer_name"] == PEFT], "ms")
        bounds = [r for r in here if r["measure"] == "share of the step"]
        for bound, style in zip(bounds, ("-", ":"), strict=False):
            axes.axvline(float(bound["ours"]), color="black", linestyle=style, linewidth=1.2, label=bound["subject"])
        axes.set_title("\n".join(case))
        axes.set_xlabel("ms a step, forward and backward (next to each bar: share of PEFT's)")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize="small", frameon=False)
    figure.suptitle("Training step with LoRA r=8 on the linear layers of each block")
    save(figure, path)


def draw_memory(records: Records, path: Path) -> None:
    """Peak memory by subject, net of the interpreter, and the same bars' share of PEFT's; a panel for each model."""
    net = [r for r in records if r["measure"].startswith("peak") and r["measure"].endswith("net")]
    shown = [r for r in net if r["peer_name"] == PEFT]
    cases = list(dict.fromkeys(map(_case_and_processor, shown)))
    height = 1 + 0.27 * max(sum(_case_and_processor(r) == case for r in shown) for case in cases)
    figure, panels = plt.subplots(1, len(cases), figsize=(8 * len(cases), height), squeeze=False, layout="constrained")
    for axes, case in zip(panels[0], cases, strict=True):
        bars(axes, [r for r in shown if _case_and_processor(r) == case], "MiB")
        axes.set_title("\n".join(case))
        axes.set_xlabel("MiB (next to each bar: share of PEFT's)")
    figure.suptitle("Peak memory of a training step with LoRA r=8, net of the interpreter")
    save(figure, path)


def draw_scale(records: Records, path: Path) -> None:
    """Milliseconds against the number of adapted layers, one panel a verb, both axes logarithmic."""
    sized = [record for record in records if record["case"].endswith(" layers")]
    verbs = list(dict.fromkeys(record["measure"] for record in sized))
    figure, panels = plt.subplots(2, (len(verbs) + 1) // 2, figsize=(13, 6.4), sharex=True, layout="constrained")
    for axes, verb in zip(panels.flat, verbs, strict=False):
        some = [record for record in sized if record["measure"] == verb]
        layers = [int(record["case"].split()[0]) for record in some]
        for name, field, ink in ((PEFT, "peer", THEIRS), ("minipeft", "ours", OURS)):
            axes.loglog(
                layers, [float(record[field]) for record in some], color=ink, marker="o", markersize=4, label=name
            )
        axes.set_title(verb, fontsize="medium")
        axes.set_xticks(layers, map(str, layers), minor=False)
        axes.minorticks_off()
        axes.grid(alpha=0.25)
    for axes in panels.flat[len(verbs) :]:
        axes.set_axis_off()
    for axes in panels[:, 0]:
        axes.set_ylabel("ms")
    for axes in panels[-1]:
        axes.set_xlabel("adapted layers")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize="small", frameon=False)
    figure.suptitle("Time of a verb against the number of adapted layers")
    save(figure, path)


DRAWINGS: dict[str, Callable[[Records, Path], None]] = {
    "speed_layer": draw_layers,
    "speed_step": draw_steps,
    "memory": draw_memory,
    "scale": draw_scale,
}


def draw(folder: Path, *names: str) -> Sequence[Path]:
    """Draw every file of rows in the folder that there is a picture for, or those with these names."""
    drawn = []
    for name, drawing in DRAWINGS.items():
        if names and name not in names:
            continue
        for path in sorted(folder.glob(f"{name}*.csv")):
            with path.open(newline="", encoding="utf-8") as file:
                drawing(list(csv.DictReader(file)), path.with_suffix(".png"))
            drawn.append(path.with_suffix(".png"))
    return drawn


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS)
