"""What a sweep found: its table, its plots, and how far the suggested setting is from the best. Used by sweep.py."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from minipeft.testing.table import with_table

Setting = tuple[Any, ...]
FULL = "full"  # the method that is none
KEYS = ("method", "targets", "rank", "alpha", "rate")
START, END = "<!-- sweep: begin -->", "<!-- sweep: end -->"


class Result:
    """One setting over its seeds."""

    def __init__(self, records: Sequence[dict[str, Any]]):
        first, losses = records[0], [record["loss"] for record in records]
        self.method, self.targets, self.rank, self.alpha, self.rate = (first[key] for key in KEYS)
        self.bytes, self.loss, self.low, self.high = first["bytes"], mean(losses), min(losses), max(losses)

    @property
    def name(self) -> str:
        if self.method == FULL:
            return "full fine-tuning"
        return (
            f"{self.method}, r = {self.rank}, alpha = {self.alpha:g}, {self.targets}"
            if self.method == "lora"
            else self.method
        )


def settings(records: Iterable[dict[str, Any]]) -> dict[Setting, Result]:
    """Results by setting, in the order in which they were trained; a loss that is not finite counts as infinite."""
    found: dict[Setting, list[dict[str, Any]]] = {}
    for record in records:
        found.setdefault(tuple(record[key] for key in KEYS), []).append(record)
    return {setting: Result(each) for setting, each in found.items()}


def best(results: Iterable[Result], *keys: str) -> dict[Setting, Result]:
    """The best learning rate of each of these."""
    found: dict[Setting, Result] = {}
    for result in results:
        key = tuple(getattr(result, name) for name in keys)
        if key not in found or result.loss < found[key].loss:
            found[key] = result
    return found


def table(results: Sequence[Result], chosen: Result) -> str:
    """Every setting at its best learning rate, the best first."""
    lines = ["| setting | learning rate | trainable bytes | loss | over seeds |", "|---|---:|---:|---:|---|"]
    tuned = best(results, "method", "targets", "rank", "alpha").values()
    for result in sorted({*tuned, chosen}, key=lambda result: result.loss):
        name = f"**suggested**: {result.name}" if result is chosen else result.name
        lines.append(
            f"| {name} | {result.rate:g} | {result.bytes:,} | {result.loss:.3f} | {result.low:.3f} to {result.high:.3f} |"
        )
    return "\n".join(lines)


def spread(axes: Any, x: Sequence[float], results: Sequence[Result], label: str) -> None:
    """Mean over the seeds as a line, and from the least to the most as a band."""
    [line] = axes.plot(x, [result.loss for result in results], "o-", markersize=4, label=label)
    axes.fill_between(x, [r.low for r in results], [r.high for r in results], color=line.get_color(), alpha=0.2)


def draw(results: Sequence[Result], chosen: Result, path: Path) -> None:
    """Three plots: loss by learning rate, by rank, and by trainable bytes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.2), layout="constrained")
    plots = figure.subplots(1, 3)
    draw_rates(plots[0], results, chosen)
    draw_ranks(plots[1], [result for result in results if result.method == "lora"])
    draw_bytes(plots[2], results, chosen)
    worst = min(max(result.loss for result in results), 1.15 * min(result.loss for result in results))
    for axes in plots:
        axes.grid(alpha=0.3)
        axes.legend(fontsize="x-small")
        axes.set_ylim(top=worst)
    figure.savefig(path, dpi=80, metadata={"Software": None})


def draw_rates(axes: Any, results: Sequence[Result], chosen: Result) -> None:
    """Loss by learning rate: a line for each rank with the targets and alpha of the chosen setting, and full fine-tuning."""
    same = (chosen.targets, chosen.alpha)
    alike = [r for r in results if r.method == FULL or (r.method == "lora" and (r.targets, r.alpha) == same)]
    for method, rank in sorted({(r.method, r.rank) for r in alike}, reverse=True):
        own = sorted((r for r in alike if (r.method, r.rank) == (method, rank)), key=lambda result: result.rate)
        spread(axes, [r.rate for r in own], own, "full fine-tuning" if method == FULL else f"r = {rank}")
    axes.plot([chosen.rate], [chosen.loss], "k*", markersize=12, label="suggested")
    axes.set(xscale="log", xlabel="learning rate", ylabel="loss on other text")
    axes.set_title(f"{chosen.targets}, alpha = {chosen.alpha:g}")
    ticks(axes, {result.rate for result in alike if result is not chosen}, rotation=45)


def draw_ranks(axes: Any, lora: Sequence[Result]) -> None:
    """Loss by rank at each one's best learning rate: a line for each choice of targets and alpha."""
    tuned = best(lora, "targets", "alpha", "rank")
    for targets, alpha in dict.fromkeys((result.targets, result.alpha) for result in lora):
        own = sorted((r for key, r in tuned.items() if key[:2] == (targets, alpha)), key=lambda result: result.rank)
        spread(axes, [result.rank for result in own], own, f"{targets}, alpha = {alpha:g}")
    axes.set(xscale="log", xlabel="rank", title="LoRA at its best learning rate")
    ticks(axes, {result.rank for result in lora})


def draw_bytes(axes: Any, results: Sequence[Result], chosen: Result) -> None:
    """Loss by trainable bytes at the best learning rate: a colour for each method."""
    for name in dict.fromkeys(result.method for result in results):
        own = sorted(best((r for r in results if r.method == name), "bytes").values(), key=lambda result: result.bytes)
        errors = [[r.loss - r.low for r in own], [r.high - r.loss for r in own]]
        label = "full fine-tuning" if name == FULL else name
        axes.errorbar(
            [r.bytes for r in own], [r.loss for r in own], errors, fmt="o", capsize=3, markersize=5, label=label
        )
    axes.plot([chosen.bytes], [chosen.loss], "k*", markersize=12, label="suggested")
    axes.set(xscale="log", xlabel="trainable bytes", title="At the best learning rate")


def ticks(axes: Any, values: Iterable[float], rotation: int = 0) -> None:
    """A tick at each of these values, and nowhere else."""
    axes.minorticks_off()
    axes.set_xticks(sorted(values), [f"{value:g}" for value in sorted(values)], rotation=rotation)


def report(records: Sequence[dict[str, Any]], suggested: dict[str, Any], folder: Path, page: Path | None) -> float:
    """Print, draw and write; returns how much worse the suggested setting is than the best, as a share."""
    by_setting = settings(records)
    results, chosen = list(by_setting.values()), by_setting[tuple(suggested[key] for key in KEYS)]
    found, top = table(results, chosen), min((r for r in results if r.method == "lora"), key=lambda result: result.loss)
    print(found)
    share = chosen.loss / top.loss - 1
    words = (
        f"The suggested setting ({chosen.name}, learning rate {chosen.rate:g}) reaches {chosen.loss:.3f}, {100 * share:.1f} % above "
        f"the best of {len(results)} settings ({top.name}, learning rate {top.rate:g}: {top.loss:.3f})."
    )
    print(words)
    draw(results, chosen, folder / "sweep.png")
    if page is not None:
        figures = page.parent / "figures"
        figures.mkdir(exist_ok=True)
        draw(results, chosen, figures / "sweep.png")
        page.write_text(with_table(page.read_text("utf-8"), f"{words}\n\n{found}\n", START, END), "utf-8")
    return share
