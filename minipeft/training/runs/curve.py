"""The loss curve of a run, as a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from minipeft.training.runs.metrics import Row


def plot_losses(rows: Sequence[Row], path: Path, title: str) -> None:
    """Draw the losses of all updates and evaluations of a run."""
    from matplotlib.figure import Figure  # takes a second, and only one process draws, at the end

    updates, evaluations = [row for row in rows if "loss" in row], [row for row in rows if "eval_loss" in row]
    steps, losses = [row["step"] for row in updates], [row["loss"] for row in updates]
    window = max(1, math.ceil(len(steps) / 20))
    means = [sum(losses[end - window : end]) / window for end in range(window, len(losses) + 1)]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, losses, color="tab:blue", lw=0.8, alpha=0.3, label="training, each update")
    axes.plot(steps[window - 1 :], means, color="tab:blue", label=f"training, mean of the last {window}")
    axes.plot([row["step"] for row in evaluations], [row["eval_loss"] for row in evaluations], "o-",
              color="tab:orange", label="evaluation, with perplexity")  # fmt: skip
    for row in evaluations:
        axes.annotate(f"{row['eval_perplexity']:.1f}", (row["step"], row["eval_loss"]), (0, -14),
                      textcoords="offset points", ha="center", color="tab:orange", weight="bold")  # fmt: skip
    axes.set(xlabel="optimizer updates", ylabel="loss (nats per token)", title=title)
    axes.margins(y=0.12)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
